"""A route: one topic, the handler that is called for its messages, and what that handler may send."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, Unpack

from .errors import ConfigurationError
from .frozen import Frozen
from .retry import Retry

Handler = Callable[..., Any]


class Responding(Protocol):
    """An object that responds: its method takes what it is given by the handler, or by ``app.respond_with``."""

    @property
    def respond(self) -> Callable[..., Any]: ...


Responder = Handler | Responding
"""A function, a class whose objects respond (one is made for each call), or such an object."""

# Kafka's own rule: org.apache.kafka.common.internals.Topic
IN_NAMES = frozenset(string.ascii_letters + string.digits + "._-")
LONGEST_NAME = 249


def name_mistake(noun: str, name: object) -> str | None:
    """What is wrong with a topic's or a group's name, or None."""
    if not isinstance(name, str):
        return f"the name of a {noun} is a text, not {type(name).__name__}"
    if not (1 <= len(name) <= LONGEST_NAME and IN_NAMES.issuperset(name)):
        return f"{name!r} cannot be the name of a {noun}: use 1 to {LONGEST_NAME} of the characters A-Z a-z 0-9 . _ -"
    if name in (".", ".."):
        return f"{name!r} cannot be the name of a {noun}: Kafka refuses it"
    return None


ENDS = ("dead_letter", "stop", "skip")
"""What ``on_poison`` may say of a message that failed for the last time."""


def pattern_mistake(pattern: object, noun: str = "dead-letter") -> str | None:
    """What is wrong with the name of such a topic, in which ``{topic}`` and ``{group}`` may stand; or None."""
    if isinstance(pattern, str):
        known = pattern.replace("{topic}", "t").replace("{group}", "g")
        if "{" in known or "}" in known:
            return (
                f"{pattern!r}: in the name of a {noun} topic {{topic}} and {{group}} may stand, and no other braces"
            )
        if name_mistake("topic", known) is None:
            return None
    return name_mistake("topic", pattern)


def check_name(noun: str, name: str) -> str:
    """``name`` itself, if Kafka takes it; raises ``ConfigurationError`` if not."""
    if mistake := name_mistake(noun, name):
        raise ConfigurationError(mistake)
    return name


class Declaration(Frozen):
    """One topic that a handler or responder may send to. ``parser`` writes it; the route's own where it is None."""

    topic: str
    required: bool
    multiple_usage: bool
    parser: Any

    def __init__(
        self, topic: str, *, required: bool = True, multiple_usage: bool = False, parser: Any = None
    ) -> None:
        super().__init__(topic=topic, required=required, multiple_usage=multiple_usage, parser=parser)

    @property
    def when(self) -> str:
        return "always" if self.required else "sometimes"

    @property
    def how_many(self) -> str:
        return "one or more" if self.multiple_usage else "exactly one"


class Route:
    """How the messages of one topic are handled. None means: as the application's settings say."""

    def __init__(self, topic: str, handler: Handler, **options: Unpack[TopicOptions]) -> None:
        self.topic = topic
        self.handler = handler
        self.group = options.get("group")
        self.queue = options.get("queue")
        self.worker = options.get("worker")
        self.parser = options.get("parser")
        self.interchanger = options.get("interchanger")
        self.responder = options.get("responder")
        self.inline = options.get("inline")
        self.retry = options.get("retry")
        self.retry_topic = options.get("retry_topic")
        self.dead_letter = options.get("dead_letter")
        self.dead_letter_limit = options.get("dead_letter_limit")
        self.on_poison = options.get("on_poison")
        self.job_size = options.get("job_size")
        self.job_seconds = options.get("job_seconds")
        self.job_timeout = options.get("job_timeout")
        self.ordered = options.get("ordered")
        self.shards = options.get("shards")
        self.transactional = options.get("transactional")
        self.concurrency = options.get("concurrency")
        self.order = options.get("order")
        self.batch = options.get("batch")
        self.max_batch = options.get("max_batch")
        self.batch_wait = options.get("batch_wait")
        self.declarations: dict[str, Declaration] = {}

    def __repr__(self) -> str:
        return f"Route({self.topic!r}, {self.name})"

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
    - ``retry_topic``: start of the names of topics where failed messages wait for their next attempt, while their partition
      goes on, for ``inline`` routes; ``{topic}`` and ``{group}`` in it stand for the route's. False: none.
    - ``dead_letter``: topic for messages that failed every attempt; ``{topic}`` and ``{group}`` in it stand for the route's.
      False: none, though the application has one. ``dead_letter_limit``: so many of them one after the other, without a success
      in between, stop the process.
    - ``on_poison``: what becomes of a message that failed every attempt, ``"dead_letter"``, ``"stop"`` or ``"skip"``.
    - ``job_size``: most messages in one RQ job. ``job_seconds``: seconds of work that a job is to hold, by what handlers were
      measured to take. ``job_timeout``: seconds one message may take in a worker.
    - ``ordered``: True queues messages with the same key so that they are handled one after the other, whichever worker has
      them. ``shards``: the number of queues that they are divided among by their keys (4); each needs one worker process.
    - ``concurrency``: messages that are handled at once, on threads or, of an ``async def`` handler, as tasks; for ``inline``
      routes. ``order``: ``"key"``, messages of a partition with the same key one after the other; ``"partition"``, all those
      of a partition; ``"none"``: all at once.
    - ``batch``: True gives the handler a list of payloads, or of messages (``list[Message]``); for ``inline`` routes.
      ``max_batch``: the longest (500). ``batch_wait``: seconds that a shorter one waits for more (0).
    - ``transactional``: True sends the responses and commits their message in one transaction of Kafka; for ``inline`` routes.
    """

    group: str
    inline: bool
    queue: str
    worker: Any
    parser: Any
    interchanger: Any
    responder: Responder
    retry: Retry | int
    retry_topic: str | Literal[False]
    dead_letter: str | Literal[False]
    dead_letter_limit: int
    on_poison: Literal["dead_letter", "stop", "skip"]
    job_size: int
    job_seconds: float
    job_timeout: float
    ordered: bool
    shards: int
    transactional: bool
    concurrency: int
    order: Literal["key", "partition", "none"]
    batch: bool
    max_batch: int
    batch_wait: float


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
    retry_topic = options.get("retry_topic")
    if retry_topic is not None and retry_topic is not False and (mistake := pattern_mistake(retry_topic, "retry")):
        raise ConfigurationError(f"topic {topic!r}: {mistake}")
    if options.get("group") is not None:
        check_name("group", options["group"])
    _check_end(topic, options)
    queue = options.get("queue")
    if queue is not None and (not isinstance(queue, str) or not queue.strip()):
        raise ConfigurationError(f"topic {topic!r}: queue is the name of an RQ queue, not {queue!r}")
    check_parser(f"topic {topic!r}", options.get("parser"))
    _check_functions(f"topic {topic!r}", "interchanger", options.get("interchanger"), ("load", "parse"))
    _check_functions(f"topic {topic!r}", "worker", options.get("worker"), ("perform_async",), arguments=2)
    responder = options.get("responder")
    if responder is not None and not callable(getattr(responder, "respond", responder)):
        raise ConfigurationError(f"topic {topic!r}: responder is a function or a class, not {responder!r}")
    for name in ("job_size", "max_batch", "concurrency"):
        size = options.get(name)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigurationError(f"topic {topic!r}: {name} is a whole number of at least 1, not {size!r}")
    for name in ("job_seconds", "job_timeout", "batch_wait"):
        seconds = options.get(name)
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf")
        ):
            raise ConfigurationError(f"topic {topic!r}: {name} is a number of seconds above 0, not {seconds!r}")
    _check_order(topic, options)
    if options.get("inline") not in (None, True, False):
        raise ConfigurationError(f"topic {topic!r}: inline is True or False, not {options['inline']!r}")
    if options.get("order") not in (None, "key", "partition", "none"):
        raise ConfigurationError(f"topic {topic!r}: order is 'key', 'partition' or 'none', not {options['order']!r}")
    if options.get("order") is not None and options.get("concurrency", 1) == 1:
        raise ConfigurationError(f"topic {topic!r}: order= is for concurrency= of more than 1; add it")
    if options.get("batch") not in (None, True, False):
        raise ConfigurationError(f"topic {topic!r}: batch is True or False, not {options['batch']!r}")
    for name in ("max_batch", "batch_wait"):
        if options.get(name) is not None and not options.get("batch"):
            raise ConfigurationError(f"topic {topic!r}: {name}= is for batch=True only; add it")
    if options.get("transactional") not in (None, True, False):
        raise ConfigurationError(f"topic {topic!r}: transactional is True or False, not {options['transactional']!r}")
    if options.get("inline") and (options.get("queue") or options.get("worker")):
        raise ConfigurationError(f"topic {topic!r}: inline=True runs in the consumer; remove queue= and worker=")


def _check_end(topic: str, options: dict[str, Any]) -> None:
    dead_letter, limit, end = (options.get(name) for name in ("dead_letter", "dead_letter_limit", "on_poison"))
    if dead_letter is not None and dead_letter is not False and (mistake := pattern_mistake(dead_letter)):
        raise ConfigurationError(mistake)
    if dead_letter in (topic, "{topic}"):
        raise ConfigurationError(
            f"topic {topic!r}: its dead letters cannot go to itself, they would come back for ever"
        )
    if end is not None and end not in ENDS:
        raise ConfigurationError(f"topic {topic!r}: on_poison is 'dead_letter', 'stop' or 'skip', not {end!r}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigurationError(f"topic {topic!r}: dead_letter_limit is a whole number of at least 1, not {limit!r}")
    if dead_letter and end in ("stop", "skip"):
        raise ConfigurationError(
            f"topic {topic!r}: dead_letter={dead_letter!r} and on_poison={end!r} say different things; remove one"
        )
    if dead_letter is False and end == "dead_letter":
        raise ConfigurationError(
            f"topic {topic!r}: on_poison='dead_letter' needs a topic for them; dead_letter=False says there is none"
        )
    if limit is not None and (dead_letter is False or end in ("stop", "skip")):
        raise ConfigurationError(
            f"topic {topic!r}: dead_letter_limit counts dead letters, and it has none; remove it"
        )


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
