"""A shop with an asynchronous web side: FastAPI takes the orders, flowkit handles their messages. Needs fastapi and uvicorn.

Try it: uvicorn fastapi_shop:api, and flowkit dev fastapi_shop:app
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from flowkit import DeliveryError, Flowkit

app = Flowkit("fastapi-shop", kafka={"hosts": "127.0.0.1:9092"}, inline=True)


class Order(BaseModel):
    id: int
    user: str
    total: float


# --8<-- [start:send]
@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(app.producer.close)  # what is under way goes out first


api = FastAPI(lifespan=lifespan)


@api.post("/orders", status_code=202)
async def take(order: Order) -> dict[str, int]:
    # In a thread, because send waits for Kafka, and the event loop has other requests.
    await asyncio.to_thread(app.producer.send, "fastapi-orders", order.model_dump(), key=order.user)
    return {"accepted": order.id}


@api.exception_handler(DeliveryError)
async def kafka_is_away(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=503)
    # --8<-- [end:send]


@api.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.topic("fastapi-orders")
@app.responds_to("fastapi-invoices")
def bill(order: Order) -> dict[str, float]:  # the model of the request is that of the message
    return {"order": order.id, "total": order.total}
