"""Custom workers: anything with ``perform_async(topic, params)`` takes the messages instead of RQ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import flowkit, read_topic
from processes import Process
from redis import Redis
from renewed import renew_topics
from servers import Kafka, WaitFor

from flowkit import ConfigurationError, Flowkit, Message, QueueError
from flowkit.testing import Client

EXAMPLES = Path(__file__).parents[2] / "examples"
ORDERS = ({"id": 1}, {"id": 2, "fails": 1}, {"id": 3})

# Huey: one worker, which looks for what is due each second. Dramatiq: one process, two threads.
WORKERS = {
    "huey": ("huey_consumer", "huey_shop.huey", "--workers", "1", "--scheduler-interval", "1"),
    "dramatiq": ("dramatiq", "dramatiq_shop", "--processes", "1", "--threads", "2"),
}


@pytest.mark.parametrize("library", sorted(WORKERS))
def test_a_queue_of_somebody_else_does_the_work(
    library: str, kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    renew_topics(kafka, f"{library}-orders", f"{library}-invoices")
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, f"{library.upper()}_REDIS": redis_url}

    def start(*command: str, log: str) -> Process:
        return Process(*command, cwd=EXAMPLES, env=env, log=tmp_path / log)

    with start("flowkit", "run", f"{library}_shop:app", log="run.log") as consumer:
        app = f"{library}_shop:app"
        lines = "\n".join(json.dumps(order) for order in ORDERS)
        sent = flowkit("send", app, f"{library}-orders", "-", cwd=EXAMPLES, env=env, stdin=lines)
        assert sent.code == 0, sent.err
        # The messages lie in that queue's own Redis keys until one of its workers comes; the consumer handles none.
        wait_for(lambda: queued(redis, library) == len(ORDERS), what="the messages in the queue")
        assert consumer.stop() == 0, consumer.output
    with start(*WORKERS[library], log="worker.log") as worker:
        invoices = [
            json.loads(record.value) for record in read_topic(kafka.hosts, f"{library}-invoices", len(ORDERS))
        ]
        assert sorted(invoices, key=lambda invoice: invoice["order"]) == [
            {"order": 1, "attempt": 1},
            {"order": 2, "attempt": 2},  # that library's own retry, and the message knows which it is
            {"order": 3, "attempt": 1},
        ]
        assert "attempt 1 at order 2 fails, as asked" in worker.output
        assert not [key for key in redis.scan_iter() if key.startswith((b"rq:", b"flowkit:"))]  # RQ has no part in it
        worker.stop()
    assert len(read_topic(kafka.hosts, f"{library}-invoices", len(ORDERS))) == len(ORDERS)


def queued(redis: Redis, library: str) -> int:
    """The messages that wait in the library's own queue."""
    key = {"huey": "huey.redis.hueyshop", "dramatiq": "dramatiq:bills"}[library]
    return int(redis.llen(key))


@pytest.mark.parametrize("library", sorted(WORKERS))
def test_its_handler_is_tested_without_it(
    library: str, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = example(f"{library}_shop")
    kept: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        shop.app.routes[f"{library}-orders"],
        "worker",
        type("Kept", (), {"perform_async": staticmethod(lambda *given: kept.append(given))}),
    )
    with Client(shop.app) as client:
        call = client.send(f"{library}-orders", {"id": 1}, key="ann")
        assert call.worker is shop.app.routes[f"{library}-orders"].worker
        [(topic, params)] = kept
        shop.app.perform(topic, json.loads(json.dumps(params)))  # what the queue carries is JSON
        assert client.sent(f"{library}-invoices").value == {"order": 1, "attempt": 1}


class Kept:
    """A custom worker; ``Class`` is one whose class itself is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Mapping[str, Any]]] = []

    def perform_async(self, topic: str, params: Mapping[str, Any]) -> None:
        self.given.append((topic, params))


class Class:
    given: list[tuple[str, Mapping[str, Any]]]

    @classmethod
    def perform_async(cls, topic: str, params: Mapping[str, Any]) -> None:
        cls.given.append((topic, params))


@pytest.mark.parametrize("as_class", [False, True], ids=["an object", "a class"])
def test_a_worker_is_an_object_or_a_class(as_class: bool) -> None:
    worker: Any = Class if as_class else Kept()
    worker.given = []
    app = Flowkit("shop")
    done = []
    app.add_topic("orders", done.append, worker=worker)
    assert Client(app).send("orders", {"id": 1}, key="ann").worker is worker
    [(topic, params)] = worker.given
    assert topic == "orders"
    assert params.keys() == {
        "topic",
        "partition",
        "offset",
        "timestamp",
        "received_at",
        "key",
        "headers",
        "value",
    }
    assert done == []
    app.start(connected=False)
    app.perform(topic, params)
    assert done == [{"id": 1}]


def test_a_worker_without_perform_async_is_refused_where_it_is_named() -> None:
    class Celery:
        def delay(self) -> None: ...

    celery = Celery()
    with pytest.raises(ConfigurationError) as error:
        Flowkit("shop").topic("orders", worker=celery)
    assert str(error.value) == (
        f"topic 'orders': worker={celery!r} needs the function(s) perform_async; a worker has perform_async"
    )
    with pytest.raises(ConfigurationError, match="inline=True runs in the consumer; remove queue= and worker="):
        Flowkit("shop").topic("orders", worker=Kept(), inline=True)


def test_a_hook_may_choose_the_worker() -> None:
    usual, express = Kept(), Kept()
    app = Flowkit("shop")
    app.add_topic("orders", len, worker=usual)

    @app.before_enqueue("orders")
    def choose(order: dict[str, int], message: Message) -> None:
        if order["total"] > 1000:
            message.worker = express

    client = Client(app)
    assert client.send("orders", {"total": 1}).worker is usual
    assert client.send("orders", {"total": 2000}).worker is express
    assert (len(usual.given), len(express.given)) == (1, 1)


def test_what_is_not_a_message_is_refused() -> None:
    app = Flowkit("shop", kafka={"hosts": "127.0.0.1:1"})
    app.add_topic("orders", len, worker=Kept())
    with pytest.raises(QueueError, match="params lack 'partition'; pass on what perform_async was given, unchanged"):
        app.perform("orders", {"id": 1})
