"""An inline route of flowkit that does next to nothing, or answers with what it was given."""

import os
from typing import Any

from witness import witness

from flowkit import Flowkit

app = Flowkit("bench", inline=True)
take = witness().take
topic, out = os.environ["BENCH_TOPIC"], os.environ["BENCH_OUT"]

if os.environ["BENCH_CASE"] == "respond":

    @app.topic(topic, group=os.environ["BENCH_GROUP"])
    @app.responds_to(out)
    def respond(data: dict[str, Any]) -> dict[str, Any]:
        take(data)
        return data

else:
    app.add_topic(topic, take, group=os.environ["BENCH_GROUP"])
