"""Notes each message in its output; a message "stuck" holds its handler for ever. Its topic is said by the environment."""

import os
import threading

from flowkit import Flowkit

app = Flowkit("steady", kafka={"session_timeout": 6, "heartbeat_interval": 1}, shutdown_timeout=2)


@app.topic(os.environ["STEADY_IN"], group=os.environ["STEADY_IN"], inline=os.environ.get("STEADY_INLINE", "1") == "1")
def note(word: str) -> None:
    print("got", word, flush=True)
    if word == "stuck":
        threading.Event().wait()
