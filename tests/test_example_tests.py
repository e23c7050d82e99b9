"""The tests that stand beside the examples, run as their author would run them."""

from __future__ import annotations

import re
from pathlib import Path

from commands import python

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_tests_of_the_examples_pass() -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py", cwd=EXAMPLES)
    written = len(re.findall(r"^def test_", (EXAMPLES / "test_shop.py").read_text(), re.M))
    assert done.code == 0, done.out + done.err
    assert f"{written} passed" in done.out
