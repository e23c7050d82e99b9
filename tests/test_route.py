"""The rules of names and options, and how a route reads."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from support import shown

from flowkit import ConfigurationError, Flowkit, Retry
from flowkit.route import OPTIONS, Declaration, Route, TopicOptions, check_name, check_options, name_mistake

GOOD_NAMES = ["a", "orders", "orders.v2", "a-b_c.D9", "...", "-", "_", "9", "x" * 249]
BAD_NAMES = ["", " ", ".", "..", "a b", "a/b", "a:b", "ä", "a\n", "a,b", "#", "x" * 250]


class Worker:
    def perform_async(self, topic: str, params: Any) -> None: ...


class Coder:
    """Its functions need an instance."""

    def parse(self, data: Any) -> Any: ...

    def generate(self, value: Any) -> bytes: ...

    def load(self, value: bytes) -> Any: ...


class Codec:
    """A parser and an interchanger in one."""

    @staticmethod
    def parse(data: Any) -> Any:
        return data

    @staticmethod
    def generate(value: Any) -> Any:
        return value

    load = generate


def handler() -> None: ...


@pytest.mark.parametrize("name", GOOD_NAMES)
@pytest.mark.parametrize("noun", ["topic", "group"])
def test_a_name_that_kafka_takes_passes(noun: str, name: str) -> None:
    assert name_mistake(noun, name) is None
    assert check_name(noun, name) == name


@pytest.mark.parametrize("name", BAD_NAMES, ids=shown)
@pytest.mark.parametrize("noun", ["topic", "group"])
def test_a_name_that_kafka_refuses_is_refused_with_the_rule(noun: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{name!r} cannot be the name of a {noun}")) as caught:
        check_name(noun, name)
    assert "use 1 to 249 of the characters" in str(caught.value) or "Kafka refuses it" in str(caught.value)


@pytest.mark.parametrize("name", [None, 7, b"orders", handler, ["orders"]], ids=shown)
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"the name of a topic is a text, not {type(name).__name__}"):
        check_name("topic", name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict.fromkeys(sorted(OPTIONS)),
        {"group": "billing"},
        {"queue": "express"},
        {"worker": Worker()},
        {"parser": Codec},
        {"parser": Codec()},
        {"interchanger": Codec},
        {"responder": handler},
        {"inline": True},
        {"inline": False, "queue": "express"},
        {"retry": 1},
        {"retry": Retry(attempts=3)},
        {"dead_letter": "orders.dead"},
        {"job_size": 1},
        {"job_timeout": 0.5},
        {"job_timeout": 900},
    ],
    ids=shown,
)
def test_what_can_be_passes(options: dict[str, Any]) -> None:
    check_options("orders", dict(options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"retry": 0}, "retry is a Retry(...) or a number of attempts, not 0"),
        ({"retry": -1}, "retry is a Retry(...) or a number of attempts, not -1"),
        ({"retry": True}, "retry is a Retry(...) or a number of attempts, not True"),
        ({"retry": "3"}, "retry is a Retry(...) or a number of attempts, not '3'"),
        ({"retry": 1.5}, "retry is a Retry(...) or a number of attempts, not 1.5"),
        ({"group": "a b"}, "'a b' cannot be the name of a group"),
        ({"group": 7}, "the name of a group is a text, not int"),
        ({"dead_letter": ".."}, "'..' cannot be the name of a topic: Kafka refuses it"),
        ({"dead_letter": True}, "the name of a topic is a text, not bool"),
        ({"queue": ""}, "queue is the name of an RQ queue, not ''"),
        ({"queue": "  "}, "queue is the name of an RQ queue, not '  '"),
        ({"queue": 7}, "queue is the name of an RQ queue, not 7"),
        ({"parser": handler}, "needs the function(s) parse, generate; a parser has parse and generate"),
        ({"parser": "json"}, "parser='json' needs the function(s) parse, generate"),
        ({"interchanger": Worker()}, "needs the function(s) load, parse; an interchanger has load and parse"),
        (
            {"parser": Coder},
            "its parse is called with 1 argument(s), which fails: missing a required argument: 'data'",
        ),
        ({"interchanger": Coder}, "give an instance: Coder(...)"),
        ({"worker": Worker}, "missing a required argument: 'params'; give an instance: Worker(...)"),
        ({"worker": handler}, "needs the function(s) perform_async; a worker has perform_async"),
        ({"responder": "announce"}, "responder is a function or a class, not 'announce'"),
        ({"inline": "yes"}, "inline is True or False, not 'yes'"),
        ({"inline": 2}, "inline is True or False, not 2"),
        ({"inline": True, "queue": "q"}, "inline=True runs in the consumer; remove queue= and worker="),
        ({"inline": True, "worker": Worker()}, "inline=True runs in the consumer; remove queue= and worker="),
        ({"job_size": 0}, "job_size is a whole number of at least 1, not 0"),
        ({"job_size": 2.5}, "job_size is a whole number of at least 1, not 2.5"),
        ({"job_size": True}, "job_size is a whole number of at least 1, not True"),
        ({"job_size": "5"}, "job_size is a whole number of at least 1, not '5'"),
        ({"job_timeout": 0}, "job_timeout is a number of seconds above 0, not 0"),
        ({"job_timeout": -1}, "job_timeout is a number of seconds above 0, not -1"),
        ({"job_timeout": True}, "job_timeout is a number of seconds above 0, not True"),
        ({"job_timeout": "5"}, "job_timeout is a number of seconds above 0, not '5'"),
        ({"job_timeout": float("nan")}, "job_timeout is a number of seconds above 0, not nan"),
        ({"job_timeout": float("inf")}, "job_timeout is a number of seconds above 0, not inf"),
    ],
    ids=shown,
)
def test_what_cannot_be_is_refused_with_the_reason(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)) as caught:
        check_options("orders", options)
    if "name of a" not in text:
        assert str(caught.value).startswith("topic 'orders': ")


def test_a_number_of_attempts_becomes_a_retry() -> None:
    options: dict[str, Any] = {"retry": 3}

    check_options("orders", options)

    assert options == {"retry": Retry(attempts=3)}


def test_every_option_of_a_topic_is_a_field_of_its_route() -> None:
    assert set(TopicOptions.__annotations__) == OPTIONS
    assert set(vars(Route("orders", handler))) == OPTIONS | {"topic", "handler", "declarations"}


def test_a_route_says_where_its_handler_is() -> None:
    line = handler.__code__.co_firstlineno

    assert Route("orders", handler).name == "handler"
    assert Route("orders", handler).where == f"handler ({__file__}:{line})"


def test_a_wrapped_handler_is_found_where_it_was_written() -> None:
    @functools.wraps(handler)
    def wrapper() -> None: ...

    assert Route("orders", wrapper).where == Route("orders", handler).where


def test_a_handler_without_a_name_or_a_place_still_reads() -> None:
    bound = functools.partial(handler)

    assert Route("orders", bound).name == repr(bound)
    assert Route("orders", bound).where == repr(bound)


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, "always, exactly one"),
        ({"multiple_usage": True}, "always, one or more"),
        ({"required": False}, "sometimes, exactly one"),
        ({"required": False, "multiple_usage": True}, "sometimes, one or more"),
    ],
    ids=shown,
)
def test_a_declaration_reads_as_what_it_allows(options: dict[str, bool], reads: str) -> None:
    declaration = Declaration("invoices", **options)

    assert f"{declaration.when}, {declaration.how_many}" == reads


def test_dead_letters_cannot_go_to_their_own_topic() -> None:
    app = Flowkit("shop")
    with pytest.raises(ConfigurationError, match="would come back for ever"):
        app.topic("orders", dead_letter="orders")
