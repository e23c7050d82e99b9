"""What the options of a route come to, together with those of its application: read once, at the start.

Each function raises ``ConfigurationError`` for options that contradict one another, and says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from .deadletters import filled
from .errors import ConfigurationError
from .retry import Retry
from .route import Route, check_name
from .settings import Settings

if TYPE_CHECKING:
    from .dispatch import Handling

SHARDS = 4
"""Queues of an ordered route, if it does not say how many: each of them needs a worker process."""

MOST_RETRY_TOPICS = 20
"""Different waits between the attempts of one route that retry topics may be made for."""


class RetryTopic(NamedTuple):
    """Where messages wait for their next attempt, each for ``wait`` seconds."""

    topic: str
    wait: float


def check_transactional(route: Route, settings: Settings, *, inline: bool) -> None:
    """Raises ``ConfigurationError`` where a transaction could not hold what the route does."""
    where = f"topic {route.topic!r}"
    if not inline:
        own = (
            "" if route.transactional else f"; or, as the setting is for every route, transactional=False for {where}"
        )
        raise ConfigurationError(
            f"{where}: transactional=True is for routes with inline=True; this one's messages go to a queue, which is outside"
            f" of Kafka, so no transaction of Kafka can hold both. Add inline=True, or leave transactional away{own}"
        )
    if settings.kafka.options.get("isolation_level", "read_committed") != "read_committed":
        raise ConfigurationError(
            f"{where}: transactional=True needs kafka.isolation_level to be read_committed, which it is in this group if"
            " nothing is said: else a partition that comes from another consumer would be read from too early an offset"
        )


def retry_stem(route: Route, settings: Settings, group: str, *, inline: bool) -> str | None:
    """What the names of a route's retry topics begin with. Raises ``ConfigurationError``."""
    pattern = settings.retry_topic if route.retry_topic is None else route.retry_topic
    if not pattern or (route.retry_topic is None and not inline):
        return None
    if not inline:
        raise ConfigurationError(
            f"topic {route.topic!r}: retry_topic= is for routes with inline=True; a message of this one that fails waits in RQ,"
            " and holds up no other. Leave it out"
        )
    return filled(pattern, route.topic, group)


def retry_topics(route: Route, stem: str | None, retry: Retry) -> tuple[RetryTopic, ...]:
    """The topics where messages of a route wait, one for each wait of ``retry``. Raises ``ConfigurationError``."""
    where = f"topic {route.topic!r}"
    if stem is None:
        return ()
    waits = list(islice(retry.waits(), MOST_RETRY_TOPICS + 1))
    if not waits and route.retry_topic:
        raise ConfigurationError(
            f"{where}: retry_topic= is for messages that are tried again, and retry= has one attempt only; remove one"
        )
    if len(waits) > MOST_RETRY_TOPICS:
        raise ConfigurationError(
            f"{where}: each wait between attempts has a retry topic of its own, and {retry} are more than"
            f" {MOST_RETRY_TOPICS} different ones: give Retry(...) a larger factor=, a smaller cap=, or fewer attempts="
        )
    return tuple(
        RetryTopic(check_name("topic", f"{stem}.{number}"), wait) for number, wait in enumerate(waits, start=1)
    )


def check_retry_topics(handlings: Mapping[str, Handling]) -> None:
    """Raises ``ConfigurationError`` where something else than the waiting messages of one route would be in a retry topic."""
    dead = {handling.dead_letter for handling in handlings.values()}
    owners: dict[str, str] = {}
    for topic, handling in handlings.items():
        for own, _ in handling.retry_topics:
            why = None
            if own in owners:
                why = f"topic {owners[own]!r} has it already: write {{topic}} in its name"
            elif own in handlings:
                why = "it has a handler of its own: give it another name"
            elif own in dead:
                why = "dead letters go there: give it another name"
            if why:
                raise ConfigurationError(f"topic {topic!r}: {own!r} cannot be a retry topic of it, because {why}")
            owners[own] = topic


def end_of(route: Route, settings: Settings, group: str, *, inline: bool) -> tuple[str | None, str | None]:
    """What becomes of a message that failed for the last time, and the topic of its dead letter. What the route says comes
    before what the application says. Raises ``ConfigurationError``.
    """
    where = f"topic {route.topic!r}"
    end: str | None = route.on_poison
    if end is None and route.dead_letter is None:
        end = settings.on_poison
    if end == "stop" and not inline:
        raise ConfigurationError(
            f"{where}: on_poison='stop' is for routes with inline=True; this one's messages are in a queue, where others are"
            " worked on meanwhile. Leave it out, and a message that failed every attempt stays in RQ's FailedJobRegistry; or"
            " give the route a dead_letter=, or on_poison='skip'"
        )
    if end in ("stop", "skip"):
        return end, None
    pattern = settings.dead_letter if route.dead_letter is None else route.dead_letter
    if not pattern:
        if end == "dead_letter":
            raise ConfigurationError(
                f"{where}: on_poison='dead_letter' needs the name of a topic for them: dead_letter=..."
            )
        if route.dead_letter_limit is not None:
            raise ConfigurationError(
                f"{where}: dead_letter_limit counts dead letters; name a topic for them: dead_letter=..."
            )
        return None, None
    return "dead_letter", check_name("topic", filled(pattern, route.topic, group))


def shards(route: Route, queue: str) -> tuple[str, ...]:
    """The names of the queues of an ordered route: the topic is in them, so that topics do not wait for one another."""
    return tuple(f"{queue}.{route.topic}.{number}" for number in range(route.shards or SHARDS))
