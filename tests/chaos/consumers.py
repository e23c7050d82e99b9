"""Consumers (`flowkit run`) that are killed, frozen, and come and go."""

from __future__ import annotations

from scenarios import Messages, Promise, scenario
from scene import Scene

COMMITTED_EVERY = 500
"""Messages between two commits, and in a batch: what a killed consumer had handled inline and not committed is no more."""

COMMITS = {"FLOWKIT_KAFKA_OFFSET_COMMIT_THRESHOLD": str(COMMITTED_EVERY)}


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
