"""Opening a client of kafka-python 3.0, and knowing why the brokers did not let it in.

kafka-python itself says only that its time is over. What this does about it reaches into its internals, and is to be looked at
again when another version of it is allowed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient

from ..errors import ConfigurationError, FlowkitError
from ..settings import Settings
from .kafka_refusals import ASKS_FOR_LOGIN, SpeaksTls, hint, refusal, unavailable

_met: dict[tuple[str, ...], list[str]] = {}
"""By ``kafka.hosts``: the brokers as a client of this process last saw them, so that those after it find the cluster though
the hosts that were named are gone."""


def open_client(
    kind: Callable[..., Any], settings: Settings, options: dict[str, Any], door: Door | None = None
) -> Any:
    """A consumer, producer or admin client of kafka-python that has reached the cluster.

    Raises ``ConfigurationError`` where the brokers refuse it, and ``BrokerUnavailable`` where none answers within
    ``bootstrap_timeout_ms``. A ``door`` of the caller's own explains later errors as well.
    """
    hosts = options["bootstrap_servers"]
    options["bootstrap_servers"] = [
        *hosts,
        *(host for host in _met.get(settings.kafka.hosts, ()) if host not in hosts),
    ]
    door = door or Door()
    door.hosts, door.options = settings.kafka.hosts, options
    try:
        return kind(**{"kafka_client": door.open, **options})
    except Exception as error:
        door.close()
        raise door.explained(error) from error


class Door:
    """Makes the network client of one consumer, producer or admin client, and notes what its connections meet with.

    After a refused login kafka-python tries on until its time is over, and then says only that it is.
    """

    def __init__(self) -> None:
        self.hosts: tuple[str, ...] = ()
        self.options: dict[str, Any] = {}
        self._client: Any = None
        self._refusals: dict[Any, ConfigurationError] = {}
        self._hint = ""
        self._answered = False

    def open(self, **config: Any) -> Any:
        self._client = client = KafkaNetClient(**config)
        manager, cluster = client._manager, client.cluster
        # kafka-python 3.0 takes this option and forgets it, so that asking for a topic would make it
        cluster.config["allow_auto_create_topics"] = self.options.get("allow_auto_create_topics", False)
        cluster.add_listener(self._meet)
        connect, hosts = manager._connect, cluster.bootstrap_brokers()

        async def watched(node: Any, connection: Any, *, timeout_at: float, **options: Any) -> None:
            now = time.monotonic()
            if cluster.is_bootstrap(node.node_id) and len(hosts) > 1:
                timeout_at = now + (timeout_at - now) / 2  # a machine that is gone must leave time for the others
            self._watch(node, connection)
            late = kafka_errors.KafkaTimeoutError("no answer in time")
            # kafka-python would wait for ever where a port is silent on TLS
            manager._net.call_at(timeout_at + 0.1, lambda: connection.initializing and connection.close(late))
            await connect(node, connection, timeout_at=timeout_at, **options)

        def candidates() -> list[Any]:
            """Those that failed least, so that each has its turn. Raises when every one has refused us."""
            if all(host.node_id in self._refusals for host in hosts):
                raise self._refusals[hosts[0].node_id]
            failures = {host.node_id: manager._backoff.get(host.node_id, (0,))[0] for host in hosts}
            return [host for host in hosts if failures[host.node_id] == min(failures.values())]

        manager._connect = watched
        cluster.bootstrap_brokers = candidates
        return client

    def _meet(self, cluster: Any) -> None:
        """The brokers have told who they are."""
        self._answered = True
        if brokers := cluster.brokers():
            _met[self.hosts] = [_address(broker) for broker in brokers]

    def _watch(self, node: Any, connection: Any) -> None:
        def failed(error: Exception) -> None:
            found = refusal(error, _address(node), self.options)
            if found is not None:
                self._refusals[node.node_id] = found
            self._hint = hint(error, self.options) or self._hint

        def ended(_: Exception) -> None:
            if not self._answered and connection.init_future.succeeded() and not connection.sasl_enabled:
                self._hint = ASKS_FOR_LOGIN

        def connected(_: Any) -> None:
            self._refusals.pop(node.node_id, None)

        made = connection.connection_made
        connection.connection_made = lambda transport: made(self._listen(transport))
        connection.init_future.add_callback(connected)
        connection.init_future.add_errback(failed)
        connection.close_future.add_errback(ended)

    def _listen(self, transport: Any) -> Any:
        """Hears the last word of a broker, which kafka-python drops when the connection ends with it."""
        receive = transport._sock_recv
        secure = hasattr(transport, "_ssl_context")

        def heard() -> tuple[bytes, Exception | None]:
            data, error = receive()
            if not secure and data.startswith(b"\x15\x03"):  # no length of Kafka's: a TLS alert
                return b"", kafka_errors.KafkaConnectionError(SpeaksTls())
            return data, None if data else error

        transport._sock_recv = heard
        return transport

    def explained(self, error: Exception) -> FlowkitError:
        """flowkit's error for what kafka-python raised, with the next step."""
        where = ", ".join(self.hosts)
        found = refusal(error, where, self.options) or next(iter(self._refusals.values()), None)
        if found is not None:
            return found
        if isinstance(error, kafka_errors.KafkaError | OSError):
            return unavailable(error, where, self._hint)
        return ConfigurationError(f"kafka-python refuses the options given in kafka={{...}}: {error}")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()  # kafka-python leaves its IO thread running when a constructor fails


def _address(broker: Any) -> str:
    return f"[{broker.host}]:{broker.port}" if ":" in broker.host else f"{broker.host}:{broker.port}"


class _NoSecrets(logging.Filter):
    """Takes logins out of kafka-python's debug lines: they have each request in full, also as bytes, and all options of an
    admin client.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                f"{type(item).__name__}(...)" if type(item).__name__.startswith("Sasl") else item
                for item in record.args
            )
        return not any(part in str(record.msg) for part in ("configuration: %s", "Send: ", "Recv: "))


for _name in ("kafka.admin.client", "kafka.net.connection", "kafka.protocol.parser"):
    logging.getLogger(_name).addFilter(_NoSecrets())
