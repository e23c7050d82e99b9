"""Opening a client of confluent-kafka, and why the brokers do not let it in or do not answer, in words that name the next step.

librdkafka connects on threads of its own, and tells what it meets with by a callback from within ``poll``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import BrokerUnavailable, ConfigurationError, FlowkitError
from ..settings import Settings
from .complaints import no_common_strategy, session_not_allowed

try:
    import confluent_kafka as confluent_kafka
except ImportError as missing:
    raise ConfigurationError(
        "client: confluent needs the package confluent-kafka: pip install 'flowkit-kafka[confluent]'"
    ) from missing

KafkaError, KafkaException = confluent_kafka.KafkaError, confluent_kafka.KafkaException

logger = logging.getLogger("confluent_kafka")

FIRST_ANSWER = 5.0
"""Seconds until the first answer of any broker."""

FORBIDDEN = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.UNSUPPORTED_SASL_MECHANISM,
    KafkaError.INVALID_SESSION_TIMEOUT,
    KafkaError.INCONSISTENT_GROUP_PROTOCOL,
    KafkaError._UNSUPPORTED_FEATURE,
}
REFUSED = {
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.STALE_MEMBER_EPOCH,
    KafkaError._ASSIGNMENT_LOST,
    KafkaError._STATE,
}
NO_TOPIC = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}

LOGIN, TLS = (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED), (KafkaError._SSL,)
SHARED = ("bootstrap.servers", "client.id", "security.protocol", "log_level", "socket.timeout.ms")


class Trouble:
    """What one client meets with on its way to the brokers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._where = ", ".join(settings.kafka.hosts)
        self._met: dict[int, Any] = {}

    def opened(self, kind: Any, options: dict[str, Any]) -> Any:
        """A client that has reached the cluster.

        Raises ``ConfigurationError`` where the options or the brokers refuse it, and ``BrokerUnavailable`` where none answers.
        """
        try:
            client = kind({**options, "error_cb": self._note}, logger=logger)
        except (KafkaException, TypeError, ValueError) as error:
            said = error.args[0].str() if isinstance(error, KafkaException) else error
            raise ConfigurationError(f"librdkafka refuses the options given in kafka={{...}}: {said}") from error
        try:
            client.list_topics(timeout=FIRST_ANSWER)
        except KafkaException as error:
            client.poll(0)
            problem = self._explained(error.args[0], *self._met.values())
            if hasattr(client, "close"):
                client.close()
            raise problem from error
        self._met.clear()  # it has got in: what is met with later passes
        return client

    def common(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that say where the brokers are, and how to get in."""
        found = {
            name: value for name, value in options.items() if name in SHARED or name.startswith(("ssl.", "sasl."))
        }
        return {**found, "error_cb": self._note, "logger": logger}

    def _note(self, error: Any) -> None:
        self._met[error.code()] = error
        logger.debug("%s", error)

    def met(self, error: Any) -> None:
        """Raises for an error that is the end of a client; others pass, and librdkafka goes on by itself."""
        if error.code() in FORBIDDEN or error.code() in LOGIN:
            raise self._explained(error)
        if error.fatal() or error.code() == KafkaError._FATAL:
            raise KafkaException(error)
        logger.info("%s: %s", error.name(), error.str())

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Raises flowkit's errors in the place of librdkafka's."""
        try:
            yield
        except KafkaException as error:
            raise self._explained(error.args[0]) from error

    def _explained(self, error: Any, *met: Any) -> FlowkitError:
        for found in (error, *met):
            if found.code() in LOGIN:
                return ConfigurationError(
                    f"Kafka at {self._where} refuses this application: the login of"
                    f" {self._settings.kafka.sasl_plain_username!r} failed; check kafka.sasl_plain_username,"
                    f" kafka.sasl_plain_password and kafka.sasl_mechanism [{found.str()}]"
                )
            if found.code() in TLS:
                return ConfigurationError(
                    f"Kafka at {self._where} and this application do not come to terms in TLS: check kafka.ssl.ca_cert,"
                    f" kafka.ssl.client_cert, kafka.security_protocol and the broker's name in kafka.hosts [{found.str()}]"
                )
        kafka = self._settings.kafka
        if error.code() == KafkaError.INVALID_SESSION_TIMEOUT:
            return session_not_allowed(kafka.session_timeout)
        if error.code() == KafkaError.INCONSISTENT_GROUP_PROTOCOL:
            return no_common_strategy(kafka.partition_assignment_strategy)
        if error.code() in FORBIDDEN:
            return ConfigurationError(f"Kafka at {self._where} refuses this application: {error.str()}")
        hints = "; ".join(sorted({item.str() for item in self._met.values()}))
        return BrokerUnavailable(
            f"no Kafka broker answers at {self._where}; is it running, and is kafka.hosts right?"
            f" (`flowkit dev` starts one for development) [{error.name()}{': ' if hints else ''}{hints}]"
        )
