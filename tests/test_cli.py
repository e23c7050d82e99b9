"""The command line as a user calls it: every command is a process of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from commands import NOBODY, Done, command, flowkit, python, read_topic
from processes import APPS, BIN, Process
from servers import Kafka, MakeTopic, WaitFor

COMMANDS = ("run", "worker", "dev", "routes", "flow", "info", "send")
OURS = str(Path(__file__).parents[1] / "flowkit")


def refused(done: Done, code: int = 2) -> str:
    """The one message of a command that did nothing: no traceback, nothing on stdout."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    return done.err


# Help.


def test_the_command_alone_shows_what_there_is() -> None:
    alone, asked = flowkit(), flowkit("--help")
    assert asked.code == 0
    assert (alone.out or alone.err) == asked.out
    for name in COMMANDS:
        assert f"\n  {name} " in asked.out
    assert "..." not in asked.out.partition("Commands:")[2].partition("\n\n")[0]  # each summary fits its line
    assert "flowkit dev shop:app" in asked.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    done = flowkit(name, "-h")
    assert done.code == 0
    examples = done.out.partition("  Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    assert all(f"flowkit {name} shop:app" in example for example in examples)
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_the_version_is_that_of_the_package() -> None:
    import flowkit as package

    assert flowkit("--version") == (0, f"flowkit {package.__version__}\n", "")


def test_python_m_flowkit_is_the_same_command() -> None:
    assert python("-m", "flowkit", "flow", "hello") == flowkit("flow", "hello")


def test_an_unknown_command_is_a_wrong_call() -> None:
    assert "No such command 'rnu'" in refused(flowkit("rnu", "hello"))


def test_an_unknown_log_level_is_a_wrong_call() -> None:
    message = refused(flowkit("run", "hello", "--log-level", "loud"))
    assert message == "flowkit: --log-level is debug, info, warning or error, not 'loud'\n"


# Finding the application.


@pytest.mark.parametrize("reference", ["hello:app", "hello", "hello.py", "hello.py:app", "./hello.py"])
def test_an_application_is_found_in_the_working_directory(reference: str) -> None:
    done = flowkit("flow", reference)
    assert done.code == 0, done
    assert done.out.startswith("greetings =>")


def test_an_application_is_found_by_an_environment_variable() -> None:
    named = flowkit("flow", env={"FLOWKIT_APP": "hello:app"})
    assert named == flowkit("flow", "hello:app")


def test_the_argument_wins_over_the_environment_variable() -> None:
    assert flowkit("flow", "hello", env={"FLOWKIT_APP": "nowhere:app"}).code == 0


def test_an_application_in_a_package_is_found() -> None:
    done = flowkit("flow", "apps.hello:app", cwd=APPS.parent)
    assert done.code == 0, done


def test_no_application_named_says_how_to_name_one() -> None:
    assert refused(flowkit("flow")) == (
        "flowkit: no application named; give one as module:attribute, for example app:app, or set FLOWKIT_APP\n"
    )


def test_a_module_that_is_missing_says_where_it_was_looked_for() -> None:
    message = refused(flowkit("flow", "helo:app"))
    assert message == (
        f"flowkit: there is no module 'helo' in {APPS} or on the Python path;"
        " go to the folder of helo.py, or correct 'helo:app'\n"
    )


@pytest.mark.parametrize("reference", [":app", "hello.app:app", "hel lo", "apps..hello"])
def test_a_reference_that_cannot_be_is_a_module_that_is_missing(reference: str) -> None:
    assert "there is no module" in refused(flowkit("flow", reference))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("two_apps", "two_apps:app does not exist; it has two_apps:orders, two_apps:parcels"),
        ("two_apps:parcel", "two_apps:parcel does not exist; it has two_apps:orders, two_apps:parcels"),
        ("no_app", "no_app:app is not a Flowkit application; it has no Flowkit application at all"),
        ("no_app:shop", "no_app:shop does not exist; it has no Flowkit application at all"),
    ],
)
def test_an_attribute_that_is_no_application_says_which_are(reference: str, message: str) -> None:
    assert refused(flowkit("flow", reference)) == f"flowkit: {message}\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "send"])
def test_every_command_finds_its_application_in_the_same_way(name: str) -> None:
    assert "there is no module 'helo'" in refused(flowkit(name, "helo"))


# Errors of the user's own module are shown as theirs.


def test_an_import_error_of_the_users_module_is_shown_with_their_frames_only() -> None:
    done = flowkit("routes", "import_error")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("flowkit: import_error could not be imported:\n\nTraceback (most recent call last):\n")
    assert done.err.endswith("RuntimeError: no plugin, no work\n")
    assert "ModuleNotFoundError: No module named 'plugin_that_is_missing'" in done.err
    assert f'File "{APPS}/import_error.py", line 17, in <module>' in done.err
    assert OURS not in done.err
    assert "importlib" not in done.err.replace("importlib.import_module(name)", "")


def test_an_import_error_of_a_package_is_not_a_missing_application(tmp_path: Path) -> None:
    package = tmp_path / "store"
    package.mkdir()
    (package / "__init__.py").write_text("import library_that_is_missing\n")
    (package / "main.py").write_text("from flowkit import Flowkit\napp = Flowkit('store')\n")
    done = flowkit("routes", "store.main:app", cwd=tmp_path)
    assert done.code == 1
    assert "store.main:app could not be imported" in done.err
    assert done.err.endswith("ModuleNotFoundError: No module named 'library_that_is_missing'\n")


def test_a_syntax_error_points_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from flowkit import Flowkit\n\napp = Flowkit('x'\n")
    done = flowkit("run", "app", cwd=tmp_path)
    assert done.code == 1
    assert f'File "{tmp_path}/app.py", line 3\n    app = Flowkit(' in done.err
    assert "SyntaxError: '(' was never closed" in done.err
    assert "Traceback" not in done.err


def test_a_mistake_that_a_decorator_sees_says_on_which_line(tmp_path: Path) -> None:
    source = "from flowkit import Flowkit\napp = Flowkit('x')\n@app.topic('numbers', inlin=True)\ndef f(n): ...\n"
    (tmp_path / "app.py").write_text(source)
    assert refused(flowkit("run", "app", cwd=tmp_path)) == (
        "flowkit: topic 'numbers': inlin: there is no such option; did you mean 'inline'?\n"
        f"  at {tmp_path}/app.py:3\n"
    )


def test_an_error_of_a_startup_hook_is_shown_with_their_frames_only() -> None:
    done = flowkit("run", "own_logging")
    assert done.code == 1
    shown = done.err.partition("flowkit: the application failed:\n\n")[2]
    assert shown.endswith("RuntimeError: no database, no work\n")
    assert "ConnectionRefusedError: the database said no" in shown
    assert OURS not in shown
    assert "typer" not in shown


def test_an_application_that_sets_up_logging_itself_keeps_it() -> None:
    assert flowkit("run", "own_logging").err.startswith("MINE connecting\n")


# routes, flow, info.


def test_routes_as_a_table() -> None:
    assert flowkit("routes", "hello") == (
        0,
        "TOPIC      HANDLER  RUNS        GROUP            ATTEMPTS  DEAD LETTER\n"
        "greetings  shout    inline      hello_greetings  5\n"
        "letters    reply    queue post  hello_letters    3         dead\n",
        "",
    )


def test_routes_for_programs() -> None:
    rows = json.loads(flowkit("routes", "hello", "--json").out)
    assert [row["topic"] for row in rows] == ["greetings", "letters"]
    assert rows[1] == {
        "topic": "letters",
        "group": "hello_letters",
        "handler": "reply",
        "inline": False,
        "transactional": False,
        "queue": "post",
        "worker": None,
        "parser": "Json",
        "interchanger": "Plain",
        "responder": None,
        "attempts": 3,
        "retry": rows[1]["retry"],
        "retry_topics": {},
        "dead_letter": "dead",
        "on_poison": "dead_letter",
    }
    assert (rows[0]["inline"], rows[0]["queue"]) == (True, None)


def test_routes_show_what_is_not_as_usual(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\nfrom flowkit.parsers import Text\n"
        "class Celery:\n    def perform_async(self, topic, params): ...\n"
        "app = Flowkit('x')\n"
        "@app.responds_to('c')\ndef tell(x): ...\n"
        "@app.topic('a', worker=Celery(), parser=Text, responder=tell)\ndef f(n): ...\n"
        "@app.topic('b', inline=True, retry_topic='{topic}.again')\ndef g(n): ...\n"
    )
    assert flowkit("routes", "app", cwd=tmp_path).out.splitlines() == [
        "TOPIC  HANDLER  RUNS           GROUP  ATTEMPTS  RETRY TOPICS  RESPONDER  PARSER",
        "a      f        worker Celery  x_a    5                       tell       Text",
        "b      g        inline         x_b    5         b.again.1..4             Json",
    ]


def test_flow_as_text() -> None:
    assert flowkit("flow", "hello") == (
        0,
        "greetings => shout (inline)\n"
        "  - shouts: (always, exactly one)\n"
        "letters => reply (queue post)\n"
        "  - copies:  (sometimes, one or more)\n"
        "  - replies: (always, exactly one)\n"
        "  - dead:    (dead letters, after 3 attempts)\n",
        "",
    )


def test_flow_for_programs() -> None:
    assert json.loads(flowkit("flow", "hello", "--json").out)[1] == {
        "topic": "letters",
        "handler": "reply",
        "runs": "queue",
        "queue": "post",
        "responses": [
            {"topic": "copies", "required": False, "multiple_usage": True},
            {"topic": "replies", "required": True, "multiple_usage": False},
        ],
        "retry_topics": [],
        "dead_letter": "dead",
    }


@pytest.mark.parametrize("name", ["routes", "flow"])
def test_an_application_without_topics_is_told_what_to_do(name: str) -> None:
    done = flowkit(name, "two_apps:orders")
    assert done == (0, "two_apps:orders has no topics; register a handler with @app.topic(...)\n", "")
    assert json.loads(flowkit(name, "two_apps:orders", "--json").out) == []


def test_info_says_that_kafka_and_redis_answer(kafka: Kafka, redis_url: str) -> None:
    done = flowkit("info", "hello", env={"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_REDIS": redis_url})
    assert done.code == 0
    assert "application: hello:app\n" in done.out
    assert "groups: hello_greetings, hello_letters\nqueues: post\ntopics\n" in done.out
    assert "\n  shouts:                           missing\nkafka: answers: " in done.out
    assert done.out.endswith("\nredis: answers\n")


def test_info_for_programs_when_nobody_answers() -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": NOBODY, "FLOWKIT_REDIS": f"redis://{NOBODY}/0"}
    done = flowkit("info", "hello", "--json", env=env)
    assert done.code == 0
    found = json.loads(done.out)
    assert found["versions"].keys() >= {"python", "flowkit-kafka", "kafka-python", "rq", "redis"}
    assert found["settings"]["kafka.hosts"] == NOBODY
    assert found["kafka"].startswith(f"no Kafka broker answers at {NOBODY}; is it running")
    assert found["redis"].startswith(
        "Redis does not answer: Error 111 connecting to 127.0.0.1:1. Connection refused; "
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis://ann:hunter2@127.0.0.1:1/0",
        "redis://:hunter2@127.0.0.1:1/0",
        "redis://:hunter2@hunter2@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=hunter2",
    ],
)
def test_info_masks_secrets(url: str) -> None:
    for arguments in (("info", "secret"), ("info", "secret", "--json")):
        done = flowkit(*arguments, env={"FLOWKIT_REDIS": url})
        assert done.code == 0
        assert "hunter2" not in done.out + done.err
        assert "ann" in done.out
        assert "***" in done.out


# Colour.


def in_a_terminal(*arguments: str, **env: str) -> str:
    """What a command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(BIN / "flowkit"), *arguments], cwd=APPS, env={**os.environ, "TERM": "xterm", **env}, stdout=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # Linux says so that the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(20) == 0
    return written.decode()


def test_colour_is_for_terminals_that_want_it() -> None:
    assert "\x1b[1mTOPIC" in in_a_terminal("routes", "hello")
    assert "\x1b" not in in_a_terminal("routes", "hello", NO_COLOR="1")
    assert "\x1b" not in flowkit("routes", "hello").out


def test_a_reader_that_ends_early_gets_no_traceback() -> None:
    done = command("sh", "-c", f"{BIN / 'flowkit'} info hello | true")
    assert (done.code, done.out, done.err) == (0, "", "")


# send.


@pytest.fixture
def sending(kafka: Kafka, redis_url: str) -> dict[str, str]:
    return {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_APP": "hello:app"}


def test_send_one_message(kafka: Kafka, topic: MakeTopic, sending: dict[str, str]) -> None:
    name = topic("send", 3)
    done = flowkit(
        "send", "hello", name, '{"a": "b:c"}', "--key", "ann", "--header", "trace=1", "--header", "q=a=b", env=sending
    )
    assert done == (0, f"1 message sent to {name}\n", "")
    [record] = read_topic(kafka.hosts, name, 1)
    assert (record.key, record.value) == (b"ann", b'{"a": "b:c"}')
    assert list(record.headers) == [("trace", b"1"), ("q", b"a=b")]


def test_send_without_naming_the_application(kafka: Kafka, topic: MakeTopic, sending: dict[str, str]) -> None:
    name = topic("send", 3)
    assert flowkit("send", name, "x", "--partition", "2", env=sending).code == 0
    [record] = read_topic(kafka.hosts, name, 1)
    assert (record.partition, record.key, record.value) == (2, None, b"x")


def test_send_the_lines_of_a_file(kafka: Kafka, topic: MakeTopic, sending: dict[str, str], tmp_path: Path) -> None:
    name = topic("send")
    file = tmp_path / "orders.jsonl"
    lines = [f'{{"id": {number}, "user": "ann", "name": "Zoë"}}' for number in range(2_500)]
    file.write_bytes("\r\n".join([*lines, "", '{"id": 9, "user": 7}']).encode() + b"\n")
    for arguments in (["hello:app", name], [name]):
        done = flowkit("send", *arguments, "--file", str(file), "--key-field", "user", env=sending)
        assert done == (0, f"2501 messages sent to {name}\n", "")
    records = read_topic(kafka.hosts, name, 5_002)
    assert [record.value.decode() for record in records[:2_500]] == lines
    assert {record.key for record in records[:2_500]} == {b"ann"}
    assert (records[2_500].key, records[2_500].value) == (b"7", b'{"id": 9, "user": 7}')


def test_send_bytes_that_are_not_text(
    kafka: Kafka, topic: MakeTopic, sending: dict[str, str], tmp_path: Path
) -> None:
    name = topic("send")
    (tmp_path / "raw").write_bytes(b"\xff\xfe\n")
    assert flowkit("send", name, "--file", str(tmp_path / "raw"), env=sending).code == 0
    assert [record.value for record in read_topic(kafka.hosts, name, 1)] == [b"\xff\xfe"]


def test_send_bytes_of_the_command_line(kafka: Kafka, topic: MakeTopic, sending: dict[str, str]) -> None:
    name = topic("send")
    assert flowkit("send", name, "\udcff", env=sending).code == 0
    assert [record.value for record in read_topic(kafka.hosts, name, 1)] == [b"\xff"]


def test_send_the_lines_of_stdin(kafka: Kafka, topic: MakeTopic, sending: dict[str, str]) -> None:
    name = topic("send")
    done = flowkit("send", "hello", name, "-", env=sending, stdin="one\n\ntwo\n")
    assert done == (0, f"2 messages sent to {name}\n", "")
    assert [record.value for record in read_topic(kafka.hosts, name, 2)] == [b"one", b"two"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["orders"],
        ["hello:app", "orders"],
        ["hello:app", "--file", "orders.jsonl"],
        ["hello", "orders", "{}", "more"],
        ["hello", "orders", "{}", "--file", "orders.jsonl"],
    ],
)
def test_send_shows_its_forms_for_a_call_that_is_none_of_them(arguments: list[str]) -> None:
    message = refused(flowkit("send", *arguments, env={"FLOWKIT_APP": "hello"}))
    assert "flowkit send APP TOPIC VALUE\n" in message
    assert "flowkit send APP TOPIC --file FILE" in message


@pytest.mark.parametrize("arguments", [["hello", "orders"], ["hello", "--file", "orders.jsonl"]])
def test_send_shows_its_forms_where_one_part_is_missing_and_no_variable_names_the_application(
    arguments: list[str],
) -> None:
    message = refused(flowkit("send", *arguments))
    assert "flowkit send APP TOPIC VALUE\n" in message
    assert "APP may be left out where FLOWKIT_APP is set" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["orders", "{}", "--header", "trace"], "--header is name=value, not 'trace'"),
        (["orders", "{}", "--header", "=1"], "--header is name=value, not '=1'"),
        (["orders", "{}", "--key", "a", "--key-field", "b"], "give --key or --key-field, not both"),
        (["or ders", "{}"], "'or ders' cannot be the name of a topic"),
        (["orders", "--file", "missing.jsonl"], "missing.jsonl cannot be read: No such file or directory"),
        (["orders", "--file", "."], ". cannot be read: Is a directory"),
        (["orders", "[]", "--key-field", "user"], "--key-field user: this message has none: []"),
        (["orders", "nonsense", "--key-field", "user"], "--key-field user: this message has none: nonsense"),
        (
            ["orders", '{"user": null}', "--key-field", "user"],
            '--key-field user: this message has none: {"user": null}',
        ),
    ],
)
def test_send_says_what_is_wrong_with_a_call(arguments: list[str], message: str) -> None:
    done = flowkit("send", *arguments, env={"FLOWKIT_APP": "hello", "FLOWKIT_KAFKA_HOSTS": NOBODY})
    assert refused(done).startswith(f"flowkit: {message}")


def test_send_says_how_many_were_sent_before_a_bad_line(topic: MakeTopic, sending: dict[str, str]) -> None:
    lines = '{"user": "ann"}\n' * 1_000 + "{}\n"
    done = flowkit("send", topic("send"), "-", "--key-field", "user", env=sending, stdin=lines)
    assert refused(done) == (
        "flowkit: the first 1000 messages were sent; then:\nflowkit: --key-field user: this message has none: {}\n"
    )


OWN_PARSER = """
from flowkit import Flowkit

app = Flowkit("own")

class Numbers:
    @staticmethod
    def parse(data):
        return {}[int(data)]
    generate = str

@app.topic(TOPIC, parser=Numbers, inline=True)
def handle(number): ...

if WRONG:
    app.before_enqueue("nowhere")(lambda message: None)
"""


def test_send_notes_once_what_the_parser_of_the_topic_does_not_read(
    kafka: Kafka, sending: dict[str, str], tmp_path: Path
) -> None:
    env = {**sending, "HELLO": f"{uuid.uuid4().hex[:8]}-"}
    name = f"{env['HELLO']}greetings"
    other = f"{env['HELLO']}shouts"
    kafka.create_topic(name)
    kafka.create_topic(other)
    done = flowkit("send", name, "-", env=env, stdin='"hi"\nhello {\nmore {\n')
    assert (done.code, done.out) == (0, f"3 messages sent to {name}\n")
    [note] = done.err.splitlines()
    assert note.startswith(f"flowkit: note: the parser of {name!r} does not read this: not JSON: ")
    assert note.endswith("it starts with b'hello {'")
    assert [record.value for record in read_topic(kafka.hosts, name, 3)] == [b'"hi"', b"hello {", b"more {"]

    done = flowkit("send", other, "hello {", env=env)  # what others read from there, we do not know
    assert done == (0, f"1 message sent to {other}\n", "")


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        (False, "the parser of {topic!r} does not read this: KeyError: 7"),
        (
            True,
            "own:app is not ready to read {topic!r}: hook <lambda>: nowhere: there is no such topic; known are: {topic}",
        ),
    ],
    ids=["parser", "application"],
)
def test_send_sends_where_the_application_will_not_read(
    wrong: bool, note: str, topic: MakeTopic, sending: dict[str, str], tmp_path: Path
) -> None:
    name = topic("send")
    (tmp_path / "own.py").write_text(f"TOPIC, WRONG = {name!r}, {wrong}\n{OWN_PARSER}")
    done = flowkit("send", "own", name, "7", env=sending, cwd=tmp_path)
    assert done == (0, f"1 message sent to {name}\n", f"flowkit: note: {note.format(topic=name)}\n")


# run, worker, and python hello.py.


@pytest.fixture
def hello(kafka: Kafka, redis: Any, redis_url: str) -> dict[str, str]:
    """Topics of hello.py for one test, and where its servers are."""
    prefix = f"{uuid.uuid4().hex[:8]}-"
    for name in ("greetings", "shouts", "letters", "replies", "copies", "dead"):
        kafka.create_topic(prefix + name)
    return {
        "HELLO": prefix,
        "FLOWKIT_APP": "hello:app",
        "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
        "FLOWKIT_REDIS": redis_url,
    }


START = {
    "flowkit run": ["flowkit", "run"],
    "python hello.py": [sys.executable, "hello.py"],
}


@pytest.mark.parametrize("start", START.values(), ids=START.keys())
def test_an_application_from_end_to_end(
    start: list[str], kafka: Kafka, hello: dict[str, str], redis: Any, wait_for: WaitFor, tmp_path: Path
) -> None:
    topics = hello["HELLO"]
    with Process(*start, env=hello, log=tmp_path / "run.log") as consumer:
        assert flowkit("send", f"{topics}greetings", '"hi"', env=hello).code == 0
        assert flowkit("send", f"{topics}letters", '{"from": "ann"}', env=hello).code == 0
        assert [record.value for record in read_topic(kafka.hosts, f"{topics}shouts", 1)] == [b"HI!"]
        wait_for(lambda: redis.llen(f"rq:queue:{topics}post"), what="the job")
        worked = flowkit("worker", "--burst", env=hello)  # the job says hello:app, however the consumer was started
        assert worked.code == 0, worked
        assert worked.err.splitlines()[0].endswith(f" working on {topics}post")
        assert [record.value for record in read_topic(kafka.hosts, f"{topics}replies", 1)] == [b'{"to":"ann"}']
        consumer.signal(signal.SIGINT)
        assert consumer.wait() == 0
        assert "flowkit: SIGINT, finishing the messages in hand" in consumer.output
        assert "clean=True" in consumer.output
        assert "Traceback" not in consumer.output


def test_a_worker_runs_until_it_is_told_to_stop(hello: dict[str, str], wait_for: WaitFor, tmp_path: Path) -> None:
    with Process("flowkit", "worker", "--queues", "a, b", env=hello, log=tmp_path / "worker.log") as process:
        process.wait_for(" working on a, b")
        wait_for(lambda: len(process.children()) == 2, what="a process a queue")
        assert process.stop() == 0
        assert "flowkit: note" not in process.output


def test_a_worker_logs_as_the_settings_say(hello: dict[str, str]) -> None:
    done = flowkit("worker", "--burst", env={**hello, "FLOWKIT_LOG_FORMAT": "json"})
    assert done.code == 0, done
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert f"working on {hello['HELLO']}post" in [line["message"] for line in lines]
    done = flowkit("worker", "--burst", "--log-level", "warning", env=hello)
    assert (done.code, done.err) == (0, "")


def test_a_worker_notes_a_queue_that_is_nearly_that_of_a_route(hello: dict[str, str]) -> None:
    queue = f"{hello['HELLO']}post"
    done = flowkit("worker", "--burst", "--queues", f"{queue},{queue[:-2]}ts,hook", env=hello)
    assert done.code == 0, done
    assert [line for line in done.err.splitlines() if line.startswith("flowkit: ")] == [
        f"flowkit: note: no route names the queue '{queue[:-2]}ts'; did you mean {queue!r}?"
    ]


def test_a_worker_without_a_queued_route_says_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from flowkit import Flowkit\napp = Flowkit('x', inline=True)\n@app.topic('a')\ndef f(n): ...\n"
    )
    env = {"FLOWKIT_KAFKA_HOSTS": NOBODY, "FLOWKIT_REDIS": f"redis://{NOBODY}/0"}
    assert refused(flowkit("worker", "app", cwd=tmp_path, env=env)) == (
        "flowkit: app:app queues nothing: all its routes are inline; `flowkit run` does all the work\n"
    )
