"""Controllers' callbacks: before_enqueue and after_failure, in the example and in running processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from support import make_app

from flowkit import Flowkit, Message
from flowkit.testing import Client
from seed.system import System


@pytest.fixture
def callbacks(example: Callable[[str], Any]) -> Any:
    return example("callbacks")


@pytest.fixture
def flowkit_app(callbacks: Any) -> Flowkit:
    app: Flowkit = callbacks.app
    return app


# before_enqueue


def test_a_hook_chooses_which_messages_are_queued(flowkit_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sums")
    assert flowkit_client.send("sums", {"number": 50, "method": "count"}).aborted
    assert flowkit_client.send("sums", {"number": 51, "method": "sum"}).aborted
    assert caplog.messages == []
    call = flowkit_client.send("sums", {"number": 51, "method": "count"})
    assert (call.aborted, call.queue) == (False, "sums")
    [line] = caplog.messages
    assert line.startswith("51 came at 20")  # what another hook put into the payload came through the queue


def test_hooks_run_in_order_for_all_topics_or_some_until_one_aborts() -> None:
    app = make_app(inline=False)
    ran: list[str] = []
    for topic in ("a", "b"):
        app.add_topic(topic, lambda: ran.append("handler"))
    app.before_enqueue(lambda: ran.append("all"))
    app.before_enqueue("a")(lambda: ran.append("a only"))
    app.before_enqueue("a", "b")(lambda payload: ran.append("both") or (payload == "stop" and app.abort()))
    app.before_enqueue(lambda: ran.append("last"))
    client = Client(app)

    for topic, payload, expected in [
        ("a", "go", ["all", "a only", "both", "last", "handler"]),
        ("b", "go", ["all", "both", "last", "handler"]),
        ("a", "stop", ["all", "a only", "both"]),
    ]:
        ran.clear()
        assert client.send(topic, payload).aborted is (payload == "stop")
        assert ran == expected


@pytest.mark.parametrize("returned", [False, None, 0])
def test_only_abort_aborts(returned: Any) -> None:
    """Not a returned False, as in the seed's own code: there too it had to be thrown."""
    app = make_app()
    app.add_topic("a", lambda: None)
    app.before_enqueue(lambda: returned)
    assert not Client(app).send("a", {}).aborted


def test_a_hook_for_a_topic_that_nobody_handles_is_a_mistake(callbacks: Any) -> None:
    app = make_app()
    app.add_topic("orders", lambda: None)
    app.before_enqueue("order")(lambda: None)
    with pytest.raises(Exception, match="order: there is no such topic; did you mean 'orders'"):
        app.start(connected=False)


@pytest.mark.parametrize(("important", "queue"), [(True, "fast"), (False, "slow")])
def test_a_hook_chooses_the_queue_of_each_message(flowkit_client: Client, important: bool, queue: str) -> None:
    assert flowkit_client.send("orders", {"id": 1, "important": important}).queue == queue


@pytest.mark.parametrize("important", [True, False])
def test_a_hook_chooses_the_worker_of_each_message(flowkit_client: Client, callbacks: Any, important: bool) -> None:
    """The seed's FastWorker and SlowWorker."""
    call = flowkit_client.send("letters", {"to": "ann", "important": important})
    chosen, other = (callbacks.fast, callbacks.slow) if important else (callbacks.slow, callbacks.fast)
    assert call.worker is chosen
    [(topic, params)] = chosen.given
    assert topic == "letters"
    assert json.loads(params["value"]).items() >= {"to": "ann", "important": important}.items()
    assert other.given == []


def test_hooks_run_in_the_consumer_only_and_what_they_change_arrives_in_the_worker(system: System) -> None:
    # Given messages for inline and queued routes, of which one is aborted and one sent to another queue
    with system.run() as server, system.worker() as worker:
        system.send("payload", {"n": 1}, {"n": 2, "abort": True})
        system.send("message", {"n": 3}, {"n": 4, "abort": True}, {"n": 5, "queue": f"{system.name}-fast"})
        system.send("coroutine", {"n": 6})
        # Then the others are handled, as the hooks have changed them
        answers = system.answers(4)
        assert [(answer["n"], answer["changed"]) for answer in answers] == [
            (1, True),
            (3, True),
            (5, True),
            (6, False),
        ]
        assert f"working on queue {system.name}-fast too" in worker.output
        assert worker.stop() == 0
        assert server.stop() == 0
    # and every hook has run once for each of its messages, in the consumer's process, whoever did the work
    notes = system.notes("first")
    assert sorted(note["n"] for note in notes) == [1, 2, 3, 4, 5, 6]
    assert {note["pid"] for note in notes} == {server.pid}
    assert sorted(note["n"] for note in system.notes("second")) == [1, 3, 5]
    assert server.pid not in {note["pid"] for note in system.notes("message")}


# after_failure


def test_each_failed_attempt_is_reported_and_the_last_one_said_to_be(
    flowkit_client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    call = flowkit_client.send("payments", {"amount": 0}, raise_errors=False)
    assert call.attempts == 3
    assert [record.getMessage() for record in caplog.records if record.name == "sums"] == [
        "payment at offset 0 failed on attempt 1: cannot pay 0",
        "payment at offset 0 failed on attempt 2: cannot pay 0",
        "payment at offset 0 is given up: cannot pay 0",
    ]
    assert call.dead_letter is not None


def test_a_payment_that_succeeds_reports_nothing(flowkit_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    assert flowkit_client.send("payments", {"amount": 1}).error is None
    assert caplog.messages == []


@pytest.mark.parametrize("inline", [True, False])
def test_without_a_dead_letter_an_inline_message_has_no_last_attempt(inline: bool) -> None:
    """It is tried again for ever; a queued one is given up, and waits in RQ's FailedJobRegistry."""
    app = make_app(inline=inline, retry=2)
    last: list[bool] = []
    app.add_topic("orders", _fail)

    @app.after_failure
    def report(error: Exception, message: Message) -> None:
        last.append(message.last_attempt)

    Client(app).send("orders", {}, raise_errors=False)
    assert last == [False, not inline]


def test_a_failing_before_enqueue_hook_has_no_last_attempt_either() -> None:
    """It runs in the consumer, which tries the message for ever, though the handler's turn would be in a worker."""
    app = make_app(inline=False, retry=2)
    last: list[bool] = []
    app.add_topic("orders", lambda: None)
    app.before_enqueue(_fail)

    @app.after_failure
    def report(error: Exception, message: Message) -> None:
        last.append(message.last_attempt)

    Client(app).send("orders", {}, raise_errors=False)
    assert last == [False, False]


def _fail() -> None:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("route", "plain"),
    [("payload", False), ("typed", False), ("message", True)],
    ids=["inline", "worker", "rq worker"],
)
def test_failures_are_told_in_the_process_that_failed_with_error_and_attempt(
    system: System, route: str, plain: bool
) -> None:
    # Given a message that fails once, and one that fails for good
    with system.run() as server, system.worker(plain=plain):
        system.send(route, {"n": 1, "fail": 1}, {"n": 2, "fail": 9})
        assert [answer["n"] for answer in system.answers(1)] == [1]
        assert [letter["n"] for letter in system.dead(1)] == [2]
        assert server.stop() == 0
    # Then each failed attempt was told, and the one that was the last
    told = [(note["error"], note["attempt"], note["last"]) for note in system.notes("failed", 1)]
    assert told == [("no 1", 1, False)]
    told = [(note["error"], note["attempt"], note["last"]) for note in system.notes("failed", 2)]
    assert told == [("no 2", 1, False), ("no 2", 2, False), ("no 2", 3, True)]
    # in the process in which it happened
    pids = {note["pid"] for note in system.notes("failed")}
    assert pids <= {note["pid"] for note in system.notes(route)}
    assert (server.pid in pids) is (route == "payload")
