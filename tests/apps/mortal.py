"""An application whose messages say whether they can be handled; for tests of dead letters."""

import os
from dataclasses import dataclass

from flowkit import Flowkit, Retry

PREFIX = os.environ["MORTAL_PREFIX"]
MENDED = os.environ.get("MORTAL_MENDED", "")
INLINE = os.environ.get("MORTAL_INLINE", "1") == "1"

options = {"inline": INLINE} if INLINE else {"queue": f"{PREFIX}queue"}
if "MORTAL_END" in os.environ:
    options["on_poison"] = os.environ["MORTAL_END"]
elif "MORTAL_NOWHERE" not in os.environ:
    options["dead_letter"] = "{topic}.dead"
if "MORTAL_LIMIT" in os.environ:
    options["dead_letter_limit"] = int(os.environ["MORTAL_LIMIT"])


@dataclass
class Order:
    n: int
    bad: bool = False
    x: str = ""


app = Flowkit("mortal", retry=Retry(attempts=2, first=0.01))


@app.topic(f"{PREFIX}in", **options)
@app.responds_to(f"{PREFIX}out")
def handle(message: Order) -> None:
    if message.bad and not (MENDED and os.path.exists(MENDED)):
        raise ValueError(f"{message.n} is bad")
    app.respond_to(f"{PREFIX}out", message.n)
