"""Says when its configurators and hooks run; one inline topic, one queued."""

import os

from flowkit import Flowkit, Settings

app = Flowkit(os.environ.get("CONFIGURED_NAME", "configured"), retry=1)
INLINE, QUEUED = os.environ.get("CONFIGURED_INLINE", "inline"), os.environ.get("CONFIGURED_QUEUED", "queued")


@app.configurator
def first(settings: Settings) -> None:
    print(f"first configurator: {settings.name} in {settings.env}, {len(settings.kafka.hosts)} host", flush=True)


@app.configurator
def second() -> None:
    print("second configurator", flush=True)


@app.on_startup
def startup() -> None:
    print("startup", flush=True)


@app.topic(INLINE, inline=True)
def inline(value: int) -> None:
    print(f"inline {value}", flush=True)


@app.topic(QUEUED)
def queued(value: int) -> None:
    print(f"queued {value}", flush=True)
