"""Settings of the project: as small as Django lets them be. The last lines are for flowkit."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
SECRET_KEY = os.environ.get("SECRET_KEY", "for development only")
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "testserver"]
ROOT_URLCONF = "website.urls"
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", BASE_DIR / "db.sqlite3"),
        "CONN_MAX_AGE": 60,  # seconds; None keeps a connection for good
        "CONN_HEALTH_CHECKS": True,  # looks at a kept connection before its next use
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},  # the web server and the consumer both write
    }
}

# --8<-- [start:flowkit]
INSTALLED_APPS = ["orders", "flowkit.contrib.django"]

FLOWKIT_APP = "orders.kafka:app"  # what `python manage.py flowkit ...` runs
# --8<-- [end:flowkit]
