"""A shop on the web, in one file: Flask takes the orders, flowkit handles their messages. Needs Flask.

Try it: flask --app flask_shop run, and flowkit dev flask_shop:app
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from flask import Flask, current_app, request

from flowkit import DeliveryError, Flowkit

site = Flask(__name__)
site.config["CURRENCY"] = "EUR"
app = Flowkit("flask-shop", kafka={"hosts": "127.0.0.1:9092"}, inline=True)


# --8<-- [start:send]
@site.post("/orders")
def take() -> tuple[dict[str, Any], int]:
    order = request.get_json()
    app.producer.send("flask-orders", order, key=order["user"])  # returns when Kafka has it
    return {"accepted": order["id"]}, 202


@site.errorhandler(DeliveryError)
def kafka_is_away(error: DeliveryError) -> tuple[dict[str, Any], int]:
    return {"error": str(error)}, 503
    # --8<-- [end:send]


# --8<-- [start:context]
def in_context(handler: Callable[..., Any]) -> Callable[..., Any]:
    """For handlers that use ``current_app``, ``g`` or an extension: each call has an application context of its own."""

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        with site.app_context():
            return handler(*args, **kwargs)

    return call


@app.topic("flask-orders")
@app.responds_to("flask-invoices")
@in_context
def bill(order: dict[str, Any]) -> dict[str, Any]:
    return {"order": order["id"], "amount": f"{order['total']:.2f} {current_app.config['CURRENCY']}"}
    # --8<-- [end:context]


billed: Counter[str] = Counter()


@app.topic("flask-invoices")
def count(invoice: dict[str, Any]) -> None:
    billed[invoice["amount"].split()[1]] += 1
