"""Karafka CLI: help, console, flow, info, routes, server, worker; beside them topics, lag and what a shell completes.

``install`` is in ``test_installation.py``, ``--daemon`` in ``test_deployment.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pexpect
import pytest
from commands import NOBODY, Done, command, flowkit, read_topic
from processes import BIN, Process
from redis import Redis
from servers import ApacheKafka, Kafka, MakeTopic, WaitFor, why_not_apache_kafka
from test_workers import Tasks, numbered
from typer.testing import CliRunner

from flowkit.cli import cli, main
from flowkit.devstack import EmbeddedBroker

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMMANDS = ("console", "flow", "help", "info", "lag", "routes", "run", "topics", "worker")


@pytest.fixture
def tasks(
    kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor
) -> Iterator[Tasks]:
    found = Tasks(kafka.hosts, topic, redis, redis_url, tmp_path, wait_for)
    yield found
    found.consumer.close(autocommit=False)


@pytest.fixture
def apache_kafka(kafka: Kafka) -> Kafka:
    if not kafka.apache:
        pytest.skip("the embedded broker knows no settings of topics and refuses nothing, and its offsets come late")
    return kafka


@pytest.fixture
def prefix() -> str:
    """What the names of the topics of ``hello:app`` begin with in this test."""
    return f"{uuid.uuid4().hex[:8]}."


def in_pty(*arguments: str, cwd: Path = EXAMPLES, **env: str) -> pexpect.spawn[str]:
    """A command in a terminal of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLOWKIT_")}
    environment = {**inherited, "TERM": "xterm", "NO_COLOR": "1", **env}
    return pexpect.spawn(
        str(BIN / arguments[0]),
        list(arguments[1:]),
        cwd=str(cwd),
        env=environment,
        encoding="utf-8",
        timeout=30,
        dimensions=(50, 200),
    )


def plain(text: str) -> str:
    """What a terminal shows of a text: without colours and the like."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)


# help [COMMAND]: describe available commands or one specific command.


def test_help_describes_the_commands() -> None:
    done = flowkit("help")
    assert done == flowkit("--help")
    for name in COMMANDS:
        assert f"\n  {name} " in done.out


def help_of(*arguments: str) -> str:
    """What is printed, without a process of its own."""
    done = CliRunner().invoke(cli, list(arguments), prog_name="flowkit")
    assert done.exit_code == 0, done
    return done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_one_command_with_an_example(name: str) -> None:
    found = help_of("help", name)
    assert found == help_of(name, "--help")
    assert f"Usage: flowkit {name} " in found
    examples = found.partition("  Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert any(example.startswith(f"    flowkit {name}") for example in examples)
    assert max(len(line) for line in found.splitlines()) <= 80


def test_help_of_what_is_no_command_names_the_nearest() -> None:
    assert flowkit("help", "rutes") == (
        2,
        "",
        "flowkit: help rutes: there is no such command; did you mean 'routes'?\n",
    )


@pytest.mark.parametrize(("short", "name"), [("r", "routes"), ("c", "console"), ("s", "run"), ("w", "worker")])
def test_the_short_names_of_the_seed_still_work(short: str, name: str) -> None:
    assert help_of(short, "--help").partition("\n")[2] == help_of(name, "--help").partition("\n")[2]
    assert f"\n  {short} " not in help_of("help")  # one name each is enough to learn


def test_the_command_is_there_at_once() -> None:
    """A third of a second is what importing half of an application would cost."""
    code = (
        "import sys; from flowkit.cli import cli;"
        "print([n for n in ('kafka', 'rq', 'redis', 'pydantic', 'IPython', 'rich', 'flowkit.app') if n in sys.modules])"
    )
    assert command(sys.executable, "-c", code).out == "[]\n"


# routes and flow.


def test_routes_are_in_the_order_of_their_names_and_in_json() -> None:
    rows = json.loads(flowkit("routes", "shop", "--json", cwd=EXAMPLES).out)
    assert [(row["topic"], row["handler"], row["inline"], row["queue"]) for row in rows] == [
        ("invoices", "pack", True, None),
        ("orders", "bill", False, "default"),
    ]


def test_flow_says_what_goes_out_always_or_sometimes_once_or_many_times() -> None:
    assert flowkit("flow", "shop:app", cwd=EXAMPLES).out == (
        "invoices => pack (inline)\n"
        "  - parcels: (always, exactly one)\n"
        "orders => bill (queue default)\n"
        "  - alerts:      (sometimes, one or more)\n"
        "  - invoices:    (always, exactly one)\n"
        "  - orders.dead: (dead letters, after 4 attempts)\n"
    )


def test_flow_draws_a_map() -> None:
    done = flowkit("flow", "shop:app", "--format", "svg", cwd=EXAMPLES)
    assert done.code == 0
    assert done.out.startswith("<svg xmlns=")
    assert ">orders.dead<" in done.out


# info.


def test_info_shows_the_environment_the_versions_and_the_topics(kafka: Kafka, prefix: str) -> None:
    kafka.create_topic(f"{prefix}greetings", 3)
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "HELLO": prefix, "FLOWKIT_ENV": "production"}
    found = json.loads(flowkit("info", "hello", "--json", env=env).out)
    assert found["environment"] == "production"
    assert found["versions"]["kafka-python"].startswith("3.")
    assert found["groups"] == [f"hello_{prefix}greetings", f"hello_{prefix}letters"]
    assert found["queues"] == [f"{prefix}post"]
    assert found["kafka"] == f"answers: {kafka.hosts}"
    assert found["redis"] == "not set; only queued routes need it"
    assert found["topics"] == {
        f"{prefix}greetings": "there, 3 partitions, replication factor 1",
        **{f"{prefix}{name}": "missing" for name in ("copies", "dead", "letters", "replies", "shouts")},
    }


# server (alias s): flowkit run.


def test_the_server_consumes_until_it_is_stopped(kafka: Kafka, topic: MakeTopic, tmp_path: Path) -> None:
    source, target = topic("in"), topic("out")
    env = {"RELAY_IN": source, "RELAY_OUT": target, "RELAY_INLINE": "1", "FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    assert flowkit("send", "relay:app", source, "42", env=env).code == 0
    with Process("flowkit", "server", "relay:app", env=env, log=tmp_path / "server.log") as server:
        assert [record.value for record in read_topic(kafka.hosts, target, 1)] == [b"42"]
        assert server.stop() == 0


# worker (alias w).


def test_a_queue_has_as_many_processes_as_asked_for_and_a_killed_one_comes_again(tasks: Tasks) -> None:
    with (
        tasks.start("flowkit", "run", "quick:app", FLOWKIT_JOB_SIZE="1"),
        tasks.start("flowkit", "worker", "quick:app", "--processes", "3", "--queues", "default,express") as worker,
    ):
        tasks.wait_for(lambda: len(worker.children()) == 6, 20, "three processes for each of two queues")
        # When each process of one queue has a message in hand, and one of them is killed
        tasks.send(*[{"n": number, "do": "wait"} for number in range(3)])
        tasks.wait_for_run(3)
        pids = {pid for _, _, pid in tasks.runs}
        assert len(pids) == 3
        assert pids <= set(worker.children())
        os.kill(tasks.runs[0][2], signal.SIGKILL)
        worker.wait_for("the worker of queue default ended with -9; a new one starts in")
        # Then it comes again, its message too, and none is lost
        tasks.redis.rpush("gate", *["open"] * 4)
        tasks.send(*numbered(10, start=3))
        assert [answer["n"] for answer in tasks.answers(13)] == list(range(13))
        tasks.wait_for(lambda: len(worker.children()) == 6, 20, "the process that was killed")
        assert worker.stop() == 0
    assert {n for n, _ in tasks.calls} == set(range(13))
    assert len(tasks.calls) == 14  # the message in the hand of the killed one was begun twice


def test_processes_are_at_least_one() -> None:
    done = flowkit("worker", "hello", "--processes", "0")
    assert done.code == 2
    assert "--processes" in done.err


@pytest.mark.parametrize("program", ["worker", "worker-pool"])
def test_rqs_own_commands_work_on_the_queues(tasks: Tasks, program: str) -> None:
    arguments = ("--url", tasks.url, "default") if program == "worker" else ("default", "--url", tasks.url, "-n", "2")
    with (
        tasks.start("flowkit", "run", "quick:app", FLOWKIT_JOB_SIZE="1"),
        tasks.start("rq", program, *arguments) as rq,
    ):
        tasks.send(*numbered(6), {"n": 6, "do": "fail", "times": 1})
        assert [answer["n"] for answer in tasks.answers(7)] == list(range(7))
        assert rq.stop() == 0
    assert tasks.calls == [(number, 1) for number in range(7)] + [(6, 2)]


# topics.


def test_topics_shows_what_is_missing_and_makes_it_as_declared(
    apache_kafka: Kafka, tmp_path: Path, prefix: str
) -> None:
    declared(tmp_path, prefix)
    env = {"FLOWKIT_KAFKA_HOSTS": apache_kafka.hosts}
    shown, checked = (flowkit("topics", "app", *more, cwd=tmp_path, env=env) for more in ((), ("--check",)))
    assert (shown.code, checked.code) == (0, 1)
    assert shown.out == checked.out
    assert re.search(rf"{prefix}orders +route +2 +default +missing\n", shown.out)
    assert re.search(rf"{prefix}dead +dead letter +default +default +missing\n", shown.out)
    assert "2 topics are missing; make what is missing with: flowkit topics app:app --create\n" in shown.out
    made = flowkit("topics", "app", "--create", "--check", cwd=tmp_path, env=env)
    assert made.code == 0
    assert re.search(rf"{prefix}orders +route +2 +1 +made\n", made.out)
    again = flowkit("topics", "app", "--create", "--check", cwd=tmp_path, env=env)
    assert again.code == 0
    assert re.search(rf"{prefix}orders +route +2 +1 +there\n", again.out)


def declared(folder: Path, prefix: str, partitions: int = 2) -> None:
    (folder / "app.py").write_text(
        "from flowkit import Flowkit\n"
        "app = Flowkit('x', inline=True)\n"
        f"app.add_topic('{prefix}orders', print, dead_letter='{prefix}dead')\n"
        f"app.declare_topic('{prefix}orders', partitions={partitions}, config={{'retention.ms': 86_400_000}})\n"
    )


def test_a_topic_that_differs_is_told_and_left_as_it_is(apache_kafka: Kafka, tmp_path: Path, prefix: str) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": apache_kafka.hosts}
    declared(tmp_path, prefix)
    assert flowkit("topics", "app", "--create", cwd=tmp_path, env=env).code == 0
    declared(tmp_path, prefix, partitions=5)
    done = flowkit("topics", "app", "--create", "--check", cwd=tmp_path, env=env)
    assert done.code == 1
    assert (
        f"{prefix}orders: partitions is 2, declared is 5; to change it:\n"
        f"  kafka-topics.sh --bootstrap-server {apache_kafka.hosts} --alter --topic {prefix}orders --partitions 5"
        in done.out
    )
    rows = json.loads(flowkit("topics", "app", "--json", cwd=tmp_path, env=env).out)
    assert [(row["topic"], row["state"], row["partitions"]) for row in rows] == [
        (f"{prefix}dead", "there", 1),
        (f"{prefix}orders", "differs", 2),
    ]
    assert [difference["what"] for difference in rows[1]["differences"]] == ["partitions"]


def test_topics_that_the_brokers_refuse_are_named(apache_kafka: Kafka, prefix: str) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": apache_kafka.hosts, "HELLO": prefix, "FLOWKIT_KAFKA_REPLICATION_FACTOR": "3"}
    done = flowkit("topics", "hello", "--create", env=env)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("flowkit: Kafka refused to make\n  - topic '")
    assert len(done.err.splitlines()) == 7


def test_a_broker_that_knows_no_settings_of_topics_is_told() -> None:
    """The one of ``flowkit dev``, for example."""
    with EmbeddedBroker() as broker:
        broker.create_topics({"invoices": 1})
        done = flowkit("topics", "declared", cwd=EXAMPLES, env={"FLOWKIT_KAFKA_HOSTS": broker.hosts})
    assert (done.code, done.out) == (1, "")
    assert "closed the connection when it was asked for the settings of topics" in done.err


@pytest.mark.parametrize("name", ["topics", "lag"])
def test_no_broker_is_told_with_advice(name: str) -> None:
    assert flowkit(name, "hello").code == 2  # kafka.hosts is not set
    done = flowkit(name, "hello", env={"FLOWKIT_KAFKA_HOSTS": NOBODY})
    assert (done.code, done.out) == (1, "")
    assert f"no Kafka broker answers at {NOBODY}; is it running" in done.err


# lag.


@pytest.mark.usefixtures("apache_kafka")
def test_lag_counts_what_waits_in_kafka_and_in_the_queues(tasks: Tasks) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": tasks.hosts, "FLOWKIT_REDIS": tasks.url}
    env |= {"TASKS_IN": tasks.topic, "TASKS_OUT": tasks.out}

    def lag() -> dict[str, Any]:
        done = flowkit("lag", "tasks", "--json", env=env)
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    # Given messages that no group has begun to read
    tasks.send(*numbered(5))
    assert lag()["groups"] == [
        {"group": tasks.topic, "topic": tasks.topic, "partition": 0, "committed": None, "end": 5, "lag": 5}
    ]
    assert lag()["sum"] == {"lag": 5, "messages": 0, "failed_jobs": 0}
    table = flowkit("lag", "tasks", env=env).out.splitlines()
    assert re.fullmatch(r"GROUP +TOPIC +PARTITION  COMMITTED  END  LAG", table[0])
    assert re.fullmatch(rf"{tasks.topic} +{tasks.topic} +0 +never +5 +5", table[1])
    assert table[-1] == "sum: lag 5 in 1 group; 0 messages in 1 queue, 0 failed jobs"
    # When they are queued, one is in hand, and one has failed for now
    with tasks.start("flowkit", "run", "tasks:app") as consumer:
        tasks.wait_for_queued(5)
        tasks.wait_for(lambda: lag()["sum"]["lag"] == 0, 20, "the commit")
        assert lag()["groups"][0]["committed"] == 5
        assert lag()["sum"]["messages"] == 5
        tasks.send({"n": 5, "do": "wait", "queue": "express"})
        with tasks.start("flowkit", "worker", "tasks:app", "--queues", "express"):
            tasks.wait_for_run()
            queues = {row.pop("queue"): row for row in lag()["queues"]}
            assert consumer.stop() == 0
            tasks.redis.rpush("gate", "open")
    nothing = {"jobs": 0, "messages": 0}
    assert queues["express"] == {
        "messages": 1,
        "waiting": nothing,
        "running": {"jobs": 1, "messages": 1},
        "scheduled": nothing,
        "failed": nothing,
    }
    assert queues["default"]["messages"] == 5
    assert queues["default"]["waiting"]["messages"] == 5


def test_lag_watched_where_there_is_no_terminal_is_a_line_each_time(
    kafka: Kafka, tmp_path: Path, prefix: str
) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "HELLO": prefix, "FLOWKIT_INLINE": "1"}
    arguments = ("flowkit", "lag", "declared", "--watch", "--every", "0.1")
    with Process(*arguments, cwd=EXAMPLES, env=env, log=tmp_path / "lag.log") as watching:
        watching.wait_for("\n")
        while len(watching.output.splitlines()) < 3:
            assert watching.popen.poll() is None
            time.sleep(0.02)
        watching.signal(signal.SIGINT)
        assert watching.wait() == 0
    lines = watching.output.splitlines()[:3]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d lag [\d,]+ in 1 group", line) for line in lines), lines


def test_lag_watched_as_json_is_an_object_a_line(kafka: Kafka, tmp_path: Path) -> None:
    arguments = ("flowkit", "lag", "declared", "--watch", "--every", "0.1", "--json")
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    with Process(*arguments, cwd=EXAMPLES, env=env, log=tmp_path / "lag.json") as watching:
        watching.wait_for("}\n")
    assert json.loads(watching.output.splitlines()[0])["sum"].keys() == {"lag", "messages", "failed_jobs"}


def test_lag_watched_in_a_terminal_is_drawn_anew_until_ctrl_c(kafka: Kafka) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    with contextlib.closing(in_pty("flowkit", "lag", "declared", "--watch", "--every", "0.2", **env)) as terminal:
        for _ in range(3):
            terminal.expect_exact("\x1b[H\x1b[2J")
            terminal.expect(r"declared:app at \d\d:\d\d:\d\d, every 0\.2 s; Ctrl-C ends")
            terminal.expect("GROUP +TOPIC")
            terminal.expect(r"sum: lag [\d,]+ in 1 group\r\n")
        terminal.sendcontrol("c")
        terminal.expect(pexpect.EOF)
        assert "Traceback" not in terminal.before
        terminal.wait()
        assert terminal.exitstatus == 0


def test_lag_watched_goes_on_when_the_broker_was_away(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        env = {"FLOWKIT_KAFKA_HOSTS": broker.hosts}
        arguments = ("flowkit", "lag", "declared", "--watch", "--every", "0.1")
        with Process(*arguments, cwd=EXAMPLES, env=env, log=tmp_path / "lag.log") as watching:
            watching.wait_for(" lag 0 in 1 group\n")
            broker.kill()
            watching.wait_for("Kafka")
            before = len(watching.output)
            broker.start()
            deadline = time.monotonic() + 30
            while " lag 0 in 1 group\n" not in watching.output[before:]:
                assert time.monotonic() < deadline, watching.output
                assert watching.popen.poll() is None, watching.output
                time.sleep(0.05)


# console (alias c).


@pytest.mark.parametrize("kind", ["plain", "ipython"])
def test_the_console_has_the_application_at_hand(kind: str, kafka: Kafka, topic: MakeTopic, tmp_path: Path) -> None:
    more, prompt = (["--plain"], ">>> ") if kind == "plain" else ([], r"In \[\d+\]: ")
    if kind == "ipython":
        assert importlib.util.find_spec("IPython"), "the tests need IPython: pip install '.[test]'"
    target = topic("sent")
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "IPYTHONDIR": str(tmp_path), "HOME": str(tmp_path), "TERM": "dumb"}
    with contextlib.closing(in_pty("flowkit", "console", "shop", *more, **env)) as terminal:
        terminal.expect(rf"flowkit \S+, shop:app, Kafka at {kafka.hosts}")
        terminal.expect(r"orders +bill \(queue default\)")
        terminal.expect(prompt)

        def enter(line: str, answer: str) -> None:
            terminal.sendline(line)
            terminal.expect(answer)
            terminal.expect(prompt)

        enter("sorted(routes)", r"\['invoices', 'orders'\]")
        enter(
            'client.send("orders", {"id": 1, "user": "ann", "total": 5}).responses[0].value["order"] + 4110',
            r"4111\r",
        )
        enter(f'send("{target}", {{"n": 1}}, key="ann"), "sent"[::-1]', "tnes")
        enter("app.producer is producer, 'eurt'[::-1]", r"\(True, 'true'\)")
        if kind == "plain":
            terminal.sendeof()
        else:
            terminal.sendline("exit")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0
    assert [(r.key, json.loads(r.value)) for r in read_topic(kafka.hosts, target, 1)] == [(b"ann", {"n": 1})]


def test_the_console_completes_names(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "INPUTRC": "/dev/null", "TERM": "dumb"}
    with contextlib.closing(in_pty("flowkit", "console", "shop", "--plain", **env)) as terminal:
        terminal.expect(">>> ")
        terminal.send("clie\t")
        terminal.expect("client")
        terminal.send(".send_r\t")
        terminal.expect("send_raw")
        terminal.sendcontrol("c")
        terminal.expect("KeyboardInterrupt")
        terminal.expect(">>> ")
        terminal.sendline("exit()")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert terminal.exitstatus == 0


# Completing in a shell.


class Complete(Protocol):
    """What the fixture ``complete`` gives."""

    def __call__(self, *words: str, cwd: Path = ..., **env: str) -> list[str]: ...


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complete:
    """What bash is told for the last of these words, which it splits at colons."""

    def ask(*words: str, cwd: Path = EXAMPLES, **env: str) -> list[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["flowkit"])
        monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else it is "python -m pytest"
        monkeypatch.delenv("FLOWKIT_APP", raising=False)
        environment = {"_FLOWKIT_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), **env}
        for name, value in {**environment, "COMP_CWORD": str(len(words) - 1)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code, told.err) == (0, "")
        return told.out.split()

    return ask


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("flowkit top", ["topics"]),
        ("flowkit flow sho", ["shop:app"]),
        ("flowkit flow shop : ", ["app"]),
        ("flowkit flow shop : a", ["app"]),
        ("flowkit run shop : app --topics o", ["orders"]),
        ("flowkit run shop --topics orders,", ["orders,invoices"]),
        ("flowkit run shop : app --groups ", ["shop_invoices", "shop_orders"]),
        ("flowkit worker shop --queues ", ["default"]),
        ("flowkit send sho", ["shop:app"]),
        ("flowkit send shop : app or", ["orders", "orders.dead"]),
        ("flowkit help ro", ["routes"]),
        ("flowkit flow shop : app --format s", ["svg"]),
        ("flowkit routes no_such_file --", ["--json", "--help"]),
    ],
)
def test_a_shell_completes(complete: Complete, line: str, answer: list[str]) -> None:
    assert complete(*line.split(" ")) == answer


def test_bash_that_does_not_split_at_colons_gets_whole_words(complete: Complete) -> None:
    assert complete("flowkit", "flow", "shop:a") == ["shop:app"]


def test_completing_runs_nothing_of_the_application(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\n"
        "print('imported')\n"
        "raise SystemExit(3)\n"
        "app: Flowkit = Flowkit('x')\n"
        "@app.topic('orders', queue='q', group='g')\ndef f(x): ...\n"
    )
    (tmp_path / "broken.py").write_text("app = Flowkit(\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "main.py").write_text("import flowkit\nmain = flowkit.Flowkit('y')\n")
    assert complete("flowkit", "run", "", cwd=tmp_path) == ["app:app", "broken:app", "package.main:main"]
    assert complete("flowkit", "run", "app", "--groups", "", cwd=tmp_path) == ["g"]
    assert complete("flowkit", "run", "broken", "--groups", "", cwd=tmp_path) == []
    assert complete("flowkit", "worker", "--queues", "", cwd=tmp_path, FLOWKIT_APP="app") == ["q"]
    assert complete("flowkit", "send", "", cwd=tmp_path, FLOWKIT_APP="app") == ["orders"]


def test_a_real_bash_completes_a_line(tmp_path: Path) -> None:
    script = flowkit(env={"_FLOWKIT_COMPLETE": "source_bash"}).out
    (tmp_path / "completion.sh").write_text(script + "bind 'set bell-style none'\n")
    with contextlib.closing(
        pexpect.spawn(
            "bash",
            ["--norc", "--noprofile", "-i"],
            cwd=str(EXAMPLES),
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "ready> ", "TERM": "dumb"},
            encoding="utf-8",
            timeout=30,
        )
    ) as bash:
        bash.expect("ready> ")
        bash.sendline(f"source {tmp_path}/completion.sh; PS1='go> '")
        bash.expect("\ngo> ")
        bash.send("flowkit rout\t")
        bash.expect("routes ")
        bash.send("sho\t")
        bash.expect("shop:app ")
        bash.sendline("--json | head -c 1; echo")
        bash.expect(r"\n\[")
        bash.expect("go> ")
        bash.send("flowkit send shop:a\t")
        bash.expect("shop:app ")
        bash.send("invo\t")
        bash.expect("invoices ")
        bash.sendcontrol("c")
        bash.sendline("exit 0")
        bash.expect(pexpect.EOF)


# What docs/cli.md shows is what the commands print.

FENCE = re.compile(r"```console\n((?:\$ [^\n]*\n)+)```\n\n```text\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An Apache Kafka without topics."""
    if reason := why_not_apache_kafka():
        pytest.skip(f"the embedded broker has no settings of topics, and Apache Kafka cannot be started: {reason}")
    with ApacheKafka(tmp_path_factory.mktemp("own")) as node:
        yield node.hosts


def shown(pattern: str, text: str) -> bool:
    """Whether ``text`` is as shown, where a line ``...`` stands for any lines and ``...`` in a line for anything in it."""
    lines = [
        ".*?" if line == "..." else re.escape(line).replace(r"\.\.\.", "[^\n]*") for line in pattern.splitlines()
    ]
    return re.fullmatch("\n".join(lines), text.strip("\n"), re.S) is not None


def test_the_picture_of_the_documentation_is_as_drawn_today() -> None:
    drawn = flowkit("flow", "shop:app", "--format", "svg", cwd=EXAMPLES).out
    assert (ROOT / "docs" / "images" / "flow.svg").read_text() == drawn, (
        "make it anew: cd examples; flowkit flow shop:app --format svg > ../docs/images/flow.svg"
    )


def test_the_commands_print_what_the_documentation_shows(own_kafka: str, redis: Redis, redis_url: str) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": own_kafka, "FLOWKIT_REDIS": redis_url, "PATH": f"{BIN}:{os.environ['PATH']}"}
    found = FENCE.findall((ROOT / "docs" / "cli.md").read_text())
    assert len(found) >= 9
    for commands, output in found:
        done = Done(0, "", "")
        for line in commands.replace("\\\n", "").splitlines():
            done = command("bash", "-c", line.removeprefix("$ "), cwd=EXAMPLES, env=env)
        real = (
            (done.out + done.err).replace(own_kafka, "127.0.0.1:9092").replace(redis_url, "redis://127.0.0.1:6379/0")
        )
        assert shown(output, real), f"{commands}prints\n{real}\nand docs/cli.md shows\n{output}"
