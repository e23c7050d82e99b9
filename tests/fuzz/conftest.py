"""Profiles of hypothesis: few examples, the same in every run, for `make test`; many new ones for `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "flowkit",
    max_examples=120,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "flowkit-many",
    max_examples=int(os.environ.get("FLOWKIT_FUZZ", "5000")),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flowkit-many" if os.environ.get("FLOWKIT_FUZZ") else "flowkit")
