"""The mistakes of the first day. Each gives one clear message with the next step, the right exit code, and no traceback.

The port of ``flowkit dev`` that somebody else has is in test_dev.py, wrong calls of ``flowkit send`` are in test_cli.py.
"""

from __future__ import annotations

import re
import signal
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import NOBODY, Done, flowkit, python, read_topic
from processes import Process
from servers import Kafka

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes app.py into a folder of its own, and gives the folder."""

    def write(source: str) -> Path:
        (tmp_path / "app.py").write_text("from flowkit import Flowkit\n" + textwrap.dedent(source))
        return tmp_path

    return write


def mistake(done: Done, code: int) -> str:
    """The message of a command that did nothing else."""
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("flowkit: ")
    assert "Traceback" not in done.err
    return done.err.removeprefix("flowkit: ").rstrip("\n")


def errors_of(process: Process) -> list[str]:
    """The lines of a log that are not business as usual."""
    return [line for line in process.output.splitlines() if " INFO " not in line]


# Servers that do not answer.

LISTENS = """
    kafka = {"hosts": "127.0.0.1:1", "bootstrap_timeout_ms": 2_000}
    app = Flowkit("day-one", kafka=kafka, redis="redis://127.0.0.1:1/0")

    @app.topic("numbers", inline=True)
    def handle(number): ...
"""
QUEUES = LISTENS.replace("inline=True", "inline=False")

NO_BROKER = (
    f"no Kafka broker answers at {NOBODY}; is it running, and is kafka.hosts right? (`flowkit dev` starts one for"
    " development)"
)
NO_REDIS = (
    "Redis does not answer: Error 111 connecting to 127.0.0.1:1. Connection refused; is it running, and is the redis"
    " setting right? (`flowkit dev` starts one for development)"
)


def test_run_keeps_trying_when_no_broker_answers(write: Write, tmp_path: Path) -> None:
    with Process("flowkit", "run", "app", cwd=write(LISTENS), log=tmp_path / "log") as process:
        process.wait_for("trying again in 0.5 s, nothing is lost")
        assert process.stop() == 0
        assert f"group 'day-one_numbers': {NO_BROKER}" in errors_of(process)[0]
        assert "Traceback" not in process.output


def test_send_ends_when_no_broker_answers(write: Write) -> None:
    assert mistake(flowkit("send", "app", "numbers", "1", cwd=write(LISTENS)), 1).startswith(NO_BROKER)


def test_run_keeps_trying_when_redis_does_not_answer(write: Write, tmp_path: Path, kafka: Kafka) -> None:
    name = f"day-one-{uuid.uuid4().hex[:8]}"
    kafka.create_topic(name)
    source = QUEUES.replace("numbers", name)
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    with Process("flowkit", "run", "app", cwd=write(source), env=env, log=tmp_path / "log") as process:
        process.wait_for(f"{NO_REDIS}; trying again in 0.5 s, nothing is lost")
        assert process.stop() == 0
        assert "Traceback" not in process.output


def test_a_worker_ends_when_redis_does_not_answer(write: Write) -> None:
    done = flowkit("worker", "app", cwd=write(QUEUES))
    [begins, error] = done.err.splitlines()
    assert begins.endswith(" working on default")
    assert (done.code, error) == (1, f"flowkit: {NO_REDIS}")


# The application is not there, or not ready.


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("shop:app", "there is no module 'shop' in {folder} or on the Python path; go to the folder of shop.py, or"),
        ("app:shop", "app:shop does not exist; it has app:app"),
        ("app:numbers", "app:numbers is not a Flowkit application; it has app:app"),
    ],
)
def test_a_wrong_application_says_which_there_are(reference: str, message: str, write: Write) -> None:
    folder = write("app = Flowkit('x')\nnumbers = [1, 2]\n")
    assert mistake(flowkit("run", reference, cwd=folder), 2).startswith(message.format(folder=folder))


@pytest.mark.parametrize("start", ["run", "dev"])
def test_no_topics_says_how_to_register_one(start: str, write: Write) -> None:
    folder = write("app = Flowkit('x', kafka={'hosts': '127.0.0.1:1'})")
    message = mistake(flowkit(start, "app", cwd=folder), 2)
    assert message == "app:app has no topics; register a handler with @app.topic(...)"


def test_settings_that_are_missing_are_listed_together(write: Write) -> None:
    folder = write("app = Flowkit()\n@app.topic('numbers')\ndef handle(number): ...\n")
    assert mistake(flowkit("routes", "app", cwd=folder), 2) == (
        "the settings have a mistake:\n  - name: is required, as in Flowkit('shop') or FLOWKIT_NAME=shop"
    )
    assert mistake(flowkit("run", "app", cwd=folder), 2) == (
        "the settings have 3 mistakes:\n"
        "  - name: is required, as in Flowkit('shop') or FLOWKIT_NAME=shop\n"
        "  - kafka.hosts: is required, as in kafka={'hosts': '127.0.0.1:9092'} or FLOWKIT_KAFKA_HOSTS\n"
        "  - redis: is required by queued routes, as in redis='redis://127.0.0.1:6379/0' or FLOWKIT_REDIS;"
        " routes with inline=True need none"
    )


def test_settings_that_are_wrong_are_listed_together(write: Write) -> None:
    folder = write("""
        app = Flowkit("x", jobsize=3, kafka={"hosts": "127.0.0.1:1"}, inline=True)

        @app.topic("numbers")
        def handle(number): ...
    """)
    env = {"FLOWKIT_REDIS": "127.0.0.1:6379", "FLOWKIT_KAFKA_SESSION_TIMEOUT": "soon"}
    message = mistake(flowkit("run", "app", cwd=folder, env=env), 2)
    assert sorted(message.splitlines()[1:]) == [
        "  - jobsize: there is no such setting; did you mean 'job_size'?",
        "  - kafka.session_timeout: expected a number of seconds above 0, got 'soon'"
        " (from FLOWKIT_KAFKA_SESSION_TIMEOUT)",
        "  - redis: expected redis://host:port/db, rediss://..., unix://... or a dict of redis-py options"
        " (from FLOWKIT_REDIS)",
    ]


def test_hosts_under_another_name_are_found_out(write: Write) -> None:
    folder = write("""
        app = Flowkit("x", kafka={"host": "127.0.0.1:9092"}, inline=True)

        @app.topic("numbers")
        def handle(number): ...
    """)
    assert "FLOWKIT_KAFKA_HOSTS; did you mean it with 'host'?" in mistake(flowkit("run", "app", cwd=folder), 2)


@pytest.mark.parametrize(
    ("name", "near"), [("sesion_timeout", "session_timeout"), ("sasl_mecanism", "sasl_mechanism")]
)
def test_an_option_that_the_client_does_not_know_comes_with_a_hint(name: str, near: str, write: Write) -> None:
    folder = write(f"app = Flowkit('x', kafka={{'hosts': '127.0.0.1:1', '{name}': 1}})")
    assert mistake(flowkit("send", "app", "numbers", "1", cwd=folder), 2) == (
        "the settings have a mistake:\n"
        f"  - kafka.{name}: there is no such setting, or option of kafka-python; did you mean '{near}'?"
    )


# Handlers that cannot be.


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        (
            "@app.topic('numbers')\ndef one(n): ...\n@app.topic('numbers')\ndef two(n): ...\n",
            5,
            "topic 'numbers' has a handler already, one ({file}:3); a topic is handled by one function: call two from"
            " it, or move one of them to an application of its own group",
        ),
        (
            "@app.topic('numbers', quue='q')\ndef one(n): ...\n",
            3,
            "topic 'numbers': quue: there is no such option; did you mean 'queue'?",
        ),
        (
            "@app.topic('two words')\ndef one(n): ...\n",
            3,
            "'two words' cannot be the name of a topic: use 1 to 249 of the characters A-Z a-z 0-9 . _ -",
        ),
        (
            "@app.responds_to('a')\n@app.responds_to('a')\ndef one(n): ...\n",
            3,
            "one declares 'a' twice; declare it once, with multiple_usage=True if it sends several messages",
        ),
        (
            "@app.topic('numbers', inline=True, queue='q')\ndef one(n): ...\n",
            3,
            "topic 'numbers': inline=True runs in the consumer; remove queue= and worker=",
        ),
    ],
)
def test_a_decorator_says_what_is_wrong_and_where(source: str, line: int, message: str, write: Write) -> None:
    folder = write(f"app = Flowkit('x')\n{source}")
    file = folder / "app.py"
    assert mistake(flowkit("run", "app", cwd=folder), 2) == f"{message.format(file=file)}\n  at {file}:{line}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "@app.before_enqueue('number')\ndef hook(n): ...\n@app.topic('numbers')\ndef one(n): ...\n",
            "hook hook: number: there is no such topic; did you mean 'numbers'?",
        ),
        (
            "@app.topic('numbers')\ndef one(n, message): ...\n",
            "topic 'numbers', handler one (app.py:3): one has more parameters than flowkit can fill: it takes the payload"
            " and, annotated as Message, the message; 'message' is one too many; annotate it: message: Message",
        ),
        (
            "def tell(n): ...\n@app.topic('numbers', responder=tell)\ndef one(n): ...\n",
            "the responder tell of topic 'numbers' declares no topic; decorate it with @app.responds_to(...)",
        ),
    ],
)
def test_the_start_says_what_is_wrong(source: str, message: str, write: Write) -> None:
    folder = write(f"app = Flowkit('x', inline=True, kafka={{'hosts': '127.0.0.1:1'}})\n{source}")
    assert mistake(flowkit("run", "app", cwd=folder), 2).replace(f"{folder}/", "") == message


# Topics that are missing.


def test_a_topic_to_consume_that_is_missing_is_waited_for(write: Write, tmp_path: Path, kafka: Kafka) -> None:
    name = f"missing-{uuid.uuid4().hex[:8]}"
    folder = write(LISTENS.replace("numbers", name))
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
    with Process("flowkit", "run", "app", cwd=folder, env=env, log=tmp_path / "log") as process:
        process.wait_for(
            f"there is no topic {name!r} on the brokers; group 'day-one_{name}' waits for it: create it"
            " (`flowkit topics --create`), and it is consumed within half a minute"
        )
        assert process.popen.poll() is None
        assert process.stop() == 0
        assert "Traceback" not in process.output


def test_a_topic_to_send_to_that_is_missing_ends_send(write: Write, kafka: Kafka) -> None:
    folder = write(LISTENS.replace("@app.topic", "@app.responds_to('letters')\n    @app.topic"))
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_CONNECTION_POOL_TIMEOUT": "0.5"}
    assert mistake(flowkit("send", "app", "leters", "1", cwd=folder, env=env), 1) == (
        "the topic 'leters' does not exist on the brokers, or they did not answer for 0.5 s; create it"
        " (`flowkit topics --create` makes those of an application), or check that Kafka is running; did you mean"
        " 'letters'?"
    )


# Messages and handlers that do not do what they should.

ALL_WRONG = """
    import os
    from dataclasses import dataclass

    p = os.environ["PREFIX"]
    app = Flowkit("day-one", inline=True)

    @dataclass
    class Order:
        id: int

    @app.topic(p + "typed")
    def typed(order: Order): ...

    @app.topic(p + "untyped")
    @app.responds_to(p + "out")
    def untyped(order):
        return {"got": order["message"].decode()}

    @app.topic(p + "undeclared")
    @app.responds_to(p + "out", required=False)
    def undeclared(order):
        app.respond_to(p + "outs", 1)

    @app.topic(p + "forgotten")
    @app.responds_to(p + "out")
    def forgotten(order): ...

    @app.topic(p + "repeated")
    @app.responds_to(p + "out")
    def repeated(order):
        app.respond_to(p + "out", 1)
        app.respond_to(p + "out", 2)

    @app.topic(p + "nowhere")
    @app.responds_to(p + "missing")
    def nowhere(order):
        return 1

    @app.topic(p + "own")
    def own(order):
        raise KeyError("user")
"""


def test_what_fails_in_a_handler_is_told_once_with_the_next_step(write: Write, tmp_path: Path, kafka: Kafka) -> None:
    prefix = f"{uuid.uuid4().hex[:8]}-"
    names = ("typed", "untyped", "undeclared", "forgotten", "repeated", "nowhere", "own")
    for name in (*names, "out"):
        kafka.create_topic(prefix + name)
    env = {"PREFIX": prefix, "FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_CONNECTION_POOL_TIMEOUT": "0.5"}
    folder = write(ALL_WRONG)
    for name in names:
        assert flowkit("send", "app", prefix + name, "{nonsense", cwd=folder, env=env).code == 0
    expected = {
        "typed": "PayloadError: does not fit Order: payload: Invalid JSON: key must be a string at line 1 column 2",
        "undeclared": f"ResponseUnregistered: undeclared responded to '{prefix}outs', which it does not declare: it"
        f" declares {prefix}out; add @app.responds_to('{prefix}outs')",
        "forgotten": f"ResponseMissing: forgotten sent nothing to '{prefix}out', which it declares as required; respond"
        " to it on every path, or declare it with required=False",
        "repeated": f"ResponseRepeated: repeated sent 2 messages to '{prefix}out', which it declares for one; send one,"
        " or declare it with multiple_usage=True",
        "nowhere": f"DeliveryError: the topic '{prefix}missing' does not exist on the brokers, or they did not answer"
        " for 0.5 s; create it (`flowkit topics --create` makes those of an application), or check that Kafka is running",
        "own": "KeyError: 'user'",
    }
    with Process("flowkit", "run", "app", cwd=folder, env=env, log=tmp_path / "log") as process:
        for name, message in expected.items():
            process.wait_for(f"{prefix}{name}[0]@0 failed in {name}, attempt 1, again in ")
            line = next(line for line in errors_of(process) if f"failed in {name}, attempt 1" in line)
            # what cannot be parsed is not tried again: its first attempt is its last
            way_out = "; to let such messages go, name a topic for them: dead_letter=..." if name == "typed" else ""
            assert re.sub(r".* again in [\d.]+ s; ", "", line) == (
                f"partition 0 of {prefix}{name} waits, nothing is skipped{way_out}: {message}"
            )
        [answer] = read_topic(kafka.hosts, prefix + "out", 1)
        assert answer.value == b'{"got":"{nonsense"}'  # the seed's rule for what cannot be parsed, untyped
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        # a traceback is for the handler's own error only
        assert process.output.count("Traceback") == process.output.count('raise KeyError("user")') >= 1


def test_responding_outside_a_handler_says_what_to_do_instead(write: Write) -> None:
    folder = write("app = Flowkit('x')\napp.respond_to('numbers', 1)\n")
    assert mistake(flowkit("run", "app", cwd=folder), 1) == (
        "app.respond_to('numbers', ...) answers a message, and there is none here; outside a handler call"
        f" app.respond_with(responder, ...) or app.producer.send(topic, value)\n  at {folder}/app.py:3"
    )


def test_an_application_that_python_cannot_find_again_says_how_to_start_it(write: Write) -> None:
    folder = write("def main():\n    app = Flowkit('x')\n    app.run()\nmain()\n")
    done = python("app.py", cwd=folder)
    assert done.code != 0
    assert done.err.endswith(
        "app.run() cannot find its application in the module that was started; start it with"
        " `flowkit run module:attribute`\n"
    )
