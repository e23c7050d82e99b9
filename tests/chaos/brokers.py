"""Kafka that dies, stands still, runs out of disk, and comes back."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Self

from consumers import COMMITS, COMMITTED_EVERY, LEFT_OPEN, TRANSACTIONS
from scenarios import LEFT_OUT, Messages, Promise, scenario
from scene import Scene
from servers import ApacheCluster, ApacheKafka, ClusterNode
from workers import IN_HAND, JOBS

from flowkit.errors import DevStackError

UNCONFIRMED = 2 * COMMITTED_EVERY
"""Messages of an inline consumer that a dead broker lets come again: those not committed yet, and the batch in hand, whose
responses it may have taken without a word."""

STARTED_IN = 120.0
"""Seconds that Kafka may take to start again, on a machine that is busy with what waits for it. Recovery begins behind that."""

FROZEN = 15.0
"""Seconds, longer than the session of a consumer (6 s) and the requests of the load (10 s)."""

DISK = 256
"""MiB of the broker that runs out of them."""

LEFT = 1
"""MiB that are left when the disk is being filled: the load needs the rest."""


@scenario(
    "broker-killed",
    Messages(inline=30_000, queued=30_000, rate=1_000),
    quick="with the start of a Kafka of its own it takes half a minute",
    promise=Promise(each=UNCONFIRMED + IN_HAND, recovered=25, of="every partition"),
    env={**COMMITS, **JOBS},
    kafka=ApacheKafka,
)
def broker_killed(scene: Scene) -> None:
    """The only broker gets a SIGKILL and is started again 2 s later, while messages are sent, handled and answered."""
    scene.consumers(1)
    scene.workers(1)
    with scene.load():
        for _ in scene.moments(3, apart=12):
            with scene.disturbance("SIGKILL of the broker, for 2 s"):
                scene.kafka.kill()
                scene.wait(2)
                scene.kafka.start(STARTED_IN)


@scenario(
    "transactions-broker-killed",
    Messages(inline=60_000, rate=1_000),
    quick="with the start of a Kafka of its own it takes half a minute",
    # A transaction in the making may be aborted, and its messages are handled again; no reader sees what it sent.
    promise=Promise(each=UNCONFIRMED, again=0, recovered=LEFT_OPEN + 15, of="every partition"),
    env=TRANSACTIONS,
    kafka=ApacheKafka,
    isolation="read_committed",
)
def transactions_broker_killed(scene: Scene) -> None:
    """The only broker gets a SIGKILL and is started again 2 s later, while a transactional route answers: a reader of what is
    committed sees each answer once.
    """
    scene.consumers(1)
    with scene.load():
        for _ in scene.moments(2, apart=12):
            with scene.disturbance("SIGKILL of the broker, for 2 s"):
                scene.kafka.kill()
                scene.wait(2)
                scene.kafka.start(STARTED_IN)


@scenario(
    "broker-frozen",
    Messages(inline=25_000, queued=25_000, rate=1_000),
    quick=f"it stands still for {FROZEN:g} s",
    promise=Promise(each=UNCONFIRMED + IN_HAND, recovered=25, of="every partition"),
    env={**COMMITS, **JOBS},
    kafka=ApacheKafka,
)
def broker_frozen(scene: Scene) -> None:
    """The only broker stands still (SIGSTOP) for 15 s, longer than the sessions of consumers, and goes on (SIGCONT)."""
    scene.consumers(2)
    scene.workers(1)
    with scene.load():
        for _ in scene.moments(2, apart=10):
            with scene.disturbance(f"SIGSTOP of the broker, for {FROZEN:g} s"):
                os.killpg(scene.kafka.process.pid, signal.SIGSTOP)
                scene.wait(FROZEN)
                os.killpg(scene.kafka.process.pid, signal.SIGCONT)


def leads_most(cluster: ApacheCluster, scene: Scene) -> ClusterNode:
    """The node that leads most partitions of the messages."""
    leaders = Counter(
        cluster.leader(stream.topic, partition).node_id
        for stream in scene.streams
        for partition in range(stream.partitions)
    )
    return cluster.nodes[leaders.most_common(1)[0][0]]


@scenario(
    "leader-killed",
    Messages(inline=30_000, queued=30_000, rate=1_000),
    quick="three nodes take half a minute to start on a busy machine",
    promise=Promise(each=UNCONFIRMED + IN_HAND, recovered=25, of="every partition"),
    env={**COMMITS, **JOBS},
    kafka=ApacheCluster,
)
def leader_killed(scene: Scene) -> None:
    """Of three nodes (three copies of each message, two needed) the one that leads most partitions gets a SIGKILL, and is back
    later.
    """
    scene.consumers(1)
    scene.workers(1)
    topics = [name for stream in scene.streams for name in (stream.topic, stream.answers)]
    with scene.load():
        for _ in scene.moments(3, apart=8):
            whole = ("__consumer_offsets", *topics)
            scene.wait_until(lambda whole=whole: scene.kafka.in_sync(*whole), 60, "all nodes to have all messages")
            node = leads_most(scene.kafka, scene)
            with scene.disturbance(f"SIGKILL of node {node.node_id}, which leads most"):
                node.kill()
            scene.wait(5)
            node.start(STARTED_IN)
            scene.tell(f"node {node.node_id} is back")


class SmallDisk(ApacheKafka):
    """A node whose data is on a file system of its own, of ``DISK`` MiB. Raises ``DevStackError`` where none can be mounted."""

    @property
    def ballast(self) -> Path:
        return self.directory / "ballast"

    def fill(self) -> None:
        """Leaves ``LEFT`` MiB."""
        with self.ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            file.truncate(max(0, os.fstat(file.fileno()).st_size - (LEFT << 20)))

    def make_room(self) -> None:
        self.ballast.unlink()

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", f"size={DISK}m", "chaos", str(self.directory)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            raise DevStackError(
                f"a disk that can be filled is a file system of its own, and it cannot be mounted: {done.stderr.strip()}"
            )
        try:
            return super().__enter__()
        except BaseException:
            self._unmount()
            raise

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._unmount()

    def _unmount(self) -> None:
        subprocess.run(["umount", str(self.directory)], check=True)


def broker_disk_full(scene: Scene) -> None:
    """The disk of the only broker is full, at which Kafka ends itself; then there is room again, and it is started."""
    scene.consumers(1)
    scene.workers(1)
    with scene.load():
        for _ in scene.moments(2, apart=10):
            with scene.disturbance("the disk of the broker is full"):
                scene.kafka.fill()
                broker = scene.kafka.process
                scene.wait_until(lambda broker=broker: broker.poll() is not None, 60, "Kafka to end itself")
                scene.tell(f"Kafka has ended, with {broker.returncode}")
                scene.kafka.make_room()
                scene.kafka.start(STARTED_IN)


def may_mount() -> bool:
    """Whether this process has the right to: CAP_SYS_ADMIN, bit 21 of its capabilities."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1)


if may_mount():
    scenario(
        "broker-disk-full",
        Messages(inline=25_000, queued=25_000, rate=1_000),
        quick="with the start of a Kafka of its own it takes half a minute",
        promise=Promise(each=UNCONFIRMED + IN_HAND, recovered=25, of="every partition"),
        env={**COMMITS, **JOBS},
        kafka=SmallDisk,
    )(broker_disk_full)
else:
    LEFT_OUT["broker-disk-full"] = "its disk is a file system of its own: run it as root, with the right to mount one"
