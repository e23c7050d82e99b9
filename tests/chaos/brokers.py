"""Kafka that dies, stands still, and comes back."""

from __future__ import annotations

from consumers import COMMITS, COMMITTED_EVERY
from scenarios import Messages, Promise, scenario
from scene import Scene
from servers import ApacheKafka
from workers import IN_HAND, JOBS

UNCONFIRMED = 2 * COMMITTED_EVERY
"""Messages of an inline consumer that a dead broker lets come again: those not committed yet, and the batch in hand, whose
responses it may have taken without a word."""


@scenario(
    "broker-killed",
    Messages(inline=40_000, queued=40_000, rate=1_000),
    quick=Messages(inline=4_000, queued=4_000, rate=1_000),
    promise=Promise(each=UNCONFIRMED + IN_HAND, recovered=25, of="every partition"),
    env={**COMMITS, **JOBS},
    kafka=ApacheKafka,
)
def broker_killed(scene: Scene) -> None:
    """The only broker gets a SIGKILL and is started again 2 s later, while messages are sent, handled and answered."""
    scene.consumers(1)
    scene.workers(1)
    with scene.load():
        for _ in scene.moments(4, quick=1, apart=12):
            with scene.disturbance("SIGKILL of the broker, for 2 s"):
                scene.kafka.kill()
                scene.wait(2)
                scene.kafka.start()
