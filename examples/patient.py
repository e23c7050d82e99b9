"""What becomes of messages that cannot be handled.

flowkit topics patient:app --create
flowkit run patient:app
flowkit dead list patient:app
"""

from flowkit import Flowkit, Retry


class InvoiceUnknown(Exception):
    """There is no such invoice, now or later."""


# --8<-- [start:app]
app = Flowkit(
    "patient",
    kafka={"hosts": ["127.0.0.1:9092"]},
    inline=True,
    retry=Retry(attempts=4, first=1, factor=3, cap=60, never=InvoiceUnknown),
    dead_letter="{topic}.dead",
    dead_letter_limit=50,
)


@app.topic("payments")
def pay(payment: dict[str, int]) -> None:
    if payment["invoice"] > 1000:
        raise InvoiceUnknown(payment["invoice"])  # to payments.dead at once


@app.topic("mails", retry_topic="{topic}.retry")  # one that fails does not hold up the others
def mail(mail: dict[str, str]) -> None: ...


@app.topic("clicks", on_poison="skip")  # not worth keeping
def count(click: dict[str, str]) -> None: ...


@app.topic("postings", on_poison="stop")  # none may be left out, and a person is to look
def post(posting: dict[str, int]) -> None: ...


# --8<-- [end:app]
