"""Django, Flask and FastAPI with flowkit: the examples as they are, on a real broker, in the frameworks' own servers."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from commands import NOBODY, command, python, read_topic
from postgres import Postgres
from processes import APPS, BIN, Process
from redis import Redis
from renewed import renew_topics
from servers import Kafka, WaitFor

from flowkit import Flowkit
from flowkit.devstack import free_port
from flowkit.testing import Client

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOP = EXAMPLES / "django_shop"
ORDER = {"id": 7, "user": "ann", "total": 20.0}

# kafka-python 3.0 leaves a socket to the garbage collector when a connection is refused.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(autouse=True)
def _sockets() -> Iterator[None]:
    yield
    gc.collect()  # while their warnings are ignored


def values(hosts: str, topic: str, count: int) -> list[Any]:
    return [json.loads(record.value) for record in read_topic(hosts, topic, count)]


def send(kafka: Kafka, topic: str, value: Any) -> None:
    sender = Flowkit("sender", kafka={"hosts": kafka.hosts})
    sender.producer.send(topic, value)
    sender.producer.close()


class Answer:
    """What a web server answered."""

    def __init__(self, url: str, data: Any = None) -> None:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                self.status, self.text = reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                self.status, self.text = error.code, error.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def up(wait_for: WaitFor, process: Process, url: str) -> None:
    """Waits until a web server answers."""

    def answers() -> bool:
        assert process.popen.poll() is None, process.output
        try:
            return bool(Answer(url).status)
        except OSError:
            return False

    wait_for(answers, what=f"{process.command} to answer")


# Django.


@pytest.fixture
def shop(kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of a shop with an empty database."""
    renew_topics(kafka, "django-orders", "django-parcels", "django-payments")
    database = str(tmp_path / "shop.sqlite3")
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_REDIS": redis_url, "SHOP_DATABASE": database}
    assert manage("migrate", env=env).code == 0
    return env


def manage(*arguments: str, env: Mapping[str, str]) -> Any:
    return python("manage.py", *arguments, cwd=SHOP, env=env)


def started(*arguments: str, env: Mapping[str, str], log: Path, cwd: Path = SHOP) -> Process:
    return Process(*arguments, cwd=cwd, env=env, log=log)


def test_a_django_project_sends_after_commit_and_handlers_use_its_models(
    shop: dict[str, str], kafka: Kafka, tmp_path: Path, wait_for: WaitFor
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/orders/"
    serve = ("runserver", f"127.0.0.1:{port}", "--noreload")
    with (
        started(sys.executable, "manage.py", *serve, env=shop, log=tmp_path / "web.log") as web,
        started(sys.executable, "manage.py", "flowkit", "run", env=shop, log=tmp_path / "run.log") as consumer,
    ):
        up(wait_for, web, url + "0/")
        first = Answer(url, {"user": "ann", "total": 20})
        assert first.status == 201
        refused = Answer(url, {"user": "bob", "total": -1})  # after on_commit, but the transaction is rolled back
        assert refused.status == 500
        second = Answer(url, {"user": "eve", "total": 30})
        orders = [first.json["id"], second.json["id"]]
        parcels = values(kafka.hosts, "django-parcels", 2)
        assert parcels == [{"order": orders[0], "for": "ann"}, {"order": orders[1], "for": "eve"}]
        wait_for(lambda: Answer(f"{url}{orders[1]}/").json["packed"], what="the consumer's commit")
        assert Answer(f"{url}{orders[0]}/").json == {"id": orders[0], "user": "ann", "packed": True, "paid": False}

        # A queued route: in flowkit's own worker, and in a plain one of RQ.
        workers: list[Callable[[], Any]] = [
            lambda: manage("flowkit", "worker", "--burst", env=shop),
            lambda: command(
                str(BIN / "rq"),
                "worker",
                "--burst",
                "--url",
                shop["FLOWKIT_REDIS"],
                "django-shop",
                cwd=SHOP,
                env=shop,
            ),
        ]
        with Redis.from_url(shop["FLOWKIT_REDIS"]) as redis:
            for number, work in zip(orders, workers, strict=True):
                send(kafka, "django-payments", {"order": number, "amount": 30})
                wait_for(lambda: redis.llen("rq:queue:django-shop") == 1, what="the job")
                done = work()
                assert done.code == 0, done.err
                assert Answer(f"{url}{number}/").json["paid"], done.err
        assert len(values(kafka.hosts, "django-orders", 2)) == 2  # none of the order that was rolled back
        assert consumer.stop() == 0, consumer.output


def test_a_django_consumer_outlives_its_database_connection(
    shop: dict[str, str], kafka: Kafka, tmp_path: Path
) -> None:
    with Postgres() as postgres:
        names = {"host": "HOST", "port": "PORT", "user": "USER", "dbname": "NAME"}
        env = {
            **shop,
            "DJANGO_SETTINGS_MODULE": "postgres_settings",
            "PYTHONPATH": str(APPS),
            "POSTGRES": json.dumps({names[name]: value for name, value in postgres.settings.items()}),
        }
        assert manage("migrate", env=env).code == 0
        with postgres.connect() as connection:
            connection.execute(
                "insert into orders_order values (1, 'ann', 5, false, false), (2, 'bob', 5, false, false)"
            )
        # `flowkit run` itself, as a deployment may have it: the handlers' module sets Django up
        with started("flowkit", "run", "orders.kafka:app", env=env, log=tmp_path / "run.log") as consumer:
            for number, user in ((1, "ann"), (2, "bob")):
                send(kafka, "django-orders", {"id": number})
                parcels = values(kafka.hosts, "django-parcels", number)
                assert parcels[-1] == {"order": number, "for": user}
                assert postgres.break_connections() == 1  # the consumer had kept it
            failures = [line for line in consumer.output.splitlines() if "failed in pack, attempt" in line]
            assert len(failures) == 1, consumer.output  # none with CONN_HEALTH_CHECKS: see test_contrib_django.py
            assert consumer.stop() == 0
        with postgres.connect() as connection:
            rows = connection.execute("select id, packed from orders_order order by id").fetchall()
            assert rows == [(1, True), (2, True)]


# Flask.


@pytest.fixture
def flask_topics(kafka: Kafka) -> None:
    renew_topics(kafka, "flask-orders", "flask-invoices")


def test_flask_sends_from_a_request_and_handlers_run_in_its_context(
    flask_topics: None,
    example: Callable[[str], ModuleType],
    kafka: Kafka,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: WaitFor,
) -> None:
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", kafka.hosts)
    shop = example("flask_shop")
    answer = shop.site.test_client().post("/orders", json=ORDER)
    assert (answer.status_code, answer.json) == (202, {"accepted": 7})
    [record] = read_topic(kafka.hosts, "flask-orders", 1)
    assert (record.key, json.loads(record.value)) == (b"ann", ORDER)
    shop.app.producer.close()
    with started("flowkit", "run", "flask_shop:app", env={}, log=tmp_path / "run.log", cwd=EXAMPLES) as consumer:
        assert values(kafka.hosts, "flask-invoices", 1) == [{"order": 7, "amount": "20.00 EUR"}]
        assert consumer.stop() == 0, consumer.output


def test_flask_says_so_when_kafka_takes_nothing(
    example: Callable[[str], ModuleType], kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", kafka.hosts)
    shop = example("flask_shop")
    answer = shop.site.test_client().post("/orders", json={**ORDER, "note": "x" * 2_000_000})
    assert answer.status_code == 503
    assert answer.json["error"].startswith("flask-orders: ")
    shop.app.producer.close()


def test_the_flask_shop_is_tested_like_any_other(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", NOBODY)
    shop = example("flask_shop")
    with Client(shop.app) as client:
        assert shop.site.test_client().post("/orders", json=ORDER).status_code == 202
        assert client.sent("flask-orders").value == ORDER
        call = client.send("flask-orders", ORDER, follow=True)
        assert call.sent("flask-invoices").value == {"order": 7, "amount": "20.00 EUR"}
        assert shop.billed == {"EUR": 1}


def test_each_process_of_a_pre_forking_server_sends(
    flask_topics: None, kafka: Kafka, tmp_path: Path, wait_for: WaitFor
) -> None:
    # The module is imported, and its producer connected, before the server forks.
    config = tmp_path / "gunicorn.py"
    config.write_text(
        "def when_ready(server):\n"
        "    import flask_shop\n"
        "    flask_shop.app.producer.send('flask-orders', {'id': 'parent', 'user': 'master'})\n"
    )
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ["--preload", "--workers", "2", "--config", str(config), "--bind", url.removeprefix("http://")]
    logs = ["--access-logfile", "-", "--access-logformat", "answered by %(p)s: %(s)s"]
    with started(
        "gunicorn",
        *arguments,
        *logs,
        "flask_shop:site",
        env={"FLOWKIT_KAFKA_HOSTS": kafka.hosts},
        log=tmp_path / "web.log",
        cwd=EXAMPLES,
    ) as web:
        up(wait_for, web, f"{url}/up")
        sent: list[int] = []

        def both_answered() -> bool:
            sent.append(len(sent))
            assert Answer(f"{url}/orders", {**ORDER, "id": sent[-1]}).status == 202
            lines = [line for line in web.output.splitlines() if "answered by" in line and line.endswith("202")]
            return len({line.split()[2] for line in lines}) == 2

        wait_for(both_answered, what="both processes to take an order")
        assert web.stop() == 0, web.output
    found = [order["id"] for order in values(kafka.hosts, "flask-orders", len(sent) + 1)]
    assert sorted(found, key=str) == sorted([*sent, "parent"], key=str)


# FastAPI.


def test_fastapi_sends_without_blocking_its_event_loop_and_closes_at_its_end(
    example: Callable[[str], ModuleType], kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWKIT_KAFKA_HOSTS", kafka.hosts)
    monkeypatch.setenv("FLOWKIT_CONNECTION_POOL_TIMEOUT", "1.5")
    renew_topics(kafka, "fastapi-orders", "fastapi-invoices")
    shop = example("fastapi_shop")
    before = set(threading.enumerate())

    def kafka_threads() -> list[threading.Thread]:
        return [new for new in set(threading.enumerate()) - before if type(new).__module__.startswith("kafka.")]

    async def use() -> None:
        transport = httpx.ASGITransport(app=shop.api)
        async with shop.api.router.lifespan_context(shop.api), httpx.AsyncClient(transport=transport) as web:
            web.base_url = "http://shop"
            answer = await web.post("/orders", json=ORDER)
            assert (answer.status_code, answer.json()) == (202, {"accepted": 7})
            assert (await web.post("/orders", json={"id": 7})).status_code == 422
            # A send that waits: its topic does not exist. Others are answered meanwhile.
            send = shop.app.producer.send
            monkeypatch.setattr(shop.app.producer, "send", lambda _, *args, **kw: send("no-such-topic", *args, **kw))
            waiting = asyncio.create_task(web.post("/orders", json=ORDER))
            answered = 0
            while not waiting.done():
                assert (await web.get("/health")).json() == {"status": "ok"}
                answered += 1
                await asyncio.wait([waiting], timeout=0.01)
            away = await waiting
            assert answered > 20
            assert away.status_code == 503
            assert "the topic 'no-such-topic' does not exist" in away.json()["error"]
            assert kafka_threads()

    asyncio.run(use())
    assert not kafka_threads()
    [record] = read_topic(kafka.hosts, "fastapi-orders", 1)
    assert (record.key, json.loads(record.value)) == (b"ann", ORDER)
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    with started("flowkit", "run", "fastapi_shop:app", env=env, log=tmp_path / "run.log", cwd=EXAMPLES) as consumer:
        assert values(kafka.hosts, "fastapi-invoices", 1) == [{"order": 7, "total": 20.0}]
        assert consumer.stop() == 0, consumer.output


def test_fastapi_under_its_own_server(kafka: Kafka, tmp_path: Path, wait_for: WaitFor) -> None:
    renew_topics(kafka, "fastapi-orders")
    url = f"http://127.0.0.1:{free_port()}"
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    serve = ("uvicorn", "fastapi_shop:api", "--port", url.rpartition(":")[2])
    with started(*serve, env=env, log=tmp_path / "web.log", cwd=EXAMPLES) as web:
        up(wait_for, web, f"{url}/health")
        assert Answer(f"{url}/orders", ORDER).json == {"accepted": 7}
        web.popen.terminate()
        web.wait()
        assert "Application shutdown complete" in web.output, web.output
    assert values(kafka.hosts, "fastapi-orders", 1) == [ORDER]
