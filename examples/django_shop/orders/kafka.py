"""The messages of the shop: ``python manage.py flowkit run`` and ``... flowkit worker``. Views send theirs with ``app`` too."""

from dataclasses import dataclass

from flowkit.contrib.django import DjangoFlowkit, setup

setup("website.settings")  # before models: `flowkit run` and RQ's workers start here, not in manage.py

from orders.models import Order  # noqa: E402

app = DjangoFlowkit("django-shop", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")


@dataclass
class Placed:
    id: int


@dataclass
class Payment:
    order: int
    amount: float


@app.topic("django-orders", inline=True)
@app.responds_to("django-parcels")
def pack(placed: Placed) -> None:
    order = Order.objects.get(pk=placed.id)
    order.packed = True
    order.save(update_fields=["packed"])
    app.respond_to("django-parcels", {"order": order.pk, "for": order.user}, key=order.user)


@app.topic("django-payments", queue="django-shop")  # in an RQ worker
def settle(payment: Payment) -> None:
    Order.objects.filter(pk=payment.order, total__lte=payment.amount).update(paid=True)
