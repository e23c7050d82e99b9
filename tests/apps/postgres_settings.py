"""The settings of examples/django_shop with a PostgreSQL, whose connections are kept for good."""

import json
import os

from website.settings import *  # noqa: F403

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        **json.loads(os.environ["POSTGRES"]),
        "CONN_MAX_AGE": None,
        "CONN_HEALTH_CHECKS": False,
    }
}
