"""Monitors for Sentry and New Relic. Each needs the package of its service, and the service's own settings."""

from typing import Any

import newrelic.agent
import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from flowkit import Flowkit, Monitor


class SentryMonitor(Monitor):
    """Every error goes to Sentry, with what is known of the message. ``Flowkit(..., monitor=SentryMonitor)``"""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        ignore_logger(logger.name)  # else Sentry would make a second issue of the log line

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None:
        super().notice_error(event, error, **details)  # the log line, as usual
        with sentry_sdk.new_scope() as scope:
            scope.set_level("error" if details.get("last", True) else "warning")  # it is tried again
            scope.set_tag("flowkit.event", event)
            scope.set_tag("kafka.topic", details.get("topic"))
            scope.set_context("kafka", {name: details[name] for name in details if name != "traceback"})
            sentry_sdk.capture_exception(error)


def with_sentry(app: Flowkit) -> None:
    """Call it after ``sentry_sdk.init(...)``: the processes of `flowkit worker` end too quickly for what Sentry still holds."""
    app.on_shutdown(lambda: sentry_sdk.flush(timeout=5.0))


class NewRelicMonitor(Monitor):
    """Counts of messages as custom metrics, and failed attempts as errors. ``Flowkit(..., monitor=NewRelicMonitor)``"""

    def consumed(self, **details: Any) -> None:
        self._count("Consumed", details)

    def queued(self, **details: Any) -> None:
        self._count("Queued", details)

    def performed(self, **details: Any) -> None:
        self._count("Performed", details)

    def dead(self, **details: Any) -> None:
        self._count("Dead", {**details, "count": 1})

    def failed(self, **details: Any) -> None:
        error = details.pop("error")
        self._count("Failed", {**details, "count": 1})
        newrelic.agent.notice_error(
            (type(error), error, error.__traceback__),
            attributes={name: details.get(name) for name in ("topic", "partition", "offset", "attempt", "last")},
            application=newrelic.agent.application(),
        )

    def _count(self, what: str, details: dict[str, Any]) -> None:
        name = f"Custom/Kafka/{what}/{details['topic']}"
        # The application is named, because a consumer is not inside one of New Relic's transactions.
        newrelic.agent.record_custom_metric(name, details["count"], application=newrelic.agent.application())


def with_new_relic(app: Flowkit) -> None:
    """Call it after ``newrelic.agent.initialize(...)``. `flowkit worker` forks, and New Relic's threads do not outlive a fork:
    so each process registers when it starts, and gives away what it has when it ends.
    """
    app.on_startup(lambda: newrelic.agent.register_application(timeout=10.0))
    app.on_shutdown(lambda: newrelic.agent.shutdown_agent(timeout=5.0))
