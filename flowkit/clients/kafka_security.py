"""What can be wrong with TLS and logins before a broker is asked: kafka-python takes it in silence, and then never connects."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kafka.net.sasl import SASL_MECHANISMS

from ..errors import ConfigurationError
from ..settings import unknown_name

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")

FILES = {
    "ssl_cafile": "kafka.ssl.ca_cert",
    "ssl_certfile": "kafka.ssl.client_cert",
    "ssl_keyfile": "kafka.ssl.client_cert_key",
}
"""The options of kafka-python that name files, and the settings they come from."""


def check_security(options: dict[str, Any]) -> None:
    """Raises ``ConfigurationError`` for protocols, logins and certificates that cannot work; touches no network."""
    protocol, mechanism = options.get("security_protocol", "PLAINTEXT"), options.get("sasl_mechanism")
    if protocol not in PROTOCOLS:
        raise ConfigurationError(unknown_name("kafka.security_protocol", protocol, PROTOCOLS, "protocol"))
    if mechanism is not None and mechanism not in SASL_MECHANISMS:
        raise ConfigurationError(unknown_name("kafka.sasl_mechanism", mechanism, SASL_MECHANISMS, "mechanism"))
    if (mechanism is not None) != protocol.startswith("SASL_"):
        raise ConfigurationError(
            f"kafka.security_protocol is {protocol} and kafka.sasl_mechanism is {mechanism}: logging in needs both,"
            " SASL_SSL or SASL_PLAINTEXT and for example PLAIN"
        )
    if mechanism is not None and (mechanism == "PLAIN" or mechanism.startswith("SCRAM-")):
        for name in ("sasl_plain_username", "sasl_plain_password"):
            if not options.get(name):
                raise ConfigurationError(
                    f"kafka.{name}: is required by {mechanism}; FLOWKIT_KAFKA_{name.upper()} sets it as well"
                )
    if protocol.endswith("SSL"):
        _check_certificates(options)
    elif named := [setting for option, setting in FILES.items() if options.get(option)]:
        raise ConfigurationError(
            f"kafka.security_protocol is {protocol}, which encrypts nothing, but {named[0]} is given; set it to"
            f" {'SASL_SSL' if mechanism else 'SSL'}, or leave it out"
        )


def _check_certificates(options: dict[str, Any]) -> None:
    """Reads the files once, to say what is wrong with them. kafka-python reads them again with each connection, so that new
    ones may take their place.
    """
    if options.get("ssl_context") is not None:
        return
    for option, setting in FILES.items():
        if (name := options.get(option)) is not None:
            try:
                Path(name).open("rb").close()
            except OSError as error:
                raise ConfigurationError(f"{setting}: {name} cannot be read: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if options.get("ssl_cafile"):
        try:
            context.load_verify_locations(options["ssl_cafile"])
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"kafka.ssl.ca_cert: {options['ssl_cafile']} has no certificate in PEM format"
            ) from error
    if not options.get("ssl_certfile"):
        if options.get("ssl_keyfile"):
            raise ConfigurationError(
                "kafka.ssl.client_cert_key is given, but not kafka.ssl.client_cert, which it is for"
            )
        return
    if options.get("ssl_password") is None:
        options["ssl_password"] = ""  # or OpenSSL would ask for it at the terminal, and wait
    _check_key(context, options)


def _check_key(context: ssl.SSLContext, options: Mapping[str, Any]) -> None:
    certificate, password = options["ssl_certfile"], options["ssl_password"]
    key = options.get("ssl_keyfile") or certificate
    try:
        context.load_cert_chain(certificate, key, password)
        return
    except (ssl.SSLError, ValueError) as error:  # OpenSSL says why in words that change from version to version
        problem = error
    text = Path(key).read_text(errors="replace")
    if "PRIVATE KEY-----" not in text:
        says = f"kafka.ssl.client_cert_key: {key} has no private key in PEM format"
    elif "BEGIN CERTIFICATE-----" not in Path(certificate).read_text(errors="replace"):
        says = f"kafka.ssl.client_cert: {certificate} has no certificate in PEM format"
    elif getattr(problem, "reason", "") == "KEY_VALUES_MISMATCH":
        says = f"kafka.ssl.client_cert_key: {key} is not the key of the certificate in {certificate}"
    elif "ENCRYPTED" in text and not password:
        says = (
            f"kafka.ssl.client_cert_key: {key} is encrypted; give its password as kafka.ssl.client_cert_key_password"
        )
    elif "ENCRYPTED" in text:
        says = f"kafka.ssl.client_cert_key_password: is not the password of {key}"
    else:
        says = f"kafka.ssl.client_cert and kafka.ssl.client_cert_key cannot be used: {problem}"
    raise ConfigurationError(says) from problem
