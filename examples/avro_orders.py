"""Avro and JSON Schema with a schema registry. Needs: pip install 'flowkit-kafka[registry]'."""

import os
from dataclasses import dataclass
from decimal import Decimal

from flowkit import Flowkit
from flowkit.parsers.registry import Avro, JsonSchema

app = Flowkit("avro-orders", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")
REGISTRY = os.environ.get("REGISTRY", "http://127.0.0.1:8081")

# --8<-- [start:avro]
MONEY = {"type": "bytes", "logicalType": "decimal", "precision": 12, "scale": 2}
INVOICE = {
    "type": "record",
    "name": "Invoice",
    "fields": [{"name": "order", "type": "long"}, {"name": "total", "type": MONEY}],
}


@dataclass
class Order:
    id: int
    prices: list[Decimal]


@dataclass
class Invoice:
    order: int
    total: Decimal


@app.topic("orders", parser=Avro(REGISTRY))  # read as each message was written
@app.responds_to("invoices", parser=Avro(REGISTRY, schema=INVOICE))
def bill(order: Order) -> Invoice:
    return Invoice(order.id, sum(order.prices, Decimal(0)))


# --8<-- [end:avro]


# --8<-- [start:json]
@dataclass
class Visit:
    page: str
    seconds: float


@app.topic("visits", parser=JsonSchema(REGISTRY, schema=Visit))
def count(visit: Visit) -> None:
    print(f"{visit.page}: {visit.seconds} s")


# --8<-- [end:json]
