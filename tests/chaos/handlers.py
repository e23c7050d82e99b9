"""Messages that do harm: poison, and handlers that block, leak, and end their process."""

from __future__ import annotations

from collections import Counter

from consumers import COMMITS, COMMITTED_EVERY
from scenarios import Messages, Promise, number_in, scenario
from scene import Disturbance, Scene
from witnesses import payload, values_in
from workers import DEAD, IN_HAND, JOBS

from flowkit.upkeep import CLEAN_EVERY, TAKEN

POISON_EVERY = 1_000


def is_poison(number: int) -> bool:
    return number % POISON_EVERY == POISON_EVERY // 2


@scenario(
    "poison",
    Messages(inline=20_000, queued=20_000, rate=1_000),
    quick=Messages(inline=3_000, queued=3_000, rate=1_000),
    # Nothing dies, so nothing is repeated. The other messages of the partition of an inline one wait for its attempts.
    promise=Promise(recovered=10, of="every partition"),
    env={**JOBS, "CHAOS_DEAD_LETTERS": "1"},
)
def poison(scene: Scene) -> None:
    """One message in 1,000 fails each time. It becomes a dead letter, byte for byte and once; all others are handled."""
    scene.acts = lambda stream, number: "fail" if is_poison(number) else ""
    scene.consumers(1)
    scene.workers(1)
    scene.workers(1, "rq")
    with scene.load():
        pass
    scene.wait_until(scene.drained, 60, "all but the poison to be handled, and an empty queue")
    for stream in scene.streams:
        poisoned = [number for number in range(stream.warm_up, stream.count) if is_poison(number)]
        for number in poisoned:
            sent_at = stream.sent_at[number]
            scene.disturbances.append(Disturbance(f"{stream.name} message {number}", sent_at, sent_at))
        letters = Counter(values_in(scene.kafka.hosts, stream.dead_letters, stream.partitions))
        if letters != Counter(payload(number, "fail") for number in poisoned):
            found = sorted(map(number_in, letters.elements()))
            scene.faults.append(
                f"the dead letters of {stream.name} are {found}, the poison is {poisoned}, byte for byte"
            )
    scene.tell(f"{len(scene.disturbances)} poison messages")


def act(scene: Scene, what: str, every: int) -> None:
    """Has one of so many messages do it, in each stream another one, as the handler counts by number how often it has."""
    scene.acts = lambda stream, number: what if number % every == every // 2 + (stream == "queued") else ""


def note_acts(scene: Scene, what: str, times: int) -> None:
    """Waits until all is handled, and takes as disturbances what handlers have done, each message so many times at most."""
    scene.wait_until(scene.drained, 300, "all that was sent to be handled, and an empty queue")
    for path in sorted(scene.directory.glob(f"ledger.{what}-*")):
        for line in path.read_text().splitlines()[:times]:
            began = int(line) / 1e9
            scene.disturbances.append(Disturbance(path.name, began, began))
    scene.tell(f"{len(scene.disturbances)} times: {what}")


BLOCK, POLLED, TIMEOUT = 12.0, 6.0, 3.0


@scenario(
    "handler-blocks",
    Messages(inline=20_000, queued=20_000, rate=1_000),
    quick="what blocks has to do so for longer than kafka.max_poll_interval",
    promise=Promise(recovered=BLOCK + 5, of="every partition"),
    env={
        **JOBS,
        "CHAOS_BLOCK": f"{BLOCK}",
        "FLOWKIT_KAFKA_MAX_POLL_INTERVAL": f"{POLLED}",
        "FLOWKIT_JOB_TIMEOUT": f"{TIMEOUT}",
    },
)
def handler_blocks(scene: Scene) -> None:
    """A handler blocks for 12 s: inline for longer than max_poll_interval (6 s), and queued for longer than job_timeout (3 s),
    after which it is tried again.
    """
    act(scene, "block", every=8_000)
    scene.consumers(2)
    scene.workers(1)
    scene.workers(1, "rq")
    with scene.load():
        pass
    note_acts(scene, "block", times=1)


LEAKY = 500
"""Messages of which one leaks 20 MB; the tenth ends its process."""


@scenario(
    "handler-leaks",
    Messages(inline=20_000, queued=20_000, rate=1_000),
    quick="the death of a worker is told by its job's heartbeats, after 40 s and more",
    # A job that comes back may be the one in which the next process is full.
    promise=Promise(each=max(COMMITTED_EVERY, IN_HAND), recovered=2 * DEAD + 15, of="all sent"),
    env={**COMMITS, **JOBS},
)
def handler_leaks(scene: Scene) -> None:
    """Handlers leak 20 MB at a time, and their process is killed when it is 200 MB: a consumer, and processes of `flowkit
    worker` and of `rq worker`.
    """
    act(scene, "leak", every=LEAKY)
    scene.consumers(1, restarts=True)
    scene.workers(1)
    scene.workers(1, "rq")
    with scene.load():
        pass
    note_acts(scene, "leak", times=1)


EXITS = 2


@scenario(
    "handler-exits",
    Messages(inline=20_000, rate=1_000),
    quick=Messages(inline=3_000, rate=1_000),
    # For each of its ends 6 s of the session of the one that ended, and the start of a new one.
    promise=Promise(each=COMMITTED_EVERY, recovered=EXITS * 15, of="every partition"),
    env=COMMITS,
)
def handler_exits(scene: Scene) -> None:
    """An inline handler calls os._exit, twice for the same message: `flowkit run` ends each time, and is started again."""
    times = 1 if scene.quick else EXITS
    scene.env["CHAOS_TIMES"] = f"{times}"
    act(scene, "exit", every=2_500 if scene.quick else 8_000)
    scene.consumers(1, restarts=True)
    with scene.load():
        pass
    note_acts(scene, "exit", times)


@scenario(
    "handler-exits-rq",
    Messages(queued=30_000, rate=1_000),
    quick=Messages(queued=3_000, rate=1_000),
    # After each kill a job is handled message by message, and the queue grows meanwhile.
    promise=Promise(each=IN_HAND, recovered=TAKEN + CLEAN_EVERY + 30, of="all sent"),
    env={**JOBS, "CHAOS_TIMES": f"{EXITS}"},
)
def handler_exits_in_a_horse(scene: Scene) -> None:
    """A handler calls os._exit in a work horse of `rq worker`, twice for the same message."""
    act(scene, "exit", every=2_500)
    scene.consumers(1)
    scene.workers(2, "rq")
    with scene.load():
        pass
    note_acts(scene, "exit", EXITS)


@scenario(
    "handler-exits-worker",
    Messages(queued=30_000, rate=1_000),
    quick="the death of a worker is told by its job's heartbeats, after 40 s and more",
    promise=Promise(each=IN_HAND, recovered=EXITS * DEAD + 15, of="all sent"),
    env={**JOBS, "CHAOS_TIMES": f"{EXITS}"},
)
def handler_exits_in_a_worker(scene: Scene) -> None:
    """A handler calls os._exit in a process of `flowkit worker`, twice for the same message."""
    act(scene, "exit", every=10_000)
    scene.consumers(1)
    scene.workers(1, processes=2)
    with scene.load():
        pass
    note_acts(scene, "exit", EXITS)
