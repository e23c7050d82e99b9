"""The web side. A message goes out only when the row it tells of is committed."""

import json

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt

from .kafka import app
from .models import Order


# --8<-- [start:create]
@csrf_exempt
@transaction.atomic
def create(request: HttpRequest) -> JsonResponse:
    data = json.loads(request.body)
    order = Order.objects.create(user=data["user"], total=data["total"])
    # Not before the commit: the consumer is quick, and would not find the row yet. Not at all if it is rolled back.
    transaction.on_commit(lambda: app.producer.send("django-orders", {"id": order.pk}, key=order.user))
    if data["total"] <= 0:
        raise ValueError(f"a total of {data['total']} is no order")
    return JsonResponse({"id": order.pk}, status=201)
    # --8<-- [end:create]


def show(request: HttpRequest, number: int) -> JsonResponse:
    order = get_object_or_404(Order, pk=number)
    return JsonResponse({"id": order.pk, "user": order.user, "packed": order.packed, "paid": order.paid})
