"""The web page without a browser: who may come in, what is read from Redis, and servers that are away."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from commands import NOBODY, flowkit
from flask.testing import FlaskClient
from processes import Process
from redis import Redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from rq import Queue
from rq.results import Result
from servers import RedisServer, WaitFor
from support import an_entry, put_jobs

from flowkit import Flowkit
from flowkit.clients.kafka_admin import Lag
from flowkit.errors import BrokerUnavailable, RedisUnavailable
from flowkit.jobs import OwnJob
from flowkit.queues import Envelope
from flowkit.web.failed import Gone, delete, error_of, failed_job, failed_jobs, retry
from flowkit.web.pages import Access, ago, make_pages, number
from flowkit.web.recent import Recent
from flowkit.web.serve import is_loopback
from flowkit.web.workers import workers

PASSWORD = "pässword"


def make_app(redis_url: str | None, **settings: Any) -> Flowkit:
    app = Flowkit("shop", kafka={"hosts": NOBODY}, redis=redis_url, **settings)
    app.reference = "shop:app"

    @app.topic("orders")
    @app.responds_to("invoices")
    def bill(order: dict[str, Any]) -> None: ...

    return app


def put_failed(
    redis: Redis, app: Flowkit, offset: int = 0, count: int = 1, error: str = "ValueError: no", **meta: Any
) -> str:
    """A job as the consumer makes it and RQ gives it up."""
    queue = Queue("default", connection=redis, serializer=Envelope)
    (job_id,) = put_jobs(redis, app, "orders", [an_entry("orders", offset + number, 2) for number in range(count)])
    job = OwnJob.fetch(job_id, connection=redis, serializer=Envelope)
    queue.remove(job_id)
    job.meta = meta
    job.save()
    Result.create_failure(job, ttl=-1, exc_string=error)
    queue.failed_job_registry.add(job, exc_string=error)
    job.set_status("failed")
    return str(job.id)


@pytest.fixture
def app(redis: Redis, redis_url: str) -> Flowkit:
    return make_app(redis_url)


def login(user: str = "flowkit", password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


def a_little_behind() -> list[Lag]:
    return [Lag("shop_orders", "orders", 0, 5, 12, 7), Lag("shop_orders", "orders", 1, None, 0, 0)]


def client_of(app: Flowkit, **access: Any) -> FlaskClient:
    return make_pages(app, Access(PASSWORD, **access), a_little_behind).test_client()


def token_of(client: FlaskClient) -> str:
    page = client.get("/", headers=login()).text
    return re.findall(r'name="token" value="([^"]+)"', page)[0]


# Who may come in.


@pytest.mark.parametrize("path", ["/", "/flow.svg", "/static/style.css", "/delete?queue=default&job=x", "/nowhere"])
def test_every_path_wants_the_password(app: Flowkit, path: str) -> None:
    client = client_of(app)
    refused = [
        {},
        login(password=""),
        login(password=PASSWORD[:-1]),
        login(user="someone"),
        {"Authorization": f"Bearer {PASSWORD}"},
        {"Authorization": "Basic ???"},
    ]
    for headers in refused:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert "shop" not in answer.text
    with client.get(path, headers=login()) as answer:
        assert answer.status_code != 401


def test_every_answer_forbids_scripts_and_whatever_comes_from_elsewhere(app: Flowkit) -> None:
    client = client_of(app)
    for path, headers in (("/", login()), ("/", {}), ("/static/style.css", login()), ("/nowhere", login())):
        with client.get(path, headers=headers) as answer:
            policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    page = client.get("/", headers=login())
    assert page.headers["Cache-Control"] == "no-store"
    assert re.findall(r"(?:src|href|action)=\"(?:https?:)?//", page.text) == []
    assert re.findall(r"<script(?![^>]*src=)| style=| on[a-z]+=", page.text) == []
    drawing = client.get("/flow.svg", headers=login())
    assert drawing.mimetype == "image/svg+xml"
    assert "script-src" not in drawing.headers["Content-Security-Policy"]
    assert drawing.headers["Content-Security-Policy"].startswith("default-src 'none';")


def test_a_form_must_come_from_one_of_our_pages(app: Flowkit, redis: Redis) -> None:
    job = put_failed(redis, app)
    client = client_of(app)
    form = {"queue": "default", "job": job, "token": token_of(client)}
    own = {**login(), "Sec-Fetch-Site": "same-origin"}
    for path in ("/retry", "/delete"):
        assert client.post(path, data={**form, "token": "x"}, headers=own).status_code == 403
        assert client.post(path, data={"queue": "default", "job": job}, headers=own).status_code == 403
        for site in ("cross-site", "same-site"):
            assert client.post(path, data=form, headers={**login(), "Sec-Fetch-Site": site}).status_code == 403
        assert client.post(path, data=form).status_code == 401
    assert client.get("/retry", headers=login()).status_code == 405
    assert failed_jobs(redis, ["default"], 0, 10).total == 1

    assert client.post("/retry", data=form, headers=own).status_code == 303
    assert failed_jobs(redis, ["default"], 0, 10).total == 0


def test_read_only_changes_nothing_even_with_a_token(app: Flowkit, redis: Redis) -> None:
    job = put_failed(redis, app)
    client = client_of(app, read_only=True)
    page = client.get("/", headers=login()).text
    assert "Retry" not in page
    assert "<form" not in page
    assert "<form" not in client.get(f"/delete?queue=default&job={job}", headers=login()).text
    answer = client.post("/delete", data={"queue": "default", "job": job}, headers=login())
    assert answer.status_code == 403
    assert "--read-only" in answer.text
    assert failed_jobs(redis, ["default"], 0, 10).total == 1


def test_a_page_that_came_without_tls_over_a_network_says_so(app: Flowkit) -> None:
    exposed = client_of(app, exposed=True)
    assert "Not private." in exposed.get("/", headers=login()).text
    assert "Not private." not in exposed.get("/", headers={**login(), "X-Forwarded-Proto": "https"}).text
    assert "Not private." not in client_of(app).get("/", headers=login()).text


def test_what_the_address_says_is_not_repeated_unless_it_names_messages(app: Flowkit) -> None:
    client = client_of(app)
    page = client.get("/?done=deleted&place=orders[2]@7", headers=login()).text
    assert "orders[2]@7 is deleted." in page
    page = client.get("/?done=deleted&place=<b>call 555</b>", headers=login()).text
    assert "call 555" not in page
    assert "The job is deleted." in page
    assert 'class="notice"' not in client.get("/?done=unknown&place=x", headers=login()).text


# Failed jobs.


def test_failed_jobs_are_read_with_message_attempt_and_error(app: Flowkit, redis: Redis) -> None:
    trace = (
        'Traceback (most recent call last):\n  File "shop.py", line 7, in bill\n    raise X\nValueError: no\nmoney\n'
    )
    put_failed(redis, app, offset=41, error=trace, attempt=5)
    put_failed(redis, app, offset=50, count=3)
    found = failed_jobs(redis, ["default"], 0, 10)
    assert (found.total, found.foreign) == (2, 0)
    many, one = sorted(found.jobs, key=lambda job: job.messages, reverse=True)
    assert (one.place, one.messages, one.attempt, one.queue) == ("orders[2]@41", 1, 5, "default")
    assert (one.app, one.topic) == ("shop:app", "orders")
    assert (one.error, one.traceback) == ("ValueError: no", trace.strip())
    assert (many.place, many.messages, many.attempt) == ("orders[2]@50 to [2]@52", 3, 1)
    assert failed_job(redis, "default", one.id) == one


def test_failed_jobs_come_in_pages_over_all_queues(app: Flowkit, redis: Redis) -> None:
    for offset in range(5):
        put_failed(redis, app, offset)
    pages = [failed_jobs(redis, ["default", "other"], start, 2) for start in (0, 2, 4, 6)]
    assert [len(page.jobs) for page in pages] == [2, 2, 1, 0]
    assert {page.total for page in pages} == {5}
    assert len({job.id for page in pages for job in page.jobs}) == 5


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("field", ["data", "meta"])
def test_what_others_wrote_into_redis_is_never_run_and_left_alone(
    app: Flowkit, redis: Redis, tmp_path: Path, field: str
) -> None:
    job = put_failed(redis, app)
    mark = tmp_path / "run"
    redis.hset(f"rq:job:{job}", field, pickle.dumps(Evil(mark)))
    found = failed_jobs(redis, ["default"], 0, 10)
    assert (found.jobs, found.foreign, found.total) == ([], 1, 1)
    client = client_of(app)
    page = client.get("/", headers=login()).text
    assert "1 more failed job in these queues\n    is not flowkit’s, and left alone" in page
    answer = client.get(f"/delete?queue=default&job={job}", headers=login())
    assert answer.headers["Location"].startswith("/?done=gone")
    assert redis.exists(f"rq:job:{job}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"data": b"no pickle"},
        {"data": pickle.dumps(("flowkit.jobs.perform", None, ("[]",), {}))},
        {"data": pickle.dumps(("flowkit.jobs.perform", None, ('{"app": "a", "topic": "t", "messages": []}',), {}))},
        {"data": pickle.dumps(("os.system", None, ("true",), {}))},
        {"meta": b"\xff"},
        {"ended_at": b"0001-01-01T00:00:00+23:00"},
    ],
)
def test_rubbish_in_redis_does_not_break_the_page(app: Flowkit, redis: Redis, fields: dict[str, bytes]) -> None:
    job = put_failed(redis, app)
    redis.hset(f"rq:job:{job}", mapping=fields)
    redis.hset("rq:worker:odd", mapping={"queues": "default", "birth": "x", "successful_job_count": "many"})
    redis.hset("rq:worker:old", mapping={"queues": "default", "birth": "0001-01-01T00:00:00+23:00"})
    redis.hset("rq:worker:busy", mapping={"queues": "default", "failed_job_count": "9" * 5000})
    redis.sadd("rq:workers", "rq:worker:odd", "rq:worker:old", "rq:worker:busy")
    redis.zadd("rq:failed:default", {"vanished": 1, b"\xff<i>": 2})
    answer = client_of(app).get("/", headers=login())
    assert answer.status_code == 200
    assert "3 more failed jobs" in answer.text


def test_retry_puts_a_job_back_and_delete_takes_it_away_but_only_while_it_has_failed(
    app: Flowkit, redis: Redis
) -> None:
    first, second = [failed_job(redis, "default", put_failed(redis, app, offset)) for offset in (1, 2)]
    retry(redis, first)
    assert redis.lrange("rq:queue:default", 0, -1) == [first.id.encode()]
    for action in (retry, delete):
        with pytest.raises(Gone):
            action(redis, first)
    assert OwnJob.fetch(first.id, connection=redis, serializer=Envelope).get_status() == "queued"

    delete(redis, second)
    assert not redis.exists(f"rq:job:{second.id}", f"rq:results:{second.id}")
    for action in (retry, delete):
        with pytest.raises(Gone):
            action(redis, second)
    assert redis.lrange("rq:queue:default", 0, -1) == [first.id.encode()]


def test_a_job_stays_among_the_failed_ones_where_redis_goes_away_while_it_is_put_back(
    app: Flowkit, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = failed_job(redis, "default", put_failed(redis, app))

    def gone(*_: object, **__: object) -> None:
        raise RedisConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "execute", gone)
        with pytest.raises(RedisUnavailable):
            retry(redis, job)
    assert redis.llen("rq:queue:default") == 0
    assert failed_jobs(redis, ["default"], 0, 10).total == 1


def test_a_job_is_put_back_once_however_many_want_it(app: Flowkit, redis: Redis) -> None:
    job = failed_job(redis, "default", put_failed(redis, app))
    gone = []

    def put_back() -> None:
        try:
            retry(redis, job)
        except Gone:
            gone.append(job.id)

    threads = [threading.Thread(target=put_back) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert redis.lrange("rq:queue:default", 0, -1) == [job.id.encode()]
    assert len(gone) == 7


@pytest.mark.parametrize("page", ["2", "0", "-5", "x", "9" * 30])
def test_any_number_of_a_page_is_answered(app: Flowkit, redis: Redis, page: str) -> None:
    put_failed(redis, app)
    text = client_of(app).get(f"/?page={page}", headers=login()).text
    assert "Redis answers" in text
    assert "orders[2]@0" in text or "None on this page." in text


def test_the_page_says_when_somebody_else_was_faster(app: Flowkit, redis: Redis) -> None:
    job = put_failed(redis, app)
    client = client_of(app)
    form = {"queue": "default", "job": job, "token": token_of(client)}
    answers = [client.post("/retry", data=form, headers=login(), follow_redirects=True).text for _ in range(2)]
    assert "orders[2]@0 is back in its queue." in answers[0]
    assert "somebody else was faster. Nothing was changed." in answers[1]
    elsewhere = client.post("/retry", data={**form, "queue": "other"}, headers=login(), follow_redirects=True)
    assert "somebody else was faster" in elsewhere.text


@pytest.mark.parametrize(
    ("trace", "error"),
    [
        ("", "RQ kept no error of this job"),
        (
            "Work-horse terminated unexpectedly; waitpid returned 9",
            "Work-horse terminated unexpectedly; waitpid returned 9",
        ),
        (
            'T:\n  File "a", line 1\n    x\n    ^\nKeyError: 1\n\nDuring\n\nT:\n  File "b", line 2\n    y\nE: two',
            "E: two",
        ),
        ('T:\n  File "a", line 1, in f\n    x\nm.Error: first\n  second', "m.Error: first"),
    ],
)
def test_the_error_at_the_end_of_a_traceback(trace: str, error: str) -> None:
    assert error_of(trace) == error


def test_workers_of_other_queues_and_dead_ones_are_not_shown(redis: Redis) -> None:
    for name, fields in {
        "a": {"queues": "default,other", "hostname": "h", "pid": "1", "successful_job_count": "12"},
        "b": {"queues": "other"},
        "c": {"queues": "default", "death": "2026-01-01T00:00:00.000000Z"},
        "d": {},
    }.items():
        redis.sadd("rq:workers", f"rq:worker:{name}")
        if fields:
            redis.hset(f"rq:worker:{name}", mapping=fields)
    (found,) = workers(redis, ["default"])
    assert (found.name, found.queues, found.host, found.pid, found.done, found.job) == (
        "a",
        ("default",),
        "h",
        "1",
        12,
        None,
    )


# Servers that are away.


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for connection in held:
        connection.close()


def get(address: str) -> str:
    with urlopen(Request(address, headers=login()), timeout=20) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def address_of(process: Process) -> str:
    process.wait_for(" is shown at ")
    return re.findall(r"is shown at (\S+)", process.output)[0]


def test_when_kafka_is_away_the_page_says_so_and_shows_the_rest(
    app: Flowkit, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> None:
    put_failed(redis, app)
    with web(tmp_path, "--port", "0", FLOWKIT_REDIS=redis_url) as process:
        address = address_of(process)
        wait_for(lambda: "no Kafka broker answers at 127.0.0.1:1" in get(address), 30, "the word")
        page = get(address)
        assert "Kafka is away" in page
        assert "Redis answers" in page
        assert "shop_orders" not in page  # what is not known is not shown
        assert process.stop() == 0


def test_a_topic_that_does_not_exist_and_a_lag_that_is_not_known(app: Flowkit) -> None:
    rows = [Lag("shop_orders", "orders", None, None, None, None), Lag("shop_b", "b", 0, 1, None, None)]
    page = make_pages(app, Access(PASSWORD), lambda: rows).test_client().get("/", headers=login()).text
    assert "does not exist on the brokers" in page
    assert page.count("not known") == 2


def test_when_redis_is_away_or_comes_back_the_page_says_so(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        client = client_of(make_app(server.url))
        token = "x"
        assert "Redis answers" in client.get("/", headers=login()).text
        server.stop()
        page = client.get("/", headers=login())
        assert page.status_code == 200
        assert "Redis is away" in page.text
        assert "Redis does not answer" in page.text
        assert client.get("/flow.svg", headers=login()).status_code == 200
        answer = client.get("/delete?queue=default&job=x", headers=login())
        assert (answer.status_code, "Redis does not answer" in answer.text) == (503, True)
        assert client.post("/retry", data={"token": token}, headers=login()).status_code == 403
        server.start()
        assert "Redis answers" in client.get("/", headers=login()).text


def test_servers_that_never_answer_do_not_hold_up_the_page(silent: int, tmp_path: Path) -> None:
    where = {"FLOWKIT_KAFKA_HOSTS": f"127.0.0.1:{silent}", "FLOWKIT_REDIS": f"redis://127.0.0.1:{silent}/0"}
    with web(tmp_path, "--port", "0", **where) as process:
        address = address_of(process)
        for _ in range(2):
            began = time.monotonic()
            page = get(address)
            assert time.monotonic() - began < 8
            assert "Kafka is away" in page
            assert "Redis is away" in page
        assert process.stop() == 0


def test_an_application_that_queues_nothing_needs_no_redis() -> None:
    app = make_app(None, inline=True)
    page = client_of(app).get("/", headers=login()).text
    assert "Consumer groups" in page
    assert "Redis" not in page
    assert 'id="failed"' not in page


class Question:
    """Counts how often it is asked; answers, waits or fails as told."""

    def __init__(self) -> None:
        self.asked = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self) -> int:
        self.asked += 1
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return self.asked


def test_an_answer_is_kept_for_a_while() -> None:
    question = Question()
    recent = Recent(question, keep=60)
    assert [recent.look().value for _ in range(3)] == [1, 1, 1]
    assert question.asked == 1
    assert [Recent(question, keep=0).look().value for _ in range(2)] == [2, 3]


def test_a_slow_question_is_asked_once_at_a_time_and_holds_up_nobody(wait_for: WaitFor) -> None:
    question = Question()
    question.gate.clear()
    recent = Recent(question, keep=0, patience=0.05)
    for _ in range(3):
        answer = recent.look()
        assert answer.value is None
        assert answer.problem == "no answer within 0.05 s"
    assert question.asked == 1
    question.gate.set()
    wait_for(lambda: recent.look().problem is None, 10, "the answer")


def test_after_a_failure_the_last_answer_is_still_there(caplog: pytest.LogCaptureFixture, wait_for: WaitFor) -> None:
    question = Question()
    recent = Recent(question, keep=0)
    assert recent.look().value == 1
    question.error = BrokerUnavailable("no broker")
    answer = recent.look()
    assert (answer.value, answer.problem) == (1, "no broker")
    question.error = ZeroDivisionError("x")
    wait_for(lambda: "ZeroDivisionError; the log" in (recent.look().problem or ""), 10, "the other failure")
    assert "the web page could not look" in caplog.text
    question.error = None
    wait_for(lambda: recent.look().problem is None, 10, "the end of it")


def test_redis_errors_come_as_our_own() -> None:
    connection = Redis(port=1, retry=Retry(NoBackoff(), 0))
    for ask in (lambda: failed_jobs(connection, ["default"], 0, 1), lambda: workers(connection, ["default"])):
        with pytest.raises(RedisUnavailable):
            ask()


def test_numbers_and_times_are_written_for_people() -> None:
    from datetime import UTC, datetime, timedelta

    assert [number(value) for value in (None, 0, 1234567)] == ["–", "0", "1\u202f234\u202f567"]
    now = datetime.now(UTC)
    told = [ago(now - timedelta(seconds=s)) for s in (3, 125, 7300, 200_000)]
    assert told == ["3 s ago", "2 min ago", "2 h ago", "2 d ago"]
    assert ago(None) == ""


# The command.


@pytest.mark.parametrize("variables", [{}, {"FLOWKIT_WEB_PASSWORD": ""}])
def test_without_a_password_the_command_ends_with_advice(variables: dict[str, str]) -> None:
    done = flowkit("web", "hello:app", env=variables)
    assert done.code == 2
    assert "the web page needs a password: set FLOWKIT_WEB_PASSWORD" in done.err
    assert flowkit("web", "hello:app", "--password", "").code == 2


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    (tmp_path / "flask.py").write_text("raise ModuleNotFoundError('No module named flask', name='flask')\n")
    done = flowkit("web", "hello:app", "--password", "x", env={"PYTHONPATH": str(tmp_path)})
    assert (done.code, done.err) == (
        2,
        "flowkit: flowkit web needs the package flask: pip install 'flowkit-kafka[web]'\n",
    )


def web(tmp_path: Path, *options: str, **env: str) -> Process:
    servers = {"FLOWKIT_KAFKA_HOSTS": NOBODY, "FLOWKIT_REDIS": f"redis://{NOBODY}/0"}
    variables = {**servers, "FLOWKIT_WEB_PASSWORD": PASSWORD, **env}
    return Process("flowkit", "web", "hello:app", *options, env=variables, log=tmp_path / "web.log")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0(tmp_path: Path, number: signal.Signals) -> None:
    with web(tmp_path, "--port", "0") as process:
        process.wait_for("is shown at http://127.0.0.1:")
        process.signal(number)
        assert process.wait(10) == 0
        assert "Traceback" not in process.output
        assert "WARNING" not in process.output
        assert PASSWORD not in process.output


def test_a_port_that_is_taken_is_refused_with_advice(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with web(tmp_path, "--port", port) as process:
            assert process.wait() == 2
        assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in process.output
        assert "--port" in process.output


def test_listening_for_other_machines_is_warned_of(tmp_path: Path) -> None:
    with web(tmp_path, "--host", "0.0.0.0", "--port", "0") as process:
        process.wait_for("is shown at http://")
        assert "listens on 0.0.0.0 without TLS" in process.output
        [port] = re.findall(r"http://0.0.0.0:(\d+)/", process.output)
        # a proxy in front of it says that it does TLS
        for headers, warned in ((login(), True), ({**login(), "X-Forwarded-Proto": "https"}, False)):
            with urlopen(Request(f"http://127.0.0.1:{port}/", headers=headers), timeout=20) as answer:
                assert ("Not private." in answer.read().decode()) is warned
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("box", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
