"""Bytes in, the same bytes out, by way of a queue: one route for each interchanger. BINARY starts the names of the topics."""

import os

from flowkit import Flowkit, Message
from flowkit.interchangers import Base64, Zlib, Zstd
from flowkit.parsers import Raw

PREFIX = os.environ["BINARY"]

app = Flowkit("binary", kafka={"session_timeout": 6, "heartbeat_interval": 1})


def echo(message: Message) -> None:
    headers = {"via": message.topic.removeprefix(PREFIX), "worker": os.environ.get("WORKER", "")}
    app.respond_to(f"{PREFIX}out", message.value, key=message.key, headers=headers)


app.add_response(echo, f"{PREFIX}out")
for name, interchanger in {"plain": None, "base64": Base64, "zlib": Zlib(), "zstd": Zstd()}.items():
    options = {} if interchanger is None else {"interchanger": interchanger}
    app.add_topic(f"{PREFIX}{name}", echo, parser=Raw, group=f"{PREFIX}binary", **options)
