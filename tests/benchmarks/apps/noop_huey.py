"""The no-op as a task of Huey, without results."""

import os
from typing import Any

from huey import RedisHuey
from ledger import noter

huey = RedisHuey("bench", url=os.environ["FLOWKIT_REDIS"], results=False)
note = noter()


@huey.task()
def noop(data: dict[str, Any]) -> None:
    note(data["id"])


def fill(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        noop(message)
