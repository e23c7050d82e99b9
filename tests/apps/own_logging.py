"""An application that sets up logging itself, and cannot start."""

import logging

from flowkit import Flowkit

logging.basicConfig(format="MINE %(message)s", level="INFO")

app = Flowkit("own_logging", kafka={"hosts": "127.0.0.1:1"}, inline=True)


@app.topic("numbers")
def handle(number: int) -> None: ...


@app.on_startup
def connect() -> None:
    logging.getLogger("shop").info("connecting")
    try:
        open_database()
    except ConnectionError as error:
        raise RuntimeError("no database, no work") from error


def open_database() -> None:
    raise ConnectionRefusedError("the database said no")
