"""Consumers (`flowkit run`) that are killed, frozen, and come and go."""

from __future__ import annotations

from scenarios import Messages, Promise, scenario
from scene import Part, Scene

COMMITTED_EVERY = 500
"""Messages between two commits, and in a batch: what a killed consumer had handled inline and not committed is no more."""

COMMITS = {"FLOWKIT_KAFKA_OFFSET_COMMIT_THRESHOLD": str(COMMITTED_EVERY)}

TRANSACTIONS = {**COMMITS, "CHAOS_TRANSACTIONAL": "1"}

LEFT_OPEN = 10.0 + 10.0
"""Seconds until Kafka ends a transaction that a killed process has left open (kafka.transaction_timeout, and it looks each 10 s
whether one is too old). The partitions in it wait for that: until then nobody knows where to go on.
"""

FROZEN = 9.0
"""Seconds; its session is over after 6, and the other consumers have its partitions."""


@scenario(
    "consumer-killed",
    Messages(inline=50_000, queued=50_000, rate=1_600),
    quick=Messages(inline=5_000, queued=5_000, rate=1_500),
    # Queued messages are in Redis once, whenever their consumer dies. 6 s are the session that has to end first.
    promise=Promise(each=COMMITTED_EVERY, recovered=15, of="every partition"),
    env=COMMITS,
)
def consumer_killed(scene: Scene) -> None:
    """One of two consumers gets a SIGKILL, and a new one takes its place."""
    consumers = scene.consumers(2)
    scene.workers(1)
    with scene.load():
        for number in scene.moments(5, quick=1, apart=9):  # 6 s of the session, and its rebalance
            consumer = consumers[number % 2]
            consumer.wait_for_work()
            with scene.disturbance("SIGKILL of a consumer"):
                consumer.kill()
            consumer.start()


@scenario(
    "consumer-frozen",
    Messages(inline=35_000, queued=35_000, rate=1_000),
    quick=f"it stands still for {FROZEN:g} s, until its session is over",
    promise=Promise(each=COMMITTED_EVERY, recovered=15, of="every partition"),
    env=COMMITS,
)
def consumer_frozen(scene: Scene) -> None:
    """One of two consumers stands still (SIGSTOP) for longer than its session, and goes on (SIGCONT) as if it had its
    partitions still.
    """
    consumers = scene.consumers(2)
    scene.workers(1)
    with scene.load():
        for number in scene.moments(3, apart=6):
            freeze(scene, consumers[number % 2])


def freeze(scene: Scene, consumer: Part) -> None:
    """For longer than its session."""
    consumer.wait_for_work()
    with scene.disturbance("SIGSTOP of a consumer"):
        consumer.freeze()
    scene.wait(FROZEN)
    with scene.disturbance("SIGCONT of it, which is no member any more"):
        consumer.thaw()


@scenario(
    "joins-and-leaves",
    Messages(inline=40_000, queued=40_000, rate=500),  # on a busy machine a change takes 5 s
    quick="tests/test_acceptance.py has twenty changes",
    promise=Promise(each=COMMITTED_EVERY, recovered=15, of="every partition"),
    env=COMMITS,
)
def joins_and_leaves(scene: Scene) -> None:
    """A third consumer joins, and the oldest of the three leaves (SIGTERM), in turn: twenty changes."""
    consumers = scene.consumers(2)
    scene.workers(1)
    with scene.load():
        for number in scene.moments(20, apart=1):
            if number % 2 == 0:
                with scene.disturbance("a consumer joins"):
                    consumers += scene.consumers(1)
                    consumers[-1].wait_for_work()
            else:
                with scene.disturbance("a consumer leaves"):
                    consumers.pop(0).stop()


@scenario(
    "rolling-restart",
    Messages(inline=25_000, queued=25_000, rate=1_000),
    quick="its restarts take longer on a busy machine than a short load",
    # Each finishes the message in hand, and commits or gives back the rest.
    promise=Promise(repeated=0, recovered=15, of="every partition"),
    env=COMMITS,
)
def rolling_restart(scene: Scene) -> None:
    """Two consumers and two workers are told to stop (SIGTERM) and started again, one after the other, as a deployment does:
    each ends with exit code 0.
    """
    consumers, workers = scene.consumers(2), scene.workers(2)
    parts = [consumers[0], workers[0], consumers[1], workers[1]]
    with scene.load():
        for number in scene.moments(8, apart=2):
            part = parts[number % len(parts)]
            with scene.disturbance(f"restart of {part.name}"):
                part.stop()
                part.start()


@scenario(
    "retry-topics-consumer-killed",
    Messages(inline=60_000, rate=1_000),
    quick=Messages(inline=8_000, rate=1_000),
    # A copy that Kafka has, and whose message was not committed, is there twice.
    promise=Promise(each=COMMITTED_EVERY, recovered=15, of="every partition"),
    env={**COMMITS, "CHAOS_RETRY_TOPICS": "1", "CHAOS_TIMES": "2"},
)
def retry_topics_consumer_killed(scene: Scene) -> None:
    """One message in 50 fails twice, and waits for its next attempts in retry topics, while one of two consumers gets a
    SIGKILL, and a new one takes its place.
    """
    scene.acts = lambda stream, number: "flaky" if number % 50 == 25 else ""
    consumers = scene.consumers(2)
    with scene.load():
        for number in scene.moments(4, quick=1, apart=9):
            consumer = consumers[number % 2]
            consumer.wait_for_work()
            with scene.disturbance("SIGKILL of a consumer"):
                consumer.kill()
            consumer.start()


@scenario(
    "transactions-consumer-killed",
    Messages(inline=60_000, rate=1_000),
    quick=Messages(inline=8_000, rate=1_000),
    # The slice whose transaction is not committed is handled again; no reader sees what it sent.
    promise=Promise(each=COMMITTED_EVERY, again=0, recovered=LEFT_OPEN + 5, of="every partition"),
    env=TRANSACTIONS,
    isolation="read_committed",
)
def transactions_consumer_killed(scene: Scene) -> None:
    """One of two consumers of a transactional route gets a SIGKILL, and a new one takes its place: a reader of what is
    committed sees each answer once.
    """
    consumers = scene.consumers(2)
    with scene.load():
        for number in scene.moments(4, quick=1, apart=9):
            consumer = consumers[number % 2]
            consumer.wait_for_work()
            with scene.disturbance("SIGKILL of a consumer"):
                consumer.kill()
            consumer.start()


@scenario(
    "transactions-consumer-frozen",
    Messages(inline=60_000, rate=1_000),
    quick=f"it stands still for {FROZEN:g} s, until its session is over",
    # A zombie may handle three batches, one of each of its partitions, until its client tells it that it is none of the group.
    promise=Promise(each=2 * COMMITTED_EVERY, again=0, recovered=LEFT_OPEN + 5, of="every partition"),
    env=TRANSACTIONS,
    isolation="read_committed",
)
def transactions_consumer_frozen(scene: Scene) -> None:
    """One of two consumers of a transactional route stands still for longer than its session, and goes on: a zombie, whose
    transaction Kafka refuses.
    """
    consumers = scene.consumers(2)
    with scene.load():
        for number in scene.moments(3, apart=6):
            freeze(scene, consumers[number % 2])
