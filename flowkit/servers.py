"""``flowkit run --processes``: several consumers on one machine, which share the partitions as they would on many."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Collection
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .errors import ConfigurationError
from .health import Health
from .processes import HALTED, REFUSED, Processes, Seat
from .server import Server, picked, tell_signal

if TYPE_CHECKING:
    from .app import Flowkit

logger = logging.getLogger(__name__)

INSTANCE = "FLOWKIT_KAFKA_GROUP_INSTANCE_ID"
"""Each process needs a name of its own: the one that is set, and its number."""

LATER = 30.0
"""Seconds after ``shutdown_timeout``, to which each process keeps by itself, for ``on_shutdown`` functions and producers."""


class Servers(Processes):
    """So many processes, each of which runs a ``Server``.

    The whole ends with one of them that is refused by the brokers, or that is told to stop (``Stopped``); one that dies
    otherwise is started again.
    """

    at_once = signal.SIGKILL  # SIGTERM may come from others too: many a supervisor sends it to all processes

    def __init__(
        self,
        app: Flowkit,
        processes: int,
        *,
        topics: Collection[str] = (),
        groups: Collection[str] = (),
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(app, on_ready)
        self.processes = processes
        self.topics = topics
        self.groups = groups

    def prepare(self) -> None:
        settings = self.app.settings_for_run()
        self.patience = settings.shutdown_timeout + LATER
        self.stuck_after = settings.stuck_after
        picked(self.app, self.topics, self.groups)
        for number in range(1, self.processes + 1):
            self.seat(Seat("", number))

    def work(self, seat: Seat) -> int:
        instance = self.app.settings.kafka.group_instance_id
        if instance is not None:
            os.environ[INSTANCE] = f"{instance}-{seat.number}"
        server = Server(self.app, topics=self.topics, groups=self.groups, reporting=self._reporting)
        try:
            code = server.run()
        except ConfigurationError as error:
            logger.error("%s stops, and the others with it: %s", self.title(seat), error)
            return REFUSED
        return HALTED if server.halted else code

    def title(self, seat: Seat, pid: int | None = None) -> str:
        return f"consumer {seat.number}" if pid is None else f"consumer {seat.number} (process {pid})"

    def tell_late(self, seats: list[Seat]) -> None:
        late = ", ".join(self.title(seat) for seat in seats)
        logger.error("%s did not end within shutdown_timeout and %g s more, and must now", late, LATER)

    def tell_stopping(self, number: int, *, again: bool) -> None:
        tell_signal(number, again=again)

    def _reporting(self, health: Callable[[], Health]) -> Reporting:
        return Reporting(health, self)


class Reporting:
    """In the place of ``Doors``, in one process of several: the first process is told, and tells others."""

    def __init__(self, health: Callable[[], Health], servers: Servers) -> None:
        self._health = health
        self._servers = servers

    def look(self) -> None:
        health = self._health()
        word, _, rest = health.status.partition(": ")
        self._servers.give_sign(rest or word, ready=health.ready, alive=health.alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        pass
