"""The no-op as a task of Taskiq, on its list broker, which is its fastest: without results and acknowledgements."""

import asyncio
import os
from typing import Any

from ledger import noter
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(os.environ["FLOWKIT_REDIS"])
note = noter()


@broker.task
async def noop(data: dict[str, Any]) -> None:
    note(data["id"])


def fill(messages: list[dict[str, Any]]) -> None:
    async def send() -> None:
        await broker.startup()
        for message in messages:
            await noop.kiq(message)
        await broker.shutdown()

    asyncio.run(send())
