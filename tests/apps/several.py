"""Says which process handles which message, and does what that one says. Its names come from the environment."""

import os
import signal
import threading
import time
from typing import Any

from flowkit import Flowkit

app = Flowkit("several", inline=True, kafka={"session_timeout": 6, "heartbeat_interval": 1, "max_poll_records": 20})

print(os.environ.get("SEVERAL_PRINTS", ""))

if os.environ.get("SEVERAL_THREAD"):
    threading.Thread(target=time.sleep, args=(3600,), name="made-at-import", daemon=True).start()


def killed_before() -> bool:
    """Whether a process has come here before this one."""
    try:
        os.close(os.open(os.environ["SEVERAL_MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    return False


@app.on_startup
def begin() -> None:
    if os.environ.get("SEVERAL_STARTUP") == "fails":
        raise OSError("as the environment asks")


@app.topic(os.environ["SEVERAL_IN"], group=os.environ["SEVERAL_IN"])
def note(task: dict[str, Any]) -> None:
    do = task.get("do")
    if do == "die" and not killed_before():
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "exit" and not killed_before():
        os._exit(task["code"])
    if do == "fail" or (do == "stop" and not killed_before()):
        raise ValueError("as asked")
    if do == "hang":
        print("hangs", os.getpid(), flush=True)
        threading.Event().wait()
    time.sleep(task.get("seconds", 0))
    os.write(1, b"handled %d %d\n" % (task["n"], os.getpid()))  # one write, or lines of two processes may mix
