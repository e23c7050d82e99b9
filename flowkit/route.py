"""A route: one topic, the handler that is called for its messages, and what that handler may send."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from .errors import ConfigurationError
from .retry import Retry

Handler = Callable[..., Any]


class Responding(Protocol):
    """An object that responds: its method takes what it is given by the handler, or by ``app.respond_with``."""

    @property
    def respond(self) -> Callable[..., Any]: ...


Responder = Handler | Responding
"""A function, a class whose objects respond (one is made for each call), or such an object."""

NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")  # Kafka's own rule: org.apache.kafka.common.internals.Topic


def name_mistake(noun: str, name: object) -> str | None:
    """What is wrong with a topic's or a group's name, or None."""
    if not isinstance(name, str):
        return f"the name of a {noun} is a text, not {type(name).__name__}"
    if not NAME.fullmatch(name):
        return f"{name!r} cannot be the name of a {noun}: use 1 to 249 of the characters A-Z a-z 0-9 . _ -"
    if name in (".", ".."):
        return f"{name!r} cannot be the name of a {noun}: Kafka refuses it"
    return None


def check_name(noun: str, name: str) -> str:
    """``name`` itself, if Kafka takes it; raises ``ConfigurationError`` if not."""
    if mistake := name_mistake(noun, name):
        raise ConfigurationError(mistake)
    return name


@dataclass(frozen=True, slots=True)
class Declaration:
    """One topic that a handler or responder may send to. ``parser`` writes it; the route's own where it is None."""

    topic: str
    required: bool = True
    multiple_usage: bool = False
    parser: Any = None

    @property
    def when(self) -> str:
        return "always" if self.required else "sometimes"

    @property
    def how_many(self) -> str:
        return "one or more" if self.multiple_usage else "exactly one"


@dataclass(slots=True)
class Route:
    """How the messages of one topic are handled. None means: as the application's settings say."""

    topic: str
    handler: Handler
    group: str | None = None
    queue: str | None = None
    worker: Any = None
    parser: Any = None
    interchanger: Any = None
    responder: Responder | None = None
    inline: bool | None = None
    retry: Retry | int | None = None
    dead_letter: str | None = None
    job_size: int | None = None
    job_seconds: float | None = None
    job_timeout: float | None = None
    ordered: bool | None = None
    shards: int | None = None
    declarations: dict[str, Declaration] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return getattr(self.handler, "__qualname__", repr(self.handler))

    @property
    def where(self) -> str:
        """The handler as a person finds it: name, file and line."""
        code = getattr(inspect.unwrap(self.handler), "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return f"{self.name}{place}"


class TopicOptions(TypedDict, total=False):
    """The options of ``app.topic``.

    - ``group``: consumer group; ``<app>_<topic>`` if not given. Topics of the same group share one consumer.
    - ``inline``: True runs the handler in the consumer, False queues to RQ; the application's setting if not given.
    - ``queue``: RQ queue of the jobs; the application's setting if not given.
    - ``worker``: object with ``perform_async(topic, params)`` that takes the messages instead of RQ.
    - ``parser``: object with ``parse`` and ``generate``; JSON if not given.
    - ``interchanger``: object with ``load`` and ``parse``, which carries values through the queue.
    - ``responder``: function or class, decorated with ``responds_to``, that is called with what the handler returns.
    - ``retry``: ``Retry(...)`` or a number of attempts.
    - ``dead_letter``: topic for messages that failed every attempt.
    - ``job_size``: most messages in one RQ job. ``job_seconds``: seconds of work that a job is to hold, by what handlers were
      measured to take. ``job_timeout``: seconds one message may take in a worker.
    - ``ordered``: True queues messages with the same key so that they are handled one after the other, whichever worker has
      them. ``shards``: the number of queues that they are divided among by their keys (4); each needs one worker process.
    """

    group: str
    inline: bool
    queue: str
    worker: Any
    parser: Any
    interchanger: Any
    responder: Responder
    retry: Retry | int
    dead_letter: str
    job_size: int
    job_seconds: float
    job_timeout: float
    ordered: bool
    shards: int


class ResponseOptions(TypedDict, total=False):
    """The options of ``app.responds_to``.

    - ``required``: every successful call sends to the topic; True if not given.
    - ``multiple_usage``: a call may send there more than once; False if not given. Both are checked at the end of each call,
      before anything is sent.
    - ``parser``: writes what is sent there; the route's own if not given.
    """

    required: bool
    multiple_usage: bool
    parser: Any


MOST_SHARDS = 256

OPTIONS = frozenset(TopicOptions.__annotations__)
RESPONSE_OPTIONS = frozenset(ResponseOptions.__annotations__)


def check_options(topic: str, options: dict[str, Any]) -> None:
    """Raises ``ConfigurationError`` for the first option of a route that cannot be."""
    retry = options.get("retry")
    if retry is not None and not isinstance(retry, Retry):
        if isinstance(retry, bool) or not isinstance(retry, int) or retry < 1:
            raise ConfigurationError(f"topic {topic!r}: retry is a Retry(...) or a number of attempts, not {retry!r}")
        options["retry"] = Retry(attempts=retry)
    for name in ("group", "dead_letter"):
        if options.get(name) is not None:
            check_name("group" if name == "group" else "topic", options[name])
    if options.get("dead_letter") == topic:
        raise ConfigurationError(
            f"topic {topic!r}: its dead letters cannot go to itself, they would come back for ever"
        )
    queue = options.get("queue")
    if queue is not None and (not isinstance(queue, str) or not queue.strip()):
        raise ConfigurationError(f"topic {topic!r}: queue is the name of an RQ queue, not {queue!r}")
    check_parser(f"topic {topic!r}", options.get("parser"))
    _check_functions(f"topic {topic!r}", "interchanger", options.get("interchanger"), ("load", "parse"))
    _check_functions(f"topic {topic!r}", "worker", options.get("worker"), ("perform_async",), arguments=2)
    responder = options.get("responder")
    if responder is not None and not callable(getattr(responder, "respond", responder)):
        raise ConfigurationError(f"topic {topic!r}: responder is a function or a class, not {responder!r}")
    size = options.get("job_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigurationError(f"topic {topic!r}: job_size is a whole number of at least 1, not {size!r}")
    for name in ("job_seconds", "job_timeout"):
        seconds = options.get(name)
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf")
        ):
            raise ConfigurationError(f"topic {topic!r}: {name} is a number of seconds above 0, not {seconds!r}")
    _check_order(topic, options)
    if options.get("inline") not in (None, True, False):
        raise ConfigurationError(f"topic {topic!r}: inline is True or False, not {options['inline']!r}")
    if options.get("inline") and (options.get("queue") or options.get("worker")):
        raise ConfigurationError(f"topic {topic!r}: inline=True runs in the consumer; remove queue= and worker=")


def _check_order(topic: str, options: dict[str, Any]) -> None:
    ordered, shards = options.get("ordered"), options.get("shards")
    if ordered not in (None, True, False):
        raise ConfigurationError(f"topic {topic!r}: ordered is True or False, not {ordered!r}")
    if shards is not None:
        if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= MOST_SHARDS:
            raise ConfigurationError(
                f"topic {topic!r}: shards is a whole number from 1 to {MOST_SHARDS}, not {shards!r}"
            )
        if not ordered:
            raise ConfigurationError(f"topic {topic!r}: shards={shards} is for ordered=True only; add it")
    if ordered and options.get("inline"):
        raise ConfigurationError(
            f"topic {topic!r}: inline=True keeps the order of each partition by itself; remove ordered=True"
        )
    if ordered and options.get("worker") is not None:
        raise ConfigurationError(
            f"topic {topic!r}: ordered=True is kept in RQ's queues, and worker= takes the messages elsewhere; remove one"
        )


def check_parser(where: str, parser: Any) -> None:
    """Raises ``ConfigurationError`` for what is neither None nor a parser."""
    _check_functions(where, "parser", parser, ("parse", "generate"))


def _check_functions(where: str, name: str, value: Any, wanted: tuple[str, ...], arguments: int = 1) -> None:
    if value is None:
        return
    missing = [function for function in wanted if not callable(getattr(value, function, None))]
    if missing:
        raise ConfigurationError(
            f"{where}: {name}={value!r} needs the function(s) {', '.join(missing)};"
            f" {'an' if name == 'interchanger' else 'a'} {name} has {' and '.join(wanted)}"
        )
    for function in wanted:
        try:
            signature = inspect.signature(getattr(value, function))
        except ValueError:  # some functions written in C do not say what they take
            continue
        try:
            signature.bind(*(None,) * arguments)
        except TypeError as error:
            hint = f"; give an instance: {value.__name__}(...)" if isinstance(value, type) else ""
            raise ConfigurationError(
                f"{where}: {name}={value!r}: its {function} is called with {arguments} argument(s), which fails:"
                f" {error}{hint}"
            ) from error
