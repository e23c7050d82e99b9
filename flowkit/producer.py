"""Sending: start every delivery, flush once, look at each outcome. Safe to use from many threads and after a fork."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from .clients import MakeProducer, ProducerClient
from .errors import DeliveryError
from .parsers import Json
from .responses import Response, response
from .settings import Settings

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 35.0
"""Seconds to wait for the broker: a little longer than a client's own time for one delivery."""


class Producer:
    """The producers of one process: one for each consumer's thread, and for the others as many as ``connection_pool.size``
    says, made when first needed.

    A Kafka client made before a fork is dead in the child, so each process makes its own.
    """

    def __init__(self, settings: Callable[[], Settings], make: MakeProducer) -> None:
        self._settings = settings
        self._make = make
        self._clients: dict[tuple[int, int | str], ProducerClient] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._turn = itertools.count()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def _slot(self) -> tuple[int, int | str]:
        index = getattr(self._thread, "index", None)
        if index is None:
            index = self._thread.index = next(self._turn) % self._settings().connection_pool.size
        return os.getpid(), index

    @property
    def _client(self) -> ProducerClient:
        slot = self._slot()
        client = self._clients.get(slot)
        if client is None:
            with self._lock:
                client = self._clients.get(slot)
                if client is None:
                    client = self._clients[slot] = self._make(self._settings())
        return client

    def send(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        partition: int | None = None,
        partition_key: str | bytes | None = None,
        headers: Any = None,
    ) -> None:
        """Sends one message and waits for the broker. Raises ``DeliveryError`` if it is not confirmed.

        ``value`` is text or bytes, or anything JSON can hold; None is a tombstone. Inside a handler use
        ``app.respond_to`` instead: it is checked, and nothing is sent if the handler fails.
        """
        self.send_all([response(topic, value, Json.generate, key, partition, partition_key, headers)])

    def send_all(self, responses: list[Response]) -> None:
        """Sends messages and waits for all of them. Raises ``DeliveryError`` for the first that is not confirmed."""
        deliveries = [(item, self.start(item)) for item in responses]
        self.flush()
        for item, delivery in deliveries:
            error = self.outcome(delivery)
            if error is not None:
                raise DeliveryError(f"{item.topic}: {error}", passing=error.passing) from error

    def start(self, item: Response) -> Any:
        """Starts one delivery and gives its handle, for ``outcome`` after the next ``flush`` by the same thread."""
        client = self._client
        partition = item.partition
        if partition is None and item.partition_key is not None:
            partition = client.partition_for(item.topic, item.partition_key)
        return client.send(item.topic, item.value, item.key, item.headers, partition)

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Waits until every started delivery has ended, well or badly, or ``timeout`` seconds have passed."""
        self._client.flush(timeout)

    def outcome(self, delivery: Any) -> DeliveryError | None:
        """None where the broker has confirmed; else why not."""
        return self._client.outcome(delivery)

    def renew(self) -> None:
        """Throws this thread's client away, so that the next send makes a new one: after a fatal error.

        Deliveries that other threads have under way with it fail, and are tried again.
        """
        client = self._clients.pop(self._slot(), None)
        if client is not None:
            try:
                client.close(0)
            except Exception as error:  # it is given up because it does not work
                logger.debug("closing a producer failed: %r", error)

    def claim(self) -> None:
        """Gives this thread a client of its own: a consumer's must not suffer from what another group sends."""
        self._thread.index = f"own-{threading.get_ident()}"

    def release(self) -> None:
        """Closes the client that this thread claimed."""
        client = self._clients.pop(self._slot(), None)
        self._thread.index = None
        if client is not None:
            client.close(2.0)

    def close(self, timeout: float = 5.0) -> None:
        """Closes the clients of this process; those of a parent process are only forgotten, never touched."""
        pid = os.getpid()
        for slot in [slot for slot in self._clients if slot[0] == pid]:
            self._clients.pop(slot).close(timeout)
