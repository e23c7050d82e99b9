"""Earthquakes: raw readings in; a summary of its region and, for a strong one, an alert out; alerts become notices.

Readings are handled in the consumer, in order, keyed by region, so that one process sees all of a region. Notices are
written by RQ workers. The readings in data/quakes.jsonl are real: see data/README.md.

Try it: make demo, or: flowkit dev quakes:app
and then: flowkit send quakes:app readings --file data/quakes.jsonl --key-field region
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime

from flowkit import Flowkit

app = Flowkit("quakes", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")

STRONG = 5.0


@dataclass
class Reading:
    id: str
    time: datetime
    magnitude: float
    place: str
    region: str
    longitude: float
    latitude: float
    depth_km: float


@dataclass
class Summary:
    """What this process has seen of a region since it started."""

    region: str = ""
    quakes: int = 0
    strongest: float = -10.0
    where: str = ""


summaries: dict[str, Summary] = defaultdict(Summary)


@app.topic("readings", inline=True)
@app.responds_to("regions")
@app.responds_to("alerts", required=False)
def read(reading: Reading) -> None:
    summary = summaries[reading.region]
    summary.region = reading.region
    summary.quakes += 1
    if reading.magnitude > summary.strongest:
        summary.strongest, summary.where = reading.magnitude, reading.place
    app.respond_to("regions", summary, key=reading.region)
    if reading.magnitude >= STRONG:
        app.respond_to("alerts", reading, key=reading.id)


@app.topic("alerts")
@app.responds_to("notices")
def notify(quake: Reading) -> str:
    when = quake.time.strftime("%d %B %Y, %H:%M UTC")
    return f"Magnitude {quake.magnitude:.1f}, {quake.place}, {when}, {quake.depth_km:.0f} km deep"
