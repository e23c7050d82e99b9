"""Settings, a configurator, and hooks at the start and the end. Try it: flowkit info configured:app"""

from typing import Any

# --8<-- [start:settings]
from flowkit import Flowkit, Retry, Settings

app = Flowkit(
    "store",
    kafka={"hosts": "127.0.0.1:9092", "offset_commit_interval": 1},
    redis={"url": "redis://127.0.0.1:6379/0", "socket_timeout": 20},
    retry=Retry(attempts=3, first=1, factor=2, cap=60),
    dead_letter="store.dead",
)
# --8<-- [end:settings]

# --8<-- [start:configurator]
TAX = {"rate": 0.0}


@app.configurator
def read_rates(settings: Settings) -> None:
    TAX["rate"] = 0.19 if settings.env == "production" else 0.10


@app.configurator  # in the order in which they are written
def check_rates() -> None:
    if not 0 < TAX["rate"] < 1:
        raise ValueError(f"a tax rate of {TAX['rate']} cannot be right")


# --8<-- [end:configurator]


# --8<-- [start:startup]
DATABASE: list[str] = []


@app.on_startup
def connect() -> None:
    DATABASE.append("connected")


@app.on_shutdown
def disconnect() -> None:
    DATABASE.clear()


# --8<-- [end:startup]


@app.topic("store.orders", inline=True)
@app.responds_to("store.taxes")
def tax(order: dict[str, Any]) -> float:
    return float(order["total"]) * TAX["rate"]
