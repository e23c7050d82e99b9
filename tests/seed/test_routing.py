"""Routing: topic, group, worker, parser, interchanger, responder and inline, each with its mistakes."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import pytest
from servers import Kafka
from support import make_app, make_record, shown

from flowkit import ConfigurationError, Flowkit
from flowkit.testing import Client
from seed.system import System


@pytest.fixture
def flowkit_app(example: Callable[[str], Any]) -> Flowkit:
    app: Flowkit = example("routing").app
    return app


def handle() -> None: ...


# topic


def test_a_route_needs_a_topic_and_a_handler(flowkit_client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    call = flowkit_client.send("videos.new", {"title": "Metropolis"})
    assert call.queue == "default"
    assert capsys.readouterr().out == "indexing Metropolis\n"


def test_an_ordered_route_has_a_queue_for_each_of_its_shards(
    flowkit_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    queues = [flowkit_client.send("videos.edited", {"title": title}, key=title).queue for title in "abcdea"]
    assert {*queues} == {"default.videos.edited.0", "default.videos.edited.1"}
    assert queues[0] == queues[-1]
    assert "edit 5 of a\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * 249, "...", "-"])
def test_names_of_topics_are_those_that_kafka_takes(name: str) -> None:
    app = make_app()
    app.add_topic(name, handle)
    assert Client(app).send(name, {}).error is None


@pytest.mark.parametrize("name", ["", "x" * 250, "a b", "a/b", "ä", "a\n", "a:b", ".", ".."])
@pytest.mark.parametrize("where", ["topic", "group", "responds_to", "dead_letter", "hook"])
def test_other_names_are_refused_wherever_they_are_given(name: str, where: str) -> None:
    app = make_app()
    register: dict[str, Callable[[], Any]] = {
        "topic": lambda: app.topic(name),
        "responds_to": lambda: app.responds_to(name)(handle),
        "hook": lambda: app.before_enqueue(name),
        "group": lambda: app.topic("orders", group=name),
        "dead_letter": lambda: app.topic("orders", dead_letter=name),
    }
    with pytest.raises(ConfigurationError, match=f"{re.escape(repr(name))} cannot be the name of a (topic|group)"):
        register[where]()


def test_a_topic_has_one_handler() -> None:
    app = make_app()
    app.topic("orders")(handle)
    with pytest.raises(ConfigurationError, match=r"topic 'orders' has a handler already, .*test_routing\.py"):
        app.topic("orders")(handle)


# group


def test_topics_that_share_a_group_share_one_consumer_and_others_have_one_each(
    system: System, kafka: Kafka, flowkit_app: Flowkit
) -> None:
    """Shown by the broker's own description of its groups."""
    # Given two topics with the same group=, and two without
    if not kafka.apache:
        pytest.skip("the embedded broker does not describe its groups")
    with system.run() as server, system.worker():
        for topic in ("payload", "coroutine", "message", "typed"):
            system.send(topic, {"n": 1})
        system.answers(4)
        # Then the broker knows one member of the shared group, with both topics
        shared = system.group(f"{system.name}.shared")
        own = {topic: system.group(f"shapes_{system.name}.{topic}") for topic in ("message", "typed")}
        assert server.stop() == 0
    [member] = shared["members"]
    assert topics_of(member) == {f"{system.name}.payload", f"{system.name}.coroutine"}
    assert member["client_id"].startswith("shapes")
    # and one of each other group, which is named after the application and the topic
    for topic, found in own.items():
        [member] = found["members"]
        assert topics_of(member) == {f"{system.name}.{topic}"}


def topics_of(member: dict[str, Any]) -> set[str]:
    return {assigned["topic"] for assigned in member["member_assignment"]["assigned_partitions"]}


def test_one_handler_may_serve_several_topics(flowkit_client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    flowkit_client.send("videos.rated", {"stars": 5})
    flowkit_client.send("books.rated", {"stars": 1})
    assert capsys.readouterr().out == "videos.rated 5\nbooks.rated 1\n"
    assert {flowkit_client.app.handling(topic).group for topic in ("videos.rated", "books.rated")} == {"ratings"}


# worker


def test_a_worker_of_your_own_is_given_topic_and_params(
    flowkit_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    call = flowkit_client.send("videos.deleted", {"title": "Dracula"})
    assert capsys.readouterr().out == 'handed over: videos.deleted {"title":"Dracula"}\n'
    assert (call.queue, type(call.worker).__name__) == (None, "PrintingWorker")


# parser and interchanger


def test_a_parser_reads_and_writes_the_messages_of_its_route(
    flowkit_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    flowkit_client.send_raw("titles", "Frau im Mond, für Kinder".encode())
    assert capsys.readouterr().out == "a title: Frau im Mond, für Kinder\n"


def test_an_interchanger_carries_the_messages_of_its_route_through_redis(
    flowkit_client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    handling = flowkit_client.app.handling("videos.details")
    value = b'{"title":"M"}'
    entry = handling.entry(make_record(value), 0.0, value)
    assert base64.b64encode(value).decode() in entry
    assert handling.record(entry).value == value
    flowkit_client.send_raw("videos.details", value)
    assert capsys.readouterr().out == "details of M\n"


# responder


def test_a_responder_is_given_what_the_handler_returns(flowkit_client: Client) -> None:
    sent = flowkit_client.send("videos.published", {"title": "the golem"}).sent("videos.announced")
    assert (sent.value, sent.key) == ({"title": "The Golem"}, "The Golem")


# inline


def test_inline_of_a_route_overrides_that_of_the_application() -> None:
    for inline_app in (True, False):
        app = make_app(inline=inline_app, redis="redis://127.0.0.1:1")
        app.topic("as.the.app")(handle)
        app.topic("inline", inline=True)(handle)
        app.topic("queued", inline=False)(handle)
        client = Client(app)
        assert [client.send(topic, {}).queue for topic in ("as.the.app", "inline", "queued")] == [
            None if inline_app else "default",
            None,
            "default",
        ]


def test_heavy_and_quick_work_run_where_their_routes_say(flowkit_client: Client) -> None:
    assert flowkit_client.send("videos.watched", {"title": "M"}).queue is None
    assert flowkit_client.send("videos.uploaded", {"title": "M"}).queue == "slow"


# Mistakes.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grup": "a"}, "topic 'orders': grup: there is no such option; did you mean 'group'?"),
        ({"respond": handle}, "did you mean 'responder'?"),
        ({"controller": handle}, "topic 'orders': controller: there is no such option"),
        ({"worker": object()}, "needs the function(s) perform_async; a worker has perform_async"),
        ({"parser": object()}, "needs the function(s) parse, generate; a parser has parse and generate"),
        ({"interchanger": object()}, "needs the function(s) load, parse; an interchanger has load and parse"),
        ({"responder": "announce"}, "topic 'orders': responder is a function or a class, not 'announce'"),
        ({"inline": "yes"}, "topic 'orders': inline is True or False, not 'yes'"),
        ({"inline": True, "queue": "slow"}, "inline=True runs in the consumer; remove queue= and worker="),
        ({"queue": ""}, "topic 'orders': queue is the name of an RQ queue, not ''"),
        ({"retry": 0}, "topic 'orders': retry is a Retry(...) or a number of attempts, not 0"),
        ({"dead_letter": "orders"}, "its dead letters cannot go to itself, they would come back for ever"),
    ],
    ids=shown,
)
def test_a_mistake_in_a_route_is_told_where_it_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        make_app().topic("orders", **options)(handle)


def test_a_decorator_without_its_topic_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"write @app\.topic\(\.\.\.\) with the name of the topic"):
        make_app().topic(handle)  # type: ignore[arg-type]
