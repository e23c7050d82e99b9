"""Payments into a database, many in one transaction.

flowkit topics ledger:app --create
flowkit run ledger:app
"""

import os
import sqlite3
from dataclasses import dataclass

from flowkit import BatchError, Flowkit

app = Flowkit("ledger", kafka={"hosts": ["127.0.0.1:9092"]}, inline=True, dead_letter="{topic}.dead")
database = sqlite3.connect(os.environ.get("LEDGER", "ledger.db"), check_same_thread=False)


@app.on_startup
def prepare() -> None:
    database.execute("CREATE TABLE IF NOT EXISTS payments (id INTEGER PRIMARY KEY, cents INTEGER CHECK (cents > 0))")


# --8<-- [start:batch]
@dataclass
class Payment:
    id: int
    cents: int


@app.topic("payments", batch=True, max_batch=1000, batch_wait=0.5)
def store(payments: list[Payment]) -> None:
    with database:  # one transaction: committed at its end, unless something is raised
        rows = [(payment.id, payment.cents) for payment in payments]
        database.executemany("INSERT OR IGNORE INTO payments VALUES (?, ?)", rows)


# --8<-- [end:batch]


# --8<-- [start:index]
@app.topic("refunds", batch=True)
def pay_back(refunds: list[Payment]) -> None:
    for index, refund in enumerate(refunds):
        try:
            with database:
                database.execute("DELETE FROM payments WHERE id = ?", (refund.id,))
        except sqlite3.Error as error:
            raise BatchError(index) from error  # those before it are done


# --8<-- [end:index]
