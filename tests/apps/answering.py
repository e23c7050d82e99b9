"""An inline handler that answers each message with what it returns, ``size`` bytes and more; or with its ``key``."""

import os

from flowkit import Flowkit, Retry

app = Flowkit(
    "answering",
    kafka={"offset_commit_interval": 0.2},
    retry=Retry(attempts=2, first=0.2, factor=1),
    dead_letter=os.environ["ANSWERING_DEAD"],
    inline=True,
)


@app.topic(os.environ["GUARDED_IN"], group=os.environ["GUARDED_IN"])
@app.responds_to(os.environ["GUARDED_OUT"])
def answer(order: dict) -> dict | None:
    data = {"n": order["n"], "padding": "x" * order["size"]}
    if "key" not in order:
        return data
    app.respond_to(os.environ["GUARDED_OUT"], data, key=order["key"])
    return None
