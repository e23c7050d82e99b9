"""``tasks``, whose worker is told to stop in the moment in which it starts a process."""

import os
import signal

from tasks import app as app

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
