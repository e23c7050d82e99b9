"""``quick``, whose processes of RQ wait for another job long enough to get it on a busy machine too."""

from quick import app as app

from flowkit import jobs

jobs.LINGER = 2.0
