"""Topics that are made as the application says: `flowkit topics declared:app --create`."""

from datetime import timedelta
from typing import Any

from flowkit import Flowkit

app = Flowkit("billing", kafka={"hosts": "127.0.0.1:9092", "partitions": 3})


@app.topic("orders", inline=True, dead_letter="orders.dead")
@app.responds_to("invoices")
def bill(order: dict[str, Any]) -> dict[str, Any]:
    return {"order": order["id"]}


# --8<-- [start:declare]
app.declare_topic("orders", partitions=6)
app.declare_topic("invoices", config={"cleanup.policy": "compact"})
app.declare_topic("orders.dead", config={"retention.ms": timedelta(days=90) // timedelta(milliseconds=1)})
# --8<-- [end:declare]
