"""Writes down each message that it has handled, which takes 20 ms."""

import os
import time

from flowkit import Flowkit

app = Flowkit("shop")
ledger = os.open(os.environ["SLOW_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.topic("orders")
def note(number: int) -> None:
    time.sleep(0.02)
    os.write(ledger, b"%d\n" % number)
