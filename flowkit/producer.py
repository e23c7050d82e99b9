"""Sending: start every delivery, flush once, look at each outcome. Safe to use from many threads and after a fork."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

from .errors import BrokerUnavailable, DeliveryError
from .parsers import Json, Parser, for_topic
from .responses import Response, response
from .settings import Settings

if TYPE_CHECKING:
    from .clients import MakeProducer, ProducerClient, TransactionalClient

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT = 35.0
"""Seconds to wait for the broker: a little longer than a client's own time for one delivery."""

MOST_OPEN = 10_000
"""Messages of ``submit`` under way at once: a client would hold any number of them in memory."""


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
        self._keep: Callable[[Response], None] | None = None
        self._closing: list[threading.Thread] = []
        self.opening = 0.0
        """Seconds that opening clients, and asking about topics, has taken."""
        self.generation = 0
        """Goes up whenever a client is thrown away."""
        self._met: set[str] = set()
        self._no_open()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._no_open()  # those under way are the parent's

    def _no_open(self) -> None:
        self._open: dict[Future[None], str] = {}
        self._open_lock = threading.Lock()
        self._room = threading.Semaphore(MOST_OPEN)

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
                    began = time.monotonic()
                    options = {} if isinstance(slot[1], int) else {"tells_each": False}
                    client = self._clients[slot] = self._make(self._settings(), **options)
                    self.opening += time.monotonic() - began
                    self._met = set()
                    # anew for each client, which closes itself at exit: what was registered last runs first
                    atexit.unregister(self.settle)
                    atexit.register(self.settle)
        return client

    @property
    def here(self) -> ProducerClient | None:
        """The client of this thread, for many calls in a row; None while a test keeps the messages."""
        return None if self._keep else self._client

    # For everybody.

    def send(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        partition: int | None = None,
        partition_key: str | bytes | None = None,
        headers: Any = None,
        parser: Parser = Json,
    ) -> None:
        """Sends one message and waits for the broker. Raises ``DeliveryError`` if it is not confirmed.

        ``value`` is text or bytes, or what ``parser`` can write; None is a tombstone. ``key`` places and labels the message;
        ``partition_key`` only places it; ``partition`` names the partition. ``headers`` is a dict, or a list of pairs.
        Inside a handler use ``app.respond_to`` instead: it is checked, and nothing is sent if the handler fails.
        """
        self.send_all([_message(topic, value, parser, key, partition, partition_key, headers)])

    def submit(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        partition: int | None = None,
        partition_key: str | bytes | None = None,
        headers: Any = None,
        parser: Parser = Json,
    ) -> Future[None]:
        """``send`` without waiting: gives a future that ends when the broker has confirmed the message, or with an error.

        In a coroutine: ``await asyncio.wrap_future(app.producer.submit(...))``. Who does not look at the future loses
        nothing: a failure is logged too, and the message in hand, a job and the process end only when its messages have.
        On confluent-kafka, in an inline handler that is not async, it ends when nothing else of the loop is under way, with the
        next commit at the latest.
        Waits where the client must: to connect, for a first answer about a topic (``connection_pool.timeout``), and while
        10,000 messages are under way. Raises at once what is wrong with the call (``ResponseError``, ``ParserError``).
        """
        item = _message(topic, value, parser, key, partition, partition_key, headers)
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # what is under way cannot be called back
        if not self._room.acquire(timeout=FLUSH_TIMEOUT):
            _fail(
                future, topic, DeliveryError(f"{topic}: Kafka does not take what is under way already", passing=True)
            )
            return future
        with self._open_lock:
            self._open[future] = topic
        client = None
        try:
            client = None if self._keep else self._client
            delivery = self.start(item, client)
        except (DeliveryError, BrokerUnavailable) as problem:
            self._end(future, problem, client)
        except BaseException as problem:
            self._end(future, problem)
            raise
        else:
            if client is None:
                self._end(future, None)
            else:
                end = lambda: self._end(future, _named(topic, client.outcome(delivery)), client)  # noqa: E731
                client.notify(delivery, end)
        return future

    def _end(self, future: Future[None], error: BaseException | None, client: ProducerClient | None = None) -> None:
        with self._open_lock:
            topic = self._open.pop(future, None)
        if topic is None:
            return
        self._room.release()
        if error is None:
            future.set_result(None)
            return
        if client is not None:
            self._replace(client, error)
        _fail(future, topic, error)

    def _replace(self, client: ProducerClient, error: BaseException) -> None:
        """Lets the next message have a new client, if this one may refuse everything from now on: kafka-python's does after
        a message that is too large. What other threads have under way with it comes to its end.
        """
        if isinstance(error, DeliveryError) and error.passing and not client.is_over:
            return
        with self._lock:  # whoever finds it replaced also finds it closing
            slots = [slot for slot, other in self._clients.items() if other is client]
            if not slots:
                return
            for slot in slots:
                del self._clients[slot]
            self.generation += 1
            # on a thread of its own: this may be the client's, and must not wait for itself
            args = (FLUSH_TIMEOUT,)
            closing = threading.Thread(target=client.close, args=args, name="flowkit-closing", daemon=True)
            try:
                closing.start()
                self._closing = [*(thread for thread in self._closing if thread.is_alive()), closing]
            except RuntimeError:  # since Python 3.12, while the interpreter ends; that closes it too
                logger.debug("a producer is left to the end of the process")

    @property
    def under_way(self) -> bool:
        """Whether messages of ``submit`` have not ended yet."""
        return bool(self._open)

    def settle(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Waits until every message of ``submit`` under way now has ended, well or badly, ``timeout`` seconds at most."""
        if self._open:
            with self._open_lock:
                futures = list(self._open)
            wait(futures, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Closes the clients of this process, after what is under way; those of a parent process are only forgotten.

        A message that Kafka has not confirmed within ``timeout`` seconds is given up: logged, its future ends so.
        """
        atexit.unregister(self.settle)
        deadline = time.monotonic() + timeout
        self.settle(timeout)
        pid = os.getpid()
        for slot in [slot for slot in self._clients if slot[0] == pid]:
            self._clients.pop(slot).close(max(0.1, deadline - time.monotonic()))
        late = DeliveryError("the producer was closed before Kafka had confirmed it", passing=True)
        for future, topic in list(self._open.items()):
            self._end(future, _named(topic, late))

    # For the consumer, for jobs and tests.

    def send_all(self, responses: list[Response]) -> None:
        """Sends messages and waits for all of them. Raises ``DeliveryError`` for the first that is not confirmed."""
        if self._keep:
            for item in responses:
                self._keep(item)
            return
        client = self._client
        try:
            deliveries = [(item, self.start(item, client)) for item in responses]
            client.flush(FLUSH_TIMEOUT)
            for item, delivery in deliveries:
                error = client.outcome(delivery)
                if error is not None:
                    raise _named(item.topic, error) from error
        except DeliveryError as error:
            self._replace(client, error)
            raise

    def start(self, item: Response, client: ProducerClient | None = None) -> Any:
        """Starts one delivery and gives its handle, for ``outcome`` after the next ``flush`` by the same thread."""
        if self._keep:
            return self._keep(item)
        client = client or self._client
        topic, value, key, partition, partition_key, headers, _ = item
        if topic not in self._met:
            return self._start_first(item, client)
        if partition is None and partition_key is not None:
            partition = client.partition_for(topic, partition_key)
        try:
            return client.send(topic, value, key, headers, partition)
        except DeliveryError as error:
            if client.is_over:
                self._replace(client, error)
            raise

    def start_together(self, topic: str, values: Sequence[bytes | None], client: ProducerClient | None) -> Any:
        """Starts messages of which nothing is given but the value, with one handle for all of them, if this client can. None if
        it cannot, or was not yet asked about the topic.
        """
        send = getattr(client, "send_together", None)
        if client is None or send is None or topic not in self._met:
            return None
        delivery = send(topic, values)
        if delivery.refusal is not None and client.is_over:
            self._replace(client, delivery.refusal)
        return delivery

    def _start_first(self, item: Response, client: ProducerClient) -> Any:
        """The first of a topic waits until the client has asked about it."""
        self._met.add(item.topic)
        began = time.monotonic()
        try:
            return self.start(item, client)
        finally:
            self.opening += time.monotonic() - began

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Waits until every started delivery has ended, well or badly, or ``timeout`` seconds have passed."""
        if self._keep:
            return
        client = self._client
        deadline = time.monotonic() + timeout
        for closing in self._closing:  # what was started before its client was replaced
            closing.join(max(0.0, deadline - time.monotonic()))
        client.flush(max(0.1, deadline - time.monotonic()))

    def ended(self, delivery: Any) -> bool:
        """Whether a delivery has ended by now, well or badly."""
        return self._keep is not None or self._client.ended(delivery)

    def outcome(self, delivery: Any) -> DeliveryError | None:
        """None where the broker has confirmed; else why not."""
        return None if self._keep else self._client.outcome(delivery)

    @contextmanager
    def kept(self, keep: Callable[[Response], None]) -> Iterator[None]:
        """Gives every message to ``keep`` instead of a broker: for tests."""
        before, self._keep = self._keep, keep
        try:
            yield
        finally:
            self._keep = before

    def renew(self) -> None:
        """Throws this thread's client away, so that the next send makes a new one: after a fatal error.

        Deliveries that other threads have under way with it fail, and are tried again.
        """
        client = self._clients.pop(self._slot(), None)
        self.generation += 1
        if client is not None:
            try:
                client.close(0)
            except Exception as error:  # it is given up because it does not work
                logger.debug("closing a producer failed: %r", error)

    def transactional(self, transactional_id: str) -> TransactionalClient:
        """A new client for transactions. It belongs to the caller, who closes it, and is given to ``start``.

        Raises ``BrokerUnavailable`` and ``ConfigurationError``.
        """
        client: Any = self._make(self._settings(), transactional_id=transactional_id)
        return client  # type: ignore[no-any-return]

    def claim(self) -> str:
        """Gives this thread a client of its own: a consumer's must not suffer from what another group sends."""
        claim: str = f"own-{threading.get_ident()}"
        self._thread.index = claim
        return claim

    @contextmanager
    def in_place_of(self, claim: str | None) -> Iterator[None]:
        """For another thread: uses the client of the one that has claimed it."""
        before = getattr(self._thread, "index", None)
        self._thread.index = before if claim is None else claim
        try:
            yield
        finally:
            self._thread.index = before

    def release(self) -> None:
        """Closes the client that this thread claimed."""
        client = self._clients.pop(self._slot(), None)
        self._thread.index = None
        if client is not None:
            client.close(2.0)


def _fail(future: Future[None], topic: str, error: BaseException) -> None:
    logger.error("a message for %s that was submitted is not delivered: %s", topic, error)
    future.set_exception(error)


def _message(topic: str, value: Any, parser: Parser, *places: Any) -> Response:
    return response(topic, value, for_topic(parser, topic), *places)


@overload
def _named(topic: str, error: DeliveryError) -> DeliveryError: ...
@overload
def _named(topic: str, error: None) -> None: ...
def _named(topic: str, error: DeliveryError | None) -> DeliveryError | None:
    return DeliveryError(f"{topic}: {error}", passing=error.passing) if error is not None else None
