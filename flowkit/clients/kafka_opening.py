"""Opening a client of kafka-python 3.0, and saying why the brokers did not let it in.

kafka-python itself says only that its time is over. What this does about it reaches into its internals, and is to be looked at
again when another version of it is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient

from ..errors import BrokerUnavailable, ConfigurationError
from ..settings import Settings

FORBIDDEN = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.IncompatibleBrokerVersion,
)


def open_client(kind: Callable[..., Any], settings: Settings, options: dict[str, Any]) -> Any:
    where = ", ".join(settings.kafka.hosts)
    door = _Door(auto_create_topics=options.get("allow_auto_create_topics", False))
    options.setdefault("kafka_client", door.open)
    try:
        made = kind(**options)
    except Exception as error:
        door.close()
        raise _explained(door.refused or error, where) from error
    door.leave_open()
    return made


class _Door:
    """Makes the network client of one consumer or producer, and knows why a broker did not let it in.

    After a refused login kafka-python tries on until its time is over, and then says only that it is.
    """

    def __init__(self, *, auto_create_topics: bool) -> None:
        self.refused: Exception | None = None
        self._auto_create_topics = auto_create_topics
        self._clients: list[Any] = []

    def open(self, **config: Any) -> Any:
        client = KafkaNetClient(**config)
        self._clients.append(client)
        # kafka-python 3.0 takes this option and forgets it, so that asking for a topic would make it
        client.cluster.config["allow_auto_create_topics"] = self._auto_create_topics
        manager = client._manager
        get_connection = manager.get_connection

        def watched(*arguments: Any, **options: Any) -> Any:
            connection = get_connection(*arguments, **options)
            connection.init_future.add_errback(self._look_at)
            made = connection.connection_made
            connection.connection_made = lambda transport: made(_hears_the_last_word(transport))
            return connection

        manager.get_connection = watched
        return client

    def _look_at(self, error: Exception) -> None:
        if isinstance(error, FORBIDDEN):
            self.refused = error

    def leave_open(self) -> None:
        for client in self._clients:
            del client._manager.get_connection  # the one of its class again, for it is called with each request

    def close(self) -> None:
        for client in self._clients:
            client.close()  # kafka-python leaves its IO thread running when a constructor fails


def _hears_the_last_word(transport: Any) -> Any:
    """kafka-python drops what it reads together with the end of a connection: a broker's reason for refusing a login."""
    receive = transport._sock_recv

    def all_received() -> tuple[bytes, Exception | None]:
        data, error = receive()
        return data, None if data else error

    transport._sock_recv = all_received
    return transport


def _explained(error: Exception, where: str) -> Exception:
    """flowkit's error for what a constructor of kafka-python raised, with the next step."""
    if isinstance(error, FORBIDDEN):
        return ConfigurationError(f"Kafka at {where} refuses this application: {error}")
    if isinstance(error, kafka_errors.KafkaError | OSError):
        return BrokerUnavailable(
            f"no Kafka broker answers at {where}; is it running, and is kafka.hosts right?"
            f" (`flowkit dev` starts one for development) [{type(error).__name__}]"
        )
    return ConfigurationError(f"kafka-python refuses the options given in kafka={{...}}: {error}")
