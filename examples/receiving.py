"""Every shape of a handler. Try it: flowkit dev receiving:app"""

import asyncio
from dataclasses import dataclass
from typing import Any

from flowkit import Flowkit, Message

app = Flowkit("mail", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


# --8<-- [start:payload]
@app.topic("letters")
def letter(payload: dict[str, Any]) -> None:
    print("to", payload["to"])


# --8<-- [end:payload]


# --8<-- [start:message]
@app.topic("postcards", inline=True)
def postcard(payload: dict[str, Any], message: Message) -> None:
    print(payload["to"], "from partition", message.partition, "at offset", message.offset, "key", message.key)


# --8<-- [end:message]


# --8<-- [start:typed]
@dataclass
class Parcel:
    to: str
    grams: int


@app.topic("parcels", dead_letter="parcels.dead")
def parcel(parcel: Parcel) -> None:
    print(parcel.to, parcel.grams / 1000, "kg")


# --8<-- [end:typed]


# --8<-- [start:tombstone]
@app.topic("addresses", inline=True)
def address(address: Parcel | None, message: Message) -> None:
    """A message without a value, a tombstone, says that what its key names is gone."""
    if address is None:
        print("forget", message.key)


# --8<-- [end:tombstone]


# --8<-- [start:async]
@app.topic("telegrams", inline=True)
async def telegram(payload: dict[str, Any]) -> None:
    await asyncio.gather(deliver(payload["to"]), deliver("archive"))


async def deliver(to: str) -> None:
    print("delivering to", to)


# --8<-- [end:async]


# --8<-- [start:concurrency]
@app.topic("calls", inline=True, concurrency=100)
async def call(payload: dict[str, Any]) -> None:
    await deliver(payload["to"])


# --8<-- [end:concurrency]


# --8<-- [start:hooks]
@app.on_startup
def connect() -> None:
    """Once in each process that handles messages, before the first one: open connections here."""


@app.on_shutdown
def disconnect() -> None:
    """When such a process ends in order. The work horses of a plain `rq worker` do not."""


# --8<-- [end:hooks]
