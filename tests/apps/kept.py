"""``tasks``, with a note in Redis, in the list ``producers``, of each process that makes a producer."""

import os
from typing import Any

from kafka import KafkaProducer
from tasks import app as app
from tasks import redis

make = KafkaProducer.__init__


def make_and_note(self: KafkaProducer, *arguments: Any, **options: Any) -> None:
    redis.rpush("producers", os.getpid())
    make(self, *arguments, **options)


KafkaProducer.__init__ = make_and_note
