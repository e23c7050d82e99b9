"""What Django reads when ``flowkit.contrib.django`` is in INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig


class FlowkitConfig(AppConfig):
    """Only brings the command: there are no models."""

    name = "flowkit.contrib.django"
    label = "flowkit"
    verbose_name = "flowkit"
