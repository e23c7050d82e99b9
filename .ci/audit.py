"""What flowkit depends on, looked at: does what is installed fit together, is a known vulnerability in it, and do the lowest
versions that setup.cfg allows work?

    python .ci/audit.py            the first two, of the environment that runs it
    python .ci/audit.py --lowest   the third, in an environment of its own

A known vulnerability, a conflict, or a lowest version that does not work exits with 1. An advisory service that is away, or
that knows none of the packages, is no failure of theirs: then it says "not audited", and why.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("msgpack", "xml", "zstd", "web", "confluent")
"""The extras whose lowest versions are tried: those that are pure Python or have wheels for every Python since 3.11."""

PATIENCE = 50
"""Seconds that the advisory service may take altogether."""

SMOKE = """
from flowkit import Flowkit
from flowkit.cli import cli
from flowkit.clients import confluent, confluent_producer, kafka_admin, kafka_python
from flowkit.interchangers import Zstd
from flowkit.parsers.msgpack import MessagePack
from flowkit.parsers.xml import Xml
from flowkit.queues import connect
from flowkit.testing import Client
from flowkit.web import pages
from flowkit.worker import Worker
from dataclasses import dataclass

@dataclass
class Order:
    id: int

app = Flowkit("shop", kafka={"hosts": "127.0.0.1:1"}, redis="redis://127.0.0.1:1/0")

@app.topic("orders", interchanger=Zstd())
@app.responds_to("invoices", parser=MessagePack)
def bill(order: Order) -> dict[str, int]:
    return {"order": order.id}

connect("redis://127.0.0.1:1/0").close()
with Client(app) as client:
    assert client.send("orders", {"id": 7}).sent("invoices").value == {"order": 7}
assert pages.make_pages(app, pages.Access("x")).test_client().get("/").status_code == 401
"""


def requirements(extras: tuple[str, ...] = ()) -> list[str]:
    """What setup.cfg asks for, one requirement each, without the packages of development."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    return [line.strip() for text in lines for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]


def installed(names: list[str]) -> dict[str, str]:
    """Those packages and all that they need, as far as they are installed: name to version."""
    found: dict[str, str] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", names.pop())[0].lower())  # type: ignore[index]
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = package.version
        names += [line for line in package.requires or () if "extra ==" not in line]
    return found


def fits() -> bool:
    """Whether what is installed fits together, by pip."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    print(f"pip check: {done.stdout.strip() or done.stderr.strip()}")
    return done.returncode == 0


def ask(packages: dict[str, str], timeout: float) -> tuple[dict[str, list[str]], str]:
    """The vulnerabilities that are known of packages, of those that the service knows; and why there is no answer, if so."""
    with tempfile.TemporaryDirectory() as directory:
        names, answer = Path(directory) / "names.txt", Path(directory) / "answer.json"
        names.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [
            "pip_audit",
            "--requirement",
            names,
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--output",
            answer,
        ]
        more = ["--progress-spinner", "off", "--timeout", "5"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command, *more], capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {}, f"the advisory service did not answer within {timeout:.0f} s"
        try:
            found = json.loads(answer.read_text())["dependencies"]
        except (OSError, ValueError, KeyError):
            return (
                {},
                f"pip-audit ended with {done.returncode}: {(done.stderr.strip() or 'no word').splitlines()[-1][:200]}",
            )
    answers = {item["name"]: [flaw["id"] for flaw in item["vulns"]] for item in found if "vulns" in item}
    return answers, "" if answers else "the advisory service knows none of these packages"


def audited() -> bool:
    """Whether no vulnerability is known. One package is asked for first, so that a service that is away is asked once only."""
    packages = installed(requirements((*EXTRAS, "registry", "django", "console")))
    until = time.monotonic() + PATIENCE
    answers, problem = ask({"redis": packages["redis"]}, PATIENCE / 2)
    if not problem:
        answers, problem = ask(packages, until - time.monotonic())
    flaws = {f"{name} {packages.get(name, '')}": found for name, found in answers.items() if found}
    for name, found in flaws.items():
        print(f"vulnerable: {name}: {', '.join(found)}")
    if problem:
        print(f"not audited: {problem} ({len(packages)} packages)")
    else:
        print(f"audited: {len(answers)} of {len(packages)} packages, {len(flaws)} with known vulnerabilities")
    return not flaws


def lowest_works() -> bool:
    """Whether the lowest versions that setup.cfg allows can be installed together, and a message gets through them."""
    pins = [re.sub(r">=([\w.]+)(,<[\w.]+)?", r"==\1", line) for line in requirements(EXTRAS)]
    pins = [re.sub(r"==(\d+)(?=$|;)", r"==\1.0.0", line) for line in pins]
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = Path(directory) / "bin" / "python"
        print(f"lowest: {' '.join(pins)}", flush=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-warn-script-location"]
        if subprocess.run([*install, *pins], check=False).returncode:
            print("lowest: these versions cannot be installed together; raise in setup.cfg what pip names above")
            return False
        smoke = subprocess.run([python, "-W", "ignore", "-c", SMOKE], cwd=ROOT, check=False)
        print("lowest: a message gets through" if smoke.returncode == 0 else "lowest: does not work")
        return smoke.returncode == 0


if __name__ == "__main__":
    works = lowest_works() if "--lowest" in sys.argv[1:] else fits() & audited()
    sys.exit(0 if works else 1)
