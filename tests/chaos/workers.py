"""Workers and their horses that are killed."""

from __future__ import annotations

from bisect import bisect_right

import soak
from scenarios import Messages, Promise, Result, scenario
from scene import Scene

from flowkit.jobs import NOTE_EVERY
from flowkit.upkeep import BEAT, CLEAN_EVERY, LATE, TAKEN

WORK = 0.000_5
"""Seconds that a message takes."""

CONFIRMED_IN = 0.25
"""Seconds in which Kafka confirms a response on a busy machine: a message is noted as done behind that."""

IN_HAND = round((NOTE_EVERY + CONFIRMED_IN) / WORK)
"""Messages that a killed process may have handled since its last note."""

DEAD = BEAT + LATE + 2 * CLEAN_EVERY
"""Seconds in which the death of a worker is noticed: its heartbeat is old, and upkeep has missed it twice."""

ANYBODY = 30.0
"""Seconds until somebody handles something again, when all who work may have been killed one after the other."""

JOBS = {"CHAOS_WORK": str(WORK), "FLOWKIT_JOB_SECONDS": "1"}
"""Jobs of about a second, so that what is repeated of one is told from all of it."""


@scenario(
    "horse-killed",
    Messages(queued=45_000, rate=1_500),
    quick=Messages(queued=6_000, rate=1_000),
    # Its worker sees it die, and RQ's Retry waits 1 s and more before the job goes on. One that dies in its imports, before it
    # has begun the job, is told by upkeep: a job that was taken goes back after 20 s, and it looks each 10 s.
    promise=Promise(each=IN_HAND, recovered=TAKEN + CLEAN_EVERY + 10, of="all sent"),
    env=JOBS,
)
def horse_killed(scene: Scene) -> None:
    """A work horse of one of two `rq worker` gets a SIGKILL: one that is at work, or one that still starts."""
    scene.consumers(1)
    workers = scene.workers(2, "rq")
    with scene.load():
        for number in scene.moments(8, quick=2):
            with scene.disturbance("SIGKILL of a work horse"):
                workers[number % 2].kill_child(working=scene.quick or number % 4 < 2)


@scenario(
    "worker-killed",
    Messages(queued=75_000, rate=1_500),
    quick="the death of a worker is told by its job's heartbeats, after 40 s and more",
    promise=Promise(each=IN_HAND, recovered=DEAD + 10, of="all sent"),
    env=JOBS,
)
def worker_killed(scene: Scene) -> None:
    """A process of `flowkit worker`, all of a `flowkit worker`, and all of an `rq worker` get a SIGKILL, in turn."""
    scene.consumers(1)
    ours, theirs = scene.workers(1, processes=2)[0], scene.workers(1, "rq")[0]
    with scene.load():
        for number in scene.moments(6):
            worker = theirs if number % 3 == 2 else ours
            with scene.disturbance("SIGKILL of a worker"):
                if number % 3 == 0:
                    worker.kill_child()
                else:
                    worker.kill_whole()
            if number % 3:
                worker.start()


@scenario(
    "soak",
    Messages(queued=1_000_000),
    quick="it takes 5 minutes; tests/chaos/test_soak.py runs its short form",
    promise=Promise(recovered=ANYBODY, of="any"),
    deadline=1_200,
)
def big_soak(scene: Scene) -> Result:
    """Consumers, workers, work horses, and workers with their horses get a SIGKILL every 3 s, at random: `make soak`. Each
    tenth message is answered.
    """
    directory = scene.directory / "soak"
    plan = soak.Plan(count=scene.streams[0].count, seed=scene.seed)
    with soak.WitnessRedis(directory / "redis") as redis:  # whose file is a witness
        run = soak.Soak(plan, scene.kafka.hosts, redis, directory)
        findings = run.run()
    scene.tell(findings.report())
    times = sorted(run.ledgers.first_at)
    recovered = [times[bisect_right(times, kill.at)] - kill.at for kill in findings.kills if kill.at < times[-1]]
    result = Result(
        "soak",
        sent=plan.count,
        handled=plan.count - findings.never_handled,
        responded=len(range(0, plan.count, soak.ANSWERED)) - findings.unanswered,
        lost=findings.lost,
        repeated=findings.repeated,
        repeated_allowed=max(1_000, round(findings.in_hand_by.total() * soak.MOST_REPEATED)),
        again=findings.answered_again,
        again_allowed=findings.repeated,
        disturbances=len(findings.kills),
        recovered=max(recovered),
        recovered_allowed=ANYBODY,
        of="any",
        faults=findings.faults,
    )
    result.judge()
    return result
