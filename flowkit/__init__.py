"""flowkit: a decorator microframework for applications made of Kafka messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import Flowkit
    from .errors import (
        AlreadyStarted,
        AppNotFound,
        BatchError,
        BrokerUnavailable,
        ConfigurationError,
        DaemonError,
        DeadLetterLimit,
        DeliveryError,
        DevStackError,
        Displaced,
        FlowkitError,
        HandlerExit,
        MessagesGone,
        ParserError,
        PayloadError,
        PoisonMessage,
        QueueError,
        RedisUnavailable,
        RegistryUnavailable,
        ResponseError,
        ResponseMissing,
        ResponseRepeated,
        ResponseUnregistered,
        RouteNotFound,
        SettingsError,
        Stopped,
    )
    from .message import Headers, Message
    from .monitor import Monitor
    from .retry import Retry
    from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AlreadyStarted",
    "AppNotFound",
    "BatchError",
    "BrokerUnavailable",
    "ConfigurationError",
    "DaemonError",
    "DeadLetterLimit",
    "DeliveryError",
    "DevStackError",
    "Displaced",
    "Flowkit",
    "FlowkitError",
    "HandlerExit",
    "Headers",
    "Message",
    "MessagesGone",
    "Monitor",
    "ParserError",
    "PayloadError",
    "PoisonMessage",
    "QueueError",
    "RedisUnavailable",
    "RegistryUnavailable",
    "ResponseError",
    "ResponseMissing",
    "ResponseRepeated",
    "ResponseUnregistered",
    "Retry",
    "RouteNotFound",
    "Settings",
    "SettingsError",
    "Stopped",
]

_MODULES = {
    "Flowkit": "app",
    "Headers": "message",
    "Message": "message",
    "Monitor": "monitor",
    "Retry": "retry",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562): pytest loads our plugin, and so this, in every run."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
