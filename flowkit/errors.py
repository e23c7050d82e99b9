"""Everything flowkit raises on purpose, as one tree:

FlowkitError
├── ConfigurationError          the application is written or configured wrongly
│   ├── SettingsError           one or more settings are missing or wrong
│   ├── AppNotFound             ``module:attribute`` does not lead to an application
│   └── AlreadyStarted          registered after the application had started
├── ParserError                 a value is not what the parser understands
│   └── PayloadError            a value was parsed, but is not what the handler's annotation asks for
├── ResponseError               a handler responded in a way it did not declare
│   ├── ResponseMissing
│   ├── ResponseRepeated
│   └── ResponseUnregistered
├── BatchError                  a batch handler names the message that failed
├── HandlerExit                 a handler called ``sys.exit()``
├── RouteNotFound               a message or a job for a topic that no handler is registered for
├── DeliveryError               Kafka did not confirm a message
├── QueueError                  a message could not be handed to its queue, or read back from it
├── BrokerUnavailable           no Kafka broker answers
├── RedisUnavailable            Redis does not answer
├── RegistryUnavailable         a schema registry does not answer, or does not let the application in
├── Stopped                     the application was told to stop when that happens
│   ├── DeadLetterLimit         too many dead letters one after the other
│   ├── MessagesGone            messages were deleted before they were read
│   ├── PoisonMessage           a message failed every attempt, and ``on_poison`` is "stop"
│   └── Displaced               another process took this one's place, with the same ``kafka.group_instance_id``
├── DaemonError                 a daemon runs already, or did not end, or not as it should
└── DevStackError               an embedded broker or Redis could not be started
"""

from __future__ import annotations


class FlowkitError(Exception):
    """Base of every error that flowkit raises on purpose.

    ``passing``: the failure is no fault of the message in hand and may end by itself (a server is away), so it is no attempt
    of that message. A parser or handler may raise an error of its own kind with ``passing = True``.
    """

    passing = False


class ConfigurationError(FlowkitError):
    """The application is written or configured wrongly."""


class SettingsError(ConfigurationError):
    """One or more settings are missing or wrong. ``mistakes`` lists them all."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        lines = "\n".join(f"  - {mistake}" for mistake in mistakes)
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"the settings have {count}:\n{lines}")


class AppNotFound(ConfigurationError):
    """``module:attribute`` does not lead to a flowkit application."""


class AlreadyStarted(ConfigurationError):
    """A handler, response or hook was registered after the application had started."""


class ParserError(FlowkitError):
    """A value is not what the parser understands. Parsers raise it, or a subclass of it."""


class PayloadError(ParserError):
    """A value was parsed, but is not what the handler's annotation asks for."""


class ResponseError(FlowkitError):
    """A handler responded in a way that it did not declare."""


class ResponseMissing(ResponseError):
    """A required topic got no response."""


class ResponseRepeated(ResponseError):
    """A topic declared for one response got more."""


class ResponseUnregistered(ResponseError):
    """A response to a topic that was not declared."""


class BatchError(FlowkitError):
    """Raised by a batch handler: the message at this place of its list (0 is the first) has failed, those before it are done.

    ``raise BatchError(3) from error`` says why; else this error is why.
    """

    def __init__(self, index: int, text: str = "") -> None:
        self.index = index
        super().__init__(text or f"message {index} of the batch failed")


class HandlerExit(FlowkitError):
    """A handler called ``sys.exit()``: that attempt of its message has failed."""


class RouteNotFound(FlowkitError):
    """A message or a job belongs to a topic that no handler is registered for."""


class DeliveryError(FlowkitError):
    """Kafka did not confirm a message.

    ``passing`` where that may change by itself (no answer, no such topic yet): such a failure is no attempt of a message.
    ``with_another`` where it was not refused itself, but ended together with one that was.
    """

    def __init__(self, message: str, *, passing: bool = False, with_another: bool = False) -> None:
        super().__init__(message)
        self.passing = passing or with_another
        self.with_another = with_another


class QueueError(FlowkitError):
    """A message could not be handed to its queue, or could not be read back from it."""


class BrokerUnavailable(FlowkitError):
    """No Kafka broker answers."""

    passing = True


class RedisUnavailable(FlowkitError):
    """Redis does not answer."""


class RegistryUnavailable(FlowkitError):
    """A schema registry does not answer, or does not let the application in."""

    passing = True


class Stopped(FlowkitError):
    """Something happened at which the application is to stop. Nothing is lost by it."""


class DeadLetterLimit(Stopped):
    """So many dead letters one after the other as ``dead_letter_limit`` says."""


class MessagesGone(Stopped):
    """Messages were deleted before they were read. It stops the application only if ``auto_offset_reset`` is "none"."""


class PoisonMessage(Stopped):
    """A message failed every attempt, and its route says ``on_poison="stop"``."""


class Displaced(Stopped):
    """Another process took this one's place in its group, with the same ``kafka.group_instance_id``."""


class DaemonError(FlowkitError):
    """A daemon runs already, or did not end, or not as it should."""


class DevStackError(FlowkitError):
    """An embedded broker or Redis could not be started."""


def missing_package(what: str, package: str, extra: str) -> ConfigurationError:
    """The error of a feature whose package is not installed."""
    return ConfigurationError(f"{what} needs the package {package}: pip install 'flowkit-kafka[{extra}]'")


def is_passing(error: BaseException) -> bool:
    """Whether the absence of Kafka or the like is all that failed: no fault of the message, and so no attempt of it."""
    return isinstance(error, FlowkitError) and error.passing
