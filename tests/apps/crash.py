"""``tasks``, whose consumer is killed between queueing its first messages and committing them."""

import os
import signal
from typing import Any

from quick import app as app

from flowkit.jobqueue import JobQueue

enqueue = JobQueue.enqueue


def enqueue_and_die(*arguments: Any) -> int:
    enqueue(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


JobQueue.enqueue = enqueue_and_die  # type: ignore[method-assign]
