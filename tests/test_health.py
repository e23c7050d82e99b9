"""What systemd and probes are told: by the parts alone, and by real commands on a real broker and Redis."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import NOBODY, flowkit
from processes import Process
from redis import Redis
from servers import ApacheKafka, Kafka, MakeTopic, WaitFor, why_not_apache_kafka

from flowkit import Flowkit
from flowkit.devstack import HOST, free_port
from flowkit.errors import ConfigurationError, Displaced
from flowkit.health import PATIENCE, TOUCH_EVERY, Doors, Health, Part
from flowkit.server import Server
from flowkit.settings import address

READY = Part("group a", "has 4 partitions", ready=True)
JOINING = Part("group b", "has not been given its partitions yet")
STUCK = Part("group c", "has not turned for 312 s", alive=False)


class Manager:
    """The end of NOTIFY_SOCKET that systemd has: collects what it is told, one word a line."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.told: list[str] = []

    def read(self, timeout: float = 0.01) -> list[str]:
        """What came since the last call; waits for it up to ``timeout`` seconds."""
        self.socket.settimeout(timeout)
        new: list[str] = []
        with contextlib.suppress(TimeoutError):
            while True:
                new += self.socket.recv(4096).decode().splitlines()
                self.socket.settimeout(0.001)
        self.told += new
        return new

    def heard(self, word: str) -> bool:
        self.read()
        return word in self.told


@pytest.fixture(params=["/path", "@abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    kind = request.param
    made = Manager(f"@flowkit-{os.getpid()}-{time.monotonic_ns()}" if kind[0] == "@" else str(tmp_path / "notify"))
    yield made
    made.socket.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def parts(self) -> str:
        return " ".join(f"{part['name']} {part['state']}" for part in self.body["parts"])


def ask(port: int, path: str, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        text = answer.read()
        assert int(answer.headers["Content-Length"]) == len(text) or method == "HEAD"
        return Answer(answer.status, json.loads(text) if text else {})


def asked(port: int, path: str, status: int) -> Callable[[], Answer | None]:
    """For ``wait_for``: the answer, once it has this status. Nobody listens yet while a process starts."""

    def look() -> Answer | None:
        with contextlib.suppress(ConnectionRefusedError):
            answer = ask(port, path)
            return answer if answer.status == status else None
        return None

    return look


# What the parts mean together.


@pytest.mark.parametrize(
    ("health", "alive", "ready", "status"),
    [
        (Health(()), True, False, "waiting"),
        (Health((READY,)), True, True, "ready: group a has 4 partitions"),
        (Health((READY, JOINING)), True, False, "waiting: group b has not been given its partitions yet"),
        (Health((READY, JOINING, STUCK)), False, False, "stuck: group c has not turned for 312 s"),
        (Health((READY, STUCK), stopping=True), True, False, "stopping"),
    ],
)
def test_a_process_is_as_its_parts_are(health: Health, alive: bool, ready: bool, status: str) -> None:
    assert (health.alive, health.ready, health.status) == (alive, ready, status)


def test_a_status_stays_one_short_line() -> None:
    assert len(Health((READY,) * 50).status) == 200


# systemd.


def test_systemd_is_told_once_what_has_changed(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    now = [Health((JOINING,))]
    calls: list[str] = []
    with Doors(lambda: now[0], on_ready=lambda: calls.append("ready")) as doors:
        doors.look()
        doors.look()
        assert manager.read() == [f"STATUS={now[0].status}"]

        now[0] = Health((READY,))
        doors.look()
        doors.look()
        assert manager.read() == ["READY=1", f"STATUS={now[0].status}"]

        now[0] = Health((JOINING,))
        doors.look()
        now[0] = Health((READY,), stopping=True)
        doors.look()
        doors.look()
        assert manager.read() == [f"STATUS={Health((JOINING,)).status}", "STOPPING=1", "STATUS=stopping"]
    assert calls == ["ready"]


def test_signs_of_life_come_twice_in_the_time_and_only_from_the_living(
    systemd: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    clock = [100.0]
    monkeypatch.setattr("flowkit.health.time.monotonic", lambda: clock[0])
    now = [Health((READY,))]
    with Doors(lambda: now[0]) as doors:
        signs = []
        for _ in range(40):
            doors.look()
            signs += [clock[0] for word in systemd.read() if word == "WATCHDOG=1"]
            clock[0] += 1
        assert signs == [100, 110, 120, 130]

        now[0] = Health((STUCK,))
        for _ in range(40):
            doors.look()
            clock[0] += 1
        assert "WATCHDOG=1" not in systemd.read()


@pytest.mark.parametrize("variables", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_no_signs_of_life_are_sent_for_another_process(
    systemd: Manager, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "1000000", **variables}.items():
        monkeypatch.setenv(name, value)
    with Doors(lambda: Health((READY,))) as doors:
        doors.look()

    assert "WATCHDOG=1" not in systemd.read()
    assert "READY=1" in systemd.told


def test_a_socket_that_is_gone_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    now = [Health((JOINING,))]
    with Doors(lambda: now[0]) as doors:
        doors.look()
        now[0] = Health((READY,))
        doors.look()

    assert [record.getMessage() for record in caplog.records if "NOTIFY_SOCKET" in record.getMessage()] == [
        f"systemd could not be told 'STATUS={Health((JOINING,)).status}' at NOTIFY_SOCKET: [Errno 2] No such file or"
        " directory"
    ]


# Probes.


@pytest.fixture
def doors() -> Iterator[Doors]:
    """Doors that are looked through all the time, as by the loop of a server. ``doors.now`` is what they tell."""

    class Open(Doors):
        now = Health((READY, JOINING))

    made = Open(lambda: made.now, f"{HOST}:0")
    over = threading.Event()

    def turn() -> None:
        while not over.wait(0.01):
            made.look()

    thread = threading.Thread(target=turn)
    with made:
        thread.start()
        yield made
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("health", "live", "ready"),
    [
        (Health((READY,)), 200, 200),
        (Health((READY, JOINING)), 200, 503),
        (Health((READY, STUCK)), 503, 503),
        (Health((READY,), stopping=True), 200, 503),
    ],
)
def test_probes_get_200_or_503_and_the_reason(doors: Any, health: Health, live: int, ready: int) -> None:
    doors.now = health

    assert ask(doors.port, "/healthz").status == live
    answer = ask(doors.port, "/readyz?verbose=1")
    assert answer.status == ready
    assert answer.body == {
        "alive": health.alive,
        "ready": health.ready,
        "status": health.status,
        "parts": [{"name": p.name, "state": p.state, "ready": p.ready, "alive": p.alive} for p in health.parts],
    }
    assert ask(doors.port, "/healthz", "HEAD") == (live, {})


def test_other_questions_get_an_answer_too(doors: Doors) -> None:
    assert ask(doors.port, "/") == (404, {"error": "there is nothing here but /healthz and /readyz"})
    with socket.create_connection((HOST, doors.port)) as connection:
        connection.sendall(b"what?\r\n\r\n")
        assert b" 400 " in connection.recv(4096)
    with socket.create_connection((HOST, doors.port)) as connection:
        connection.sendall(b"POST /healthz HTTP/1.1\r\n\r\n")
        assert b" 501 " in connection.recv(4096)


def test_who_asks_slowly_or_goes_holds_nobody_up() -> None:
    with Doors(lambda: Health((READY,)), f"{HOST}:0") as doors:
        silent = [socket.create_connection((HOST, doors.port)) for _ in range(3)]
        gone = socket.create_connection((HOST, doors.port))
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
        gone.close()
        asking = socket.create_connection((HOST, doors.port))
        asking.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        began = time.monotonic()
        doors.look()
        took = time.monotonic() - began

        assert b" 200 " in asking.recv(4096)
        assert took < 3 * PATIENCE + 1
        for connection in [*silent, asking]:
            connection.close()


def test_a_port_in_use_is_refused_at_start() -> None:
    with socket.create_server((HOST, 0)) as taken:
        where = f"{HOST}:{taken.getsockname()[1]}"
        with pytest.raises(
            ConfigurationError, match=f"health: the port of the probes, {where}, cannot be used: .*in use"
        ):
            Doors(lambda: Health(()), where)


@pytest.mark.parametrize(
    ("options", "picked", "error", "called"),
    [
        ({"kafka": {"hosts": NOBODY}}, (), "health: the port of the probes", ["startup", "shutdown"]),
        ({"kafka": {"hosts": NOBODY}}, ("ordres",), "did you mean 'orders'", ["startup", "shutdown"]),
        ({}, (), "kafka.hosts: is required", []),
    ],
    ids=["the port", "a topic", "the settings"],
)
def test_a_server_that_is_refused_shuts_the_application_down_if_it_had_started(
    options: dict[str, Any], picked: tuple[str, ...], error: str, called: list[str]
) -> None:
    with socket.create_server((HOST, 0)) as taken:
        app = Flowkit("refused", inline=True, health=f"{HOST}:{taken.getsockname()[1]}", **options)
        app.topic("orders")(lambda order: None)
        seen: list[str] = []
        app.on_startup(lambda: seen.append("startup"))
        app.on_shutdown(lambda: seen.append("shutdown"))
        with pytest.raises(ConfigurationError, match=error):
            Server(app, topics=picked).run()
    assert seen == called


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (8080, ":8080"),
        ("8080", ":8080"),
        (" 127.0.0.1:08080 ", "127.0.0.1:8080"),
        ("[::1]:8080", "[::1]:8080"),
        ("localhost:0", "localhost:0"),
        ("", None),
    ],
)
def test_the_setting_is_a_port_or_an_address(given: Any, meant: str | None) -> None:
    assert address(given) == meant


@pytest.mark.parametrize(
    "given", ["http://localhost:80", "::1:80", "localhost", 65536, True, 1.5, "a b:1", None, "-1"]
)
def test_other_settings_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected a port, or host:port"):
        address(given)


def test_a_port_alone_is_that_of_all_interfaces() -> None:
    everywhere = Doors(lambda: Health((READY,)), ":0")
    hosts = [HOST, "::1"] if socket.has_dualstack_ipv6() else [HOST]
    for host in hosts:
        with socket.create_connection((host, everywhere.port)) as connection:
            connection.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
            everywhere.look()
            assert b" 200 " in connection.recv(4096)
    everywhere.leave()


# `flowkit run` and `flowkit worker`.


class Steady:
    """The application ``steady`` with a topic of its own, a port for probes and a service manager."""

    def __init__(self, kafka: Kafka, topic: str, systemd: Manager, directory: Path) -> None:
        self.topic = topic
        self.port = free_port()
        self.systemd = systemd
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
            "STEADY_IN": topic,
            "FLOWKIT_HEALTH": f"{HOST}:{self.port}",
            "NOTIFY_SOCKET": systemd.address,
            "WATCHDOG_USEC": "500000",
        }
        self.log = directory / "log"

    def send(self, word: str) -> None:
        assert flowkit("send", "steady:app", self.topic, json.dumps(word), env=self.env).code == 0

    def run(self, **env: str) -> Process:
        return Process("flowkit", "run", "steady:app", env={**self.env, **env}, log=self.log)


@pytest.fixture
def steady(kafka: Kafka, topic: MakeTopic, systemd: Manager, tmp_path: Path) -> Steady:
    return Steady(kafka, topic("steady"), systemd, tmp_path)


def test_a_server_is_ready_when_it_has_its_partitions_and_says_when_it_stops(
    steady: Steady, wait_for: WaitFor
) -> None:
    with steady.run() as process:
        wait_for(lambda: steady.systemd.heard("READY=1"), what="READY=1")
        assert f"STATUS=ready: group {steady.topic} has 1 partition" in steady.systemd.told
        assert steady.systemd.told[0] == (
            f"STATUS=waiting: group {steady.topic} has not been given its partitions yet"
        )
        before = steady.systemd.told.count("WATCHDOG=1")
        wait_for(lambda: steady.systemd.read() or steady.systemd.told.count("WATCHDOG=1") >= before + 3)
        assert ask(steady.port, "/readyz").status == 200
        assert process.stop() == 0
        steady.systemd.read()

    assert steady.systemd.told.count("READY=1") == 1
    assert steady.systemd.told.count("STOPPING=1") == 1
    assert steady.systemd.told.index("STOPPING=1") > steady.systemd.told.index("READY=1")


def test_a_server_without_a_broker_lives_and_is_not_ready(steady: Steady, wait_for: WaitFor) -> None:
    with steady.run(FLOWKIT_KAFKA_HOSTS="127.0.0.1:1"):
        answer = wait_for(asked(steady.port, "/readyz", 503))
        assert ask(steady.port, "/healthz").status == 200
        assert answer.parts == f"group {steady.topic} has not been given its partitions yet"
        wait_for(lambda: steady.systemd.heard("WATCHDOG=1"))
    assert "READY=1" not in steady.systemd.told


def test_a_server_whose_broker_goes_lives_and_is_ready_again_when_it_comes_back(
    steady: Steady, tmp_path: Path, wait_for: WaitFor
) -> None:
    if reason := why_not_apache_kafka():
        pytest.skip(reason)
    with ApacheKafka(tmp_path / "kafka") as node:
        node.create_topic(steady.topic)
        with steady.run(FLOWKIT_KAFKA_HOSTS=node.hosts) as process:
            wait_for(asked(steady.port, "/readyz", 200))
            node.kill()
            answer = wait_for(asked(steady.port, "/readyz", 503))
            assert answer.parts == f"group {steady.topic} has lost touch with its broker"
            assert ask(steady.port, "/healthz").status == 200
            node.start()
            wait_for(asked(steady.port, "/readyz", 200))
            assert process.stop() == 0


def test_a_server_that_waits_for_partitions_of_others_is_ready(
    kafka: Kafka, steady: Steady, wait_for: WaitFor
) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker has no rebalances to be relied on")
    other = free_port()
    with steady.run() as first, steady.run(FLOWKIT_HEALTH=f"{HOST}:{other}") as second:
        one = [f"group {steady.topic} has {count} partition{s}" for count, s in ((1, ""), (0, "s"))]
        found = wait_for(
            lambda: (
                (a := asked(steady.port, "/readyz", 200)())
                and (b := asked(other, "/readyz", 200)())
                and {a.parts, b.parts} == set(one)
            ),
            what="one that has the partition and one that has none, both ready",
        )
        assert found
        assert (first.stop(), second.stop()) == (0, 0)


def test_a_stuck_handler_ends_the_signs_of_life(steady: Steady, tmp_path: Path, wait_for: WaitFor) -> None:
    file = tmp_path / "health"
    with steady.run(FLOWKIT_STUCK_AFTER="2", FLOWKIT_HEALTH_FILE=str(file)) as process:
        wait_for(lambda: steady.systemd.heard("WATCHDOG=1") and steady.systemd.heard("READY=1"))
        steady.send("stuck")
        process.wait_for("got stuck")
        wait_for(
            lambda: any(word.startswith("STATUS=stuck: ") for word in steady.systemd.read()), what="STATUS=stuck"
        )
        steady.systemd.read(0.3)  # what was on its way
        answer = ask(steady.port, "/healthz")
        assert answer.status == 503
        assert answer.parts.startswith(f"group {steady.topic} has not turned for ")
        written = file.stat().st_mtime_ns
        until = time.monotonic() + TOUCH_EVERY + 0.5
        while time.monotonic() < until:  # twice and more the watchdog's time
            assert "WATCHDOG=1" not in steady.systemd.read(0.1)
        assert file.stat().st_mtime_ns == written
        # Its log has the place, among those of all threads, once
        [_, told] = process.output.split(
            "longer than stuck_after (2 s): from now on this process says that it is dead"
        )
        assert f"[flowkit-{steady.topic}]" in told
        assert "in note" in told
        assert "[MainThread]" in told
        assert "[kafka-io-" in told
        # And a stop is bounded by shutdown_timeout
        assert process.stop() == 1
        assert "did not end within shutdown_timeout (2 s)" in process.output


# The file.


def test_the_file_is_written_anew_while_all_is_well_and_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "health"
    health = [Health((JOINING,))]
    with Doors(lambda: health[0], file=str(path)) as doors:
        assert path.read_text() == "waiting\n"
        health[0] = Health((READY,))
        doors.look()
        assert path.read_text() == "ready\n"
        written = path.stat().st_mtime_ns
        doors.look()
        assert path.stat().st_mtime_ns == written  # it is not due
        assert doors._file is not None
        doors._file._due = 0.0
        path.unlink()  # by who tidies up
        doors.look()
        assert path.read_text() == "ready\n"
        os.utime(path, (0, 0))
        doors._file._due = 0.0
        health[0] = Health((STUCK,))
        doors.look()
        assert path.stat().st_mtime == 0
        health[0] = Health((STUCK,), stopping=True)
        doors.look()
        assert path.read_text() == "stopping\n"
        doors.leave()
        assert path.exists()  # a forked child leaves it
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_refused_at_start_and_the_port_is_free_again(tmp_path: Path) -> None:
    address = f"{HOST}:{free_port()}"
    with pytest.raises(ConfigurationError, match=r"health_file: .*/nowhere/health cannot be written: No such file"):
        Doors(lambda: Health(()), address, file=str(tmp_path / "nowhere" / "health"))
    Doors(lambda: Health(()), address).leave()


def test_a_file_that_cannot_be_written_any_more_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    with Doors(lambda: Health((READY,)), file=str(directory / "health")) as doors:
        assert doors._file is not None
        shutil.rmtree(directory)
        for _ in range(3):
            doors._file._due = 0.0
            doors.look()
        directory.mkdir()
        doors.look()
    assert caplog.text.count("cannot be written") == 1


def test_the_probes_of_the_documentation_look_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "health"
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    alive, ready = (json.loads(found) for found in re.findall(r"command: (\[.*/tmp/health.*\])", text))
    assert f"CMD {alive[-1]}\n" in text  # that of Docker

    def code(probe: list[str]) -> int:
        words = [word.replace("/tmp/health", str(path)) for word in probe]
        return subprocess.run(words, capture_output=True).returncode

    assert (code(alive), code(ready)) == (1, 1)
    path.write_text("waiting\n")
    assert (code(alive), code(ready)) == (0, 1)
    path.write_text("ready\n")
    assert (code(alive), code(ready)) == (0, 0)
    os.utime(path, (time.time() - 90, time.time() - 90))
    assert (code(alive), code(ready)) == (1, 1)


def test_run_and_worker_keep_their_files(working: Steady, tmp_path: Path, wait_for: WaitFor) -> None:
    run, work = tmp_path / "run", tmp_path / "worker"
    with (
        working.run(FLOWKIT_HEALTH_FILE=str(run), FLOWKIT_HEALTH="") as first,
        Process(
            "flowkit",
            "worker",
            "steady:app",
            env={**working.env, "FLOWKIT_HEALTH_FILE": str(work)},
            log=tmp_path / "log of the worker",
        ) as second,
    ):
        for path in (run, work):
            wait_for(
                lambda path=path: path.exists() and path.read_text() == "ready\n", what=f"{path} that says ready"
            )
            written = path.stat().st_mtime_ns
            wait_for(lambda path=path, written=written: path.stat().st_mtime_ns > written, what=f"a new {path}")
        os.kill(second.children()[0], signal.SIGKILL)  # a child's end is not that of the file
        wait_for(lambda: "a new one starts" in second.output)
        wait_for(lambda: work.read_text() == "ready\n")
        assert (first.stop(), second.stop()) == (0, 0)
    assert not run.exists()
    assert not work.exists()


# The exit code, when a group ends by itself.


class Dies:
    """A client that does something at its first poll."""

    def __init__(self, does: Callable[[], None]) -> None:
        self.does = does

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def missing_topics(self, topics: Any) -> list[str]:
        return []

    def poll(self, timeout: float, most: int) -> Any:
        self.does()
        return {}


def fails(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(0), 1),
        (KeyboardInterrupt(), 1),
        (MemoryError(), None),
        (Displaced("somebody has its place"), 1),
        (ConfigurationError("the topic is forbidden"), ConfigurationError),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, BaseException) else "",
)
def test_a_group_that_ends_by_itself_ends_the_process_with_a_failure(error: BaseException, code: Any) -> None:
    app = Flowkit("dies", inline=True, kafka={"hosts": NOBODY})
    app.topic("orders")(lambda order: None)
    app.topic("bills")(lambda bill: None)
    made: list[str] = []

    def make(settings: Any, group: str) -> Any:
        made.append(group)
        first = group == "dies_orders" and made.count(group) == 1
        return Dies(fails(error) if first else lambda: time.sleep(0.01))

    server = Server(app, make)
    if code is None:  # an error that another client may not have: it goes on

        def stop() -> None:
            deadline = time.monotonic() + 60
            while made.count("dies_orders") < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            server.stop()

        threading.Thread(target=stop).start()
        assert server.run() == 0
        assert made.count("dies_orders") == 2
    elif isinstance(code, int):
        assert server.run() == code
    else:
        with pytest.raises(code, match="the topic is forbidden"):
            server.run()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flowkit-dies_")]


@pytest.fixture
def working(steady: Steady, redis: Redis, redis_url: str) -> Steady:
    steady.env.update(FLOWKIT_REDIS=redis_url, STEADY_INLINE="0")
    return steady


def test_workers_are_ready_when_they_wait_for_jobs_and_live_when_one_is_killed(
    working: Steady, wait_for: WaitFor
) -> None:
    queues = ("--queues", "default,express")
    with Process("flowkit", "worker", "steady:app", *queues, env=working.env, log=working.log) as process:
        wait_for(lambda: working.systemd.heard("READY=1"), what="READY=1")
        answer = ask(working.port, "/readyz")
        assert answer.status == 200
        assert {part["name"].split()[-1] for part in answer.body["parts"]} == {"default", "express"}
        wait_for(lambda: working.systemd.heard("WATCHDOG=1"))

        os.kill(process.children()[0], signal.SIGKILL)
        answer = wait_for(asked(working.port, "/readyz", 503))
        assert "has ended 1 times, and starts again" in answer.parts
        assert ask(working.port, "/healthz").status == 200
        wait_for(asked(working.port, "/readyz", 200))

        assert process.stop() == 0
        working.systemd.read()
    assert "STOPPING=1" in working.systemd.told
    with socket.create_server((HOST, working.port)):
        pass  # no process that was forked has kept the port


def test_a_worker_process_that_stands_still_is_no_longer_alive(working: Steady, wait_for: WaitFor) -> None:
    quick = "from flowkit import cli, worker, workers; workers.STUCK = 3.0; worker.IDLE = 16; cli.main()"
    command = (sys.executable, "-c", quick, "worker", "steady:app")
    with Process(*command, env=working.env, log=working.log) as process:
        wait_for(asked(working.port, "/readyz", 200))
        child = process.children()[0]
        os.kill(child, signal.SIGSTOP)
        answer = wait_for(asked(working.port, "/healthz", 503))
        assert answer.parts.startswith(f"the worker {child} of queue default has given no sign of life for ")
        working.systemd.read(0.3)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert "WATCHDOG=1" not in working.systemd.read(0.1)
        os.kill(child, signal.SIGCONT)
        wait_for(asked(working.port, "/healthz", 200))
        assert process.stop() == 0


def test_a_command_says_that_its_port_is_in_use(steady: Steady) -> None:
    with socket.create_server((HOST, steady.port)):
        done = flowkit("run", "steady:app", env=steady.env)

    assert done.code == 2
    assert f"the port of the probes, {HOST}:{steady.port}, cannot be used" in done.err
