"""``tasks``, which finds out within seconds, not a minute, that a worker is dead."""

from tasks import app as app

from flowkit import upkeep, worker

worker.HEARTBEAT = 0.5
worker.LIFE = 5
worker.GRACE = 1.0
upkeep.CLEAN_EVERY = 1.0
