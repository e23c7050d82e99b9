"""Messages sent past responders: the second choice, for what is not an answer to a message."""

import asyncio
from collections.abc import Iterable
from typing import Any

from flowkit import DeliveryError, Flowkit
from flowkit.parsers import Text

app = Flowkit("crm", kafka={"hosts": "127.0.0.1:9092"}, inline=True)


# --8<-- [start:send]
def rename(user: int, name: str) -> None:
    """Returns when Kafka has confirmed the message, and raises DeliveryError if it does not."""
    app.producer.send("users.renamed", {"id": user, "name": name}, key=str(user))


# --8<-- [end:send]


# --8<-- [start:submit]
def import_all(rows: Iterable[dict[str, Any]]) -> int:
    """Sends many without waiting for each, then looks at every one."""
    futures = [app.producer.submit("users.imported", row, key=row["login"]) for row in rows]
    failed = [error for future in futures if (error := future.exception()) is not None]
    if failed:
        raise DeliveryError(f"{len(failed)} of {len(futures)} users were not imported: {failed[0]}")
    return len(futures)


# --8<-- [end:submit]


# --8<-- [start:asyncio]
async def visit(page: str) -> None:
    """In a coroutine, which must not block."""
    await asyncio.wrap_future(app.producer.submit("visits", page, parser=Text))


# --8<-- [end:asyncio]


# --8<-- [start:handler]
@app.topic("visits", parser=Text)
def count(page: str) -> None:
    """In a handler it works too, but leaves at once: whatever becomes of the handler, it is sent."""
    app.producer.submit("pages.seen", {"page": page})


# --8<-- [end:handler]
