"""What kept a client of kafka-python from connecting, in words that name the next step."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from kafka import errors as kafka_errors

from ..errors import BrokerUnavailable, ConfigurationError

FORBIDDEN = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.IncompatibleBrokerVersion,
)

NO_CERTIFICATE = ("certificate required", "bad certificate")
"""What a broker says to a client without a certificate, with TLS 1.3 and with 1.2."""

WRONG_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
EXPIRED = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED


class SpeaksTls(Exception):
    """A TLS alert came where Kafka's own protocol was expected."""


def refusal(error: BaseException, host: str, options: Mapping[str, Any]) -> ConfigurationError | None:
    """The error for a refusal that trying again would not change; None for anything else, as a broker that is down."""
    where = f"Kafka at {host} refuses this application:"
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, SpeaksTls):
            return ConfigurationError(
                f"Kafka at {host} expects TLS: name its authority's certificate as kafka.ssl.ca_cert (or set"
                " kafka.security_protocol to SSL, or to SASL_SSL with a login)"
            )
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigurationError(_not_trusted(cause, host, options))
        if isinstance(cause, ssl.SSLError) and "alert" in (said := str(cause)):
            return ConfigurationError(f"{where} {_not_let_in(said, options)}")
        if isinstance(cause, kafka_errors.SaslAuthenticationFailedError):
            return ConfigurationError(
                f"{where} the login of {options.get('sasl_plain_username')!r} failed; check kafka.sasl_plain_username,"
                f" kafka.sasl_plain_password and kafka.sasl_mechanism [{_text(cause)}]"
            )
        if isinstance(cause, kafka_errors.UnsupportedSaslMechanismError):
            return ConfigurationError(
                f"{where} it has no login by {options.get('sasl_mechanism')}; set kafka.sasl_mechanism to one that the"
                " broker has in sasl.enabled.mechanisms"
            )
        if isinstance(cause, kafka_errors.IllegalSaslStateError):
            return ConfigurationError(
                f"{where} it takes no login at this port; take kafka.sasl_mechanism away, or name the broker's"
                " port for logins in kafka.hosts"
            )
        if isinstance(cause, FORBIDDEN):
            return ConfigurationError(f"{where} {_text(cause)}")
    return None


def hint(error: BaseException, options: Mapping[str, Any]) -> str:
    """What may be wrong where a connection simply ended, which a broker that stops looks like as well."""
    secure = str(options.get("security_protocol", "PLAINTEXT")).endswith("SSL")
    early = "Handshake failed" in str(error) or any(isinstance(cause, ssl.SSLError) for cause in _causes(error))
    if secure and (early or isinstance(error, kafka_errors.KafkaTimeoutError)):
        return (
            "it does not answer in TLS: if this port is one without TLS, name the broker's TLS port in kafka.hosts, or"
            " take kafka.ssl and kafka.security_protocol away"
        )
    return ""


ASKS_FOR_LOGIN = (
    "it ends the connection at the first request: if this port is one for logins, set kafka.security_protocol to"
    " SASL_SSL or SASL_PLAINTEXT, kafka.sasl_mechanism, kafka.sasl_plain_username and kafka.sasl_plain_password"
)


def unavailable(error: BaseException, where: str, hint: str) -> BrokerUnavailable:
    """For brokers that do not answer, or not as Kafka would."""
    if hint:
        return BrokerUnavailable(f"no Kafka broker at {where} lets this application in; {hint}")
    return BrokerUnavailable(
        f"no Kafka broker answers at {where}; is it running, and is kafka.hosts right?"
        f" (`flowkit dev` starts one for development) [{type(error).__name__}]"
    )


def _not_trusted(error: ssl.SSLCertVerificationError, host: str, options: Mapping[str, Any]) -> str:
    said = error.verify_message.rstrip(".")
    if error.verify_code in WRONG_NAME:
        return (
            f"the certificate of Kafka at {host} is for another name: {said}. Name the broker in kafka.hosts, and in its"
            " advertised.listeners, as its certificate does"
        )
    if error.verify_code in EXPIRED:
        return f"the certificate of Kafka at {host} is not valid now: {said}. The broker needs a new one"
    authority = options.get("ssl_cafile")
    source = f"kafka.ssl.ca_cert ({authority})" if authority else "the authorities that this system trusts"
    return (
        f"the certificate of Kafka at {host} is not signed by {source}: {said}. Name the certificate of the authority"
        " that signed it as kafka.ssl.ca_cert; if that is right, somebody else may answer for the broker"
    )


def _not_let_in(said: str, options: Mapping[str, Any]) -> str:
    certificate = options.get("ssl_certfile")
    if certificate:
        return (
            f"it does not accept the certificate in kafka.ssl.client_cert ({certificate}): is it signed by an authority"
            f" that the broker trusts, and still valid? [{said}]"
        )
    if any(text in said for text in NO_CERTIFICATE):
        return (
            f"it asks for a certificate; name yours as kafka.ssl.client_cert and kafka.ssl.client_cert_key [{said}]"
        )
    return f"the TLS handshake failed [{said}]"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it came from, which kafka-python keeps in several ways."""
    found: list[BaseException | None] = [error]
    seen = set()
    while found:
        cause = found.pop(0)
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            found += [
                *(item for item in cause.args if isinstance(item, BaseException)),
                cause.__cause__,
                cause.__context__,
            ]


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
