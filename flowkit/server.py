"""Running an application: one thread a group, signals, and an end that is clean or says that it is not."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from .clients import MakeConsumer
from .consumer import Consumer
from .coroutines import LOOP_THREAD
from .dispatch import Handling
from .errors import ConfigurationError, RedisUnavailable, Stopped
from .health import Doors, Health, Part
from .settings import unknown_name

if TYPE_CHECKING:
    from .app import Flowkit
    from .jobqueue import JobQueue
    from .upkeep import Upkeep

logger = logging.getLogger(__name__)


LOOK_EVERY = 0.2
"""Seconds between looks at the consumers' threads, and so what a stop may take longer than they do."""


OBJECTS = 5_000
"""New objects after which Python looks for cycles among them; its own number is 700, or 2,000."""


@contextlib.contextmanager
def collecting_less() -> Iterator[None]:
    """Lets Python look for cycles less often, and not among what was there before: responses under way are many objects that
    live for milliseconds. On confluent-kafka a route that responds ran 1.25 times as fast with this.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    if 0 < before[0] < OBJECTS:
        gc.set_threshold(OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


class Looks(contextlib.AbstractContextManager["Looks"], Protocol):
    """What is told how the process is: ``Doors``, or the first of several processes."""

    def look(self) -> None: ...


class Server:
    """The consumers of one application in one process. One of several has ``reporting``, and leaves terminals to the first.

    ``halted``: something happened (``Stopped``) at which the others are to end as well.
    """

    def __init__(
        self,
        app: Flowkit,
        make_client: MakeConsumer | None = None,
        *,
        topics: Collection[str] = (),
        groups: Collection[str] = (),
        on_ready: Callable[[], None] | None = None,
        reporting: Callable[[Callable[[], Health]], Looks] | None = None,
    ) -> None:
        self.app = app
        self.halted = False
        self._on_ready = on_ready
        self._reporting = reporting
        self._topics = topics
        self._only_groups = groups
        self._make_client = make_client
        self._consumers: list[Consumer] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False  # not an Event: a signal handler that sets one may wait for itself
        self._failed = False
        self._refused: ConfigurationError | None = None
        self._signalled = False
        self._told: set[tuple[str, str]] = set()

    def run(self) -> int:
        """Consumes until SIGTERM or SIGINT; a second signal ends the process at once. Gives the exit code.

        0 only if every message in hand was finished and its offset committed; 1 if a group died, or if the end took
        longer than ``shutdown_timeout``. Raises ``SettingsError`` and ``ConfigurationError``, also for what only the
        brokers could refuse: then after every group has ended.
        """
        app = self.app
        app.start()
        try:
            self._consumers = self._make_consumers()
            doors = self._make_doors()
        except BaseException:
            app.stop()
            raise
        with doors, collecting_less():
            return self._serve(doors)

    def _make_doors(self) -> Looks:
        if self._reporting is not None:
            return self._reporting(self.health)
        settings = self.app.settings
        return Doors(self.health, settings.health, self._on_ready, settings.health_file)

    def _serve(self, doors: Looks) -> int:
        app = self.app
        upkeep = self._make_upkeep()
        self._install_signals()
        groups = ", ".join(consumer.group for consumer in self._consumers)
        app.events.notice("started", application=app.settings.name, groups=groups, pid=os.getpid())
        for consumer in self._consumers:
            thread = threading.Thread(
                target=self._consume, args=(consumer,), name=f"flowkit-{consumer.group}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        while not self._stopping:
            time.sleep(LOOK_EVERY)
            self._watch()
            doors.look()
        clean = self._join(doors)
        if upkeep is not None:
            upkeep.stop()
            upkeep.join(2.0)
        if clean:
            app.stop()
        else:
            # what is under way belongs to messages that come again: the end need not wait for it
            app.producer.close(0.1)
        clean = clean and not self._failed and all(consumer.clean for consumer in self._consumers)
        app.events.notice("stopped", application=app.settings.name, clean=clean)
        if self._refused is not None:
            raise self._refused
        return 0 if clean else 1

    def stop(self) -> None:
        """Asks every consumer to end after the message in hand. Safe to call from a signal handler."""
        for consumer in self._consumers:
            consumer.stop()
        self._stopping = True

    def _make_consumers(self) -> list[Consumer]:
        app = self.app
        groups: dict[str, dict[str, Handling]] = defaultdict(dict)
        for topic, handling in picked(app, self._topics, self._only_groups).items():
            groups[handling.group][topic] = handling
        job_queue = None
        if (
            any(not handling.inline for handlings in groups.values() for handling in handlings.values())
            and app.settings.redis
        ):
            from .jobqueue import JobQueue

            job_queue = JobQueue(app.settings.redis, app.settings.name, app.reference)
            if app.settings.redis_durability == "wait":
                _look_at_durability(job_queue)
        make_client = self._make_client
        if make_client is None:
            from .clients.opening import consumer_client

            make_client = consumer_client
        return [
            Consumer(group, handlings, app.settings, app.events, app.producer, make_client, job_queue)
            for group, handlings in groups.items()
        ]

    def _make_upkeep(self) -> Upkeep | None:
        redis = self.app.settings.redis
        if not redis or all(c.queueing is None or c.queueing.intake is None for c in self._consumers):
            return None
        from .upkeep import Upkeep

        settings = self.app.settings
        upkeep = Upkeep(redis, settings.name, check_redis=settings.env == "production")
        upkeep.start()
        return upkeep

    def _consume(self, consumer: Consumer) -> None:
        try:
            consumer.run()
        except ConfigurationError as error:
            logger.error("group %s stops: %s", consumer.group, error)
            self._failed = True
            self._refused = error
        except Stopped as error:
            logger.error("group %s stops, and the application with it: %s", consumer.group, error)
            self._failed = self.halted = True
        except BaseException:
            logger.exception("group %s stops: its loop failed", consumer.group)
            self._failed = True
        finally:
            if not consumer.stopping:
                self._failed = True
            self._stopping = True  # one group alone must not go on as if nothing had happened

    def _install_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stop()
        if self._reporting is not None:  # it may get one from the first process, and the same from a terminal
            return
        again, self._signalled = self._signalled, True
        tell_signal(number, again=again)
        if again:
            os._exit(1)

    def health(self) -> Health:
        """How each group is, for systemd and probes: ready when it knows its partitions, alive while its loop turns."""
        limit = self.app.settings.stuck_after
        parts = []
        for consumer in self._consumers:
            name = f"group {consumer.group}"
            idle = time.monotonic() - consumer.stands_since
            if idle >= limit:
                turns = consumer.turned_at > consumer.stands_since
                what = "has had a message in hand" if turns else "has not turned"
                parts.append(Part(name, f"{what} for {idle:.0f} s", alive=False))
            elif not consumer.joined:
                lost = (
                    "has lost touch with its broker" if consumer.tracks else "has not been given its partitions yet"
                )
                parts.append(Part(name, lost))
            else:
                count = len(consumer.tracks)
                parts.append(Part(name, f"has {count} partition{'' if count == 1 else 's'}", ready=True))
        return Health(tuple(parts), stopping=self._stopping)

    def _watch(self) -> None:
        """Looks after the loops that do not turn: lets somebody poll for them meanwhile; says, once each time, that the message
        in hand takes long, and later where everything stands.
        """
        settings = self.app.settings
        for consumer, thread in zip(self._consumers, self._threads, strict=True):
            idle = time.monotonic() - consumer.turned_at
            in_time = idle < settings.kafka.max_poll_interval or consumer.loan.is_kept
            kept = idle >= consumer.longest_batch and thread.is_alive() and consumer.loan.keep() and in_time
            if self._is_new(consumer, "poll", idle >= settings.kafka.max_poll_interval):
                self._tell_slow(consumer, thread, idle, kept=kept)
            stands = time.monotonic() - consumer.stands_since
            if self._is_new(consumer, "stuck", stands >= settings.stuck_after):
                logger.error(
                    "group %s has not turned, or has had a message in hand, for %.0f s, longer than stuck_after (%g s): from"
                    " now on this process says that it is dead. If a message may take so long, raise stuck_after. All"
                    " threads:\n%s",
                    consumer.group,
                    stands,
                    settings.stuck_after,
                    _stacks(threading.enumerate()),
                )

    def _is_new(self, consumer: Consumer, what: str, true: bool) -> bool:
        """Whether something is true of a loop that was not when it was looked at before."""
        key = (consumer.group, what)
        if not true:
            self._told.discard(key)
        elif key not in self._told:
            self._told.add(key)
            return True
        return False

    def _tell_slow(self, consumer: Consumer, thread: threading.Thread, idle: float, *, kept: bool) -> None:
        then = (
            "its partitions are kept meanwhile, and paused"
            if kept
            else "the broker gives its partitions to others, and its messages come again"
        )
        logger.log(
            logging.WARNING if kept else logging.ERROR,
            "group %s has not polled for %.0f s, longer than kafka.max_poll_interval (%g s): %s. Raise"
            " kafka.max_poll_interval, or let RQ do the work (inline=False). It is at:\n%s",
            consumer.group,
            idle,
            self.app.settings.kafka.max_poll_interval,
            then,
            _stack(thread),
        )

    def _join(self, doors: Looks) -> bool:
        """Waits for every loop to end, for ``shutdown_timeout`` seconds in all."""
        for consumer in self._consumers:
            consumer.stop()
        deadline = time.monotonic() + self.app.settings.shutdown_timeout
        doors.look()
        for thread in self._threads:
            while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                thread.join(min(LOOK_EVERY, left))
                doors.look()
        stuck = [thread for thread in self._threads if thread.is_alive()]
        for thread in stuck:
            logger.error(
                "%s did not end within shutdown_timeout (%g s); its message comes again. It is at:\n%s",
                thread.name,
                self.app.settings.shutdown_timeout,
                _stack(thread),
            )
        return not stuck


def tell_signal(number: int, *, again: bool) -> None:
    """Says what a signal leads to, in its handler."""
    then = " again, ending at once; unfinished messages come again" if again else ", finishing the messages in hand"
    with contextlib.suppress(OSError):  # who read it may have ended with the same Ctrl-C
        os.write(2, f"flowkit: {signal.Signals(number).name}{then}\n".encode())


def picked(app: Flowkit, topics: Collection[str], groups: Collection[str]) -> dict[str, Handling]:
    """The routes to be consumed: all, or those of the named topics and groups. Raises ``ConfigurationError``."""
    handlings = app.handlings
    if not handlings:
        raise ConfigurationError(
            f"{app.reference or repr(app)} has no topics; register a handler with @app.topic(...)"
        )
    names = {handling.group for handling in handlings.values()}
    for noun, given, known in (("topic", topics, handlings), ("group", groups, names)):
        for name in given:
            if name not in known:
                raise ConfigurationError(
                    unknown_name(f"--{noun}s {name}", name, known, f"{noun} in this application")
                )
    found = {
        topic: handling
        for topic, handling in handlings.items()
        if (not topics or topic in topics) and (not groups or handling.group in groups)
    }
    if not found:
        raise ConfigurationError("no topic is in the named --topics and the named --groups; see `flowkit routes`")
    return found


def _look_at_durability(job_queue: JobQueue) -> None:
    """Refuses a Redis that cannot give what ``redis_durability="wait"`` asks for; one that is away is looked at later."""
    from .durability import waits

    try:
        waits(job_queue.redis)
    except RedisUnavailable as error:
        logger.warning("whether Redis can keep what is queued is not known yet: %s", error)


def _stack(thread: threading.Thread) -> str:
    """Where a thread is, and where the coroutines' thread is, for which it may be waiting."""
    return _stacks([thread, *(other for other in threading.enumerate() if other.name == LOOP_THREAD)])


def _stacks(threads: Iterable[threading.Thread]) -> str:
    frames = sys._current_frames()
    found = [(other.name, frames.get(other.ident or 0)) for other in threads]
    return "\n".join(f"[{name}]\n{''.join(traceback.format_stack(f)[-16:])}" for name, f in found if f) or "(ended)"
