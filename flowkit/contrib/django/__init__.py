"""flowkit in a Django project: ``"flowkit.contrib.django"`` in INSTALLED_APPS gives ``python manage.py flowkit run``.

from flowkit.contrib.django import DjangoFlowkit, setup

setup("website.settings")                 # before models are imported
from orders.models import Order

app = DjangoFlowkit("shop", kafka={"hosts": "127.0.0.1:9092"})
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from ...app import Flowkit
from ...errors import missing_package
from ...route import Handler, TopicOptions
from ...signature import is_async

try:
    import django
    from asgiref.sync import sync_to_async
    from django.apps import apps as registry  # our own module apps would take the name
    from django.db import connections
except ModuleNotFoundError as error:
    raise missing_package("flowkit.contrib.django", "Django", "django") from error

__all__ = ["DjangoFlowkit", "close_old_connections", "fresh_connections", "setup"]

F = TypeVar("F", bound=Callable[..., Any])


def setup(settings: str) -> None:
    """Makes Django ready where nobody has done so: under ``flowkit run`` and in RQ's workers.

    Call it at the top of the module that has the handlers, before models are imported. Under ``manage.py`` and in a web
    server, where Django is ready by then, it changes nothing. ``settings`` is the settings module, such as
    ``website.settings``; the environment variable DJANGO_SETTINGS_MODULE wins.
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", settings)
    if not registry.models_ready:
        django.setup()


def close_old_connections() -> None:
    """Closes this thread's database connections that are broken, or older than CONN_MAX_AGE.

    What Django does around each request, except that a connection inside a transaction is left alone: there it belongs to
    somebody, in tests to the test itself.
    """
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


def fresh_connections(function: F) -> F:
    """Wraps a function, or an async one, so that it begins and ends as a request does: without old connections.

    ``DjangoFlowkit`` does it for handlers and hooks; for a plain ``Flowkit`` put it below ``@app.topic(...)``.
    """
    if not callable(function):
        return function  # whoever takes it refuses it, and knows its topic
    wrapper: Any
    if is_async(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            close = sync_to_async(close_old_connections)  # in the thread where async code has its connections
            await close()
            try:
                return await function(*args, **kwargs)
            finally:
                await close()

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            close_old_connections()
            try:
                return function(*args, **kwargs)
            finally:
                close_old_connections()

    if not hasattr(function, "__qualname__"):  # an object with __call__: messages name it as they would without us
        wrapper.__qualname__ = repr(function)
    return wrapper  # type: ignore[no-any-return]


class DjangoFlowkit(Flowkit):
    """A ``Flowkit`` whose handlers and hooks may use Django's ORM for as long as the process lives.

    Around each call, in consumers and workers alike, it closes database connections that are broken or older than
    CONN_MAX_AGE, so a restart of the database costs at most one attempt of a message; with CONN_HEALTH_CHECKS none.
    """

    def add_topic(self, name: str, handler: Handler, **options: Unpack[TopicOptions]) -> None:
        super().add_topic(name, fresh_connections(handler), **options)

    if not TYPE_CHECKING:  # for a type checker they are as in Flowkit

        def before_enqueue(self, *topics: Any) -> Any:
            return _wrapped(super().before_enqueue, topics)

        def after_failure(self, *topics: Any) -> Any:
            return _wrapped(super().after_failure, topics)


def _wrapped(register: Callable[..., Any], topics: tuple[Any, ...]) -> Any:
    """Registers a hook as ``register`` does, with or without topics, but wrapped; gives it back unchanged."""
    if len(topics) == 1 and callable(topics[0]):
        register(fresh_connections(topics[0]))
        return topics[0]
    add = register(*topics)

    def decorator(function: F) -> F:
        add(fresh_connections(function))
        return function

    return decorator
