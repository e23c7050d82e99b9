"""Clicks into Parquet files, one for each batch.

flowkit topics lake:app --create
flowkit run lake:app
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from flowkit import Flowkit, Message

app = Flowkit(
    "lake",
    kafka={"hosts": ["127.0.0.1:9092"], "max_poll_records": 20_000},
    inline=True,
    dead_letter="{topic}.dead",
)
folder = Path(os.environ.get("LAKE", "clicks"))


# --8<-- [start:columns]
SCHEMA = pa.schema({"user": pa.string(), "page": pa.string(), "seconds": pa.float64()})


@app.topic("clicks", batch=True, max_batch=20_000, batch_wait=5)
def store(messages: list[Message]) -> None:
    table = pa.Table.from_pylist([message.payload for message in messages], schema=SCHEMA)
    table = table.append_column("offset", pa.array([message.offset for message in messages]))
    first = messages[0]
    path = folder / f"{first.partition}-{first.offset:012}.parquet"
    pyarrow.parquet.write_table(table, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)  # there as a whole, or not at all


# --8<-- [end:columns]


@app.on_startup
def make_folder() -> None:
    folder.mkdir(parents=True, exist_ok=True)
