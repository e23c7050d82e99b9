"""Payments that are booked exactly once, from Kafka to Kafka.

flowkit topics exactly:app --create
flowkit run exactly:app
"""

# --8<-- [start:app]
from flowkit import Flowkit

app = Flowkit("exactly", kafka={"hosts": ["127.0.0.1:9092"]}, inline=True)


@app.topic("payments", transactional=True)
@app.responds_to("bookings", multiple_usage=True)
def book(payment: dict[str, str]) -> None:
    app.respond_to("bookings", {"account": payment["from"], "side": "debit"}, key=payment["from"])
    app.respond_to("bookings", {"account": payment["to"], "side": "credit"}, key=payment["to"])


# --8<-- [end:app]
