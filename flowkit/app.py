"""The application: a flat registry of handlers, what they may send, and hooks."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack, overload

from .coroutines import close_loop, finish
from .deadletters import check_ways
from .dispatch import Handling
from .errors import AlreadyStarted, ConfigurationError, ResponseError, RouteNotFound
from .message import Abort, about, place
from .monitor import EVENTS, Guard, Monitor
from .parsers import Json
from .responses import (
    Declarations,
    check_responder,
    current_call,
    declaring,
    respond_with,
    responder_name,
    with_parsers,
)
from .route import (
    OPTIONS,
    RESPONSE_OPTIONS,
    Declaration,
    Handler,
    Responder,
    ResponseOptions,
    Route,
    TopicOptions,
    check_name,
    check_options,
    check_parser,
    name_mistake,
)
from .route_options import check_retry_topics
from .settings import Settings, logger_of, unknown_name, unknown_variables

if TYPE_CHECKING:
    from .clients import ProducerClient
    from .producer import Producer
    from .topics import ConfigValue, TopicDeclaration

F = TypeVar("F", bound=Callable[..., Any])


class Flowkit:
    """An application made of Kafka messages.

    ``Flowkit("shop", kafka={"hosts": "127.0.0.1:9092"}, redis="redis://127.0.0.1:6379/0")``: the keywords are those of
    ``flowkit.Settings``, and environment variables (``FLOWKIT_KAFKA_HOSTS``) win over them. Nothing is checked, imported or
    connected until the application starts.
    """

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        self._given = {"name": name, **settings}
        self._settings: Settings | None = None
        self._routes: dict[str, Route] = {}
        self._declarations: dict[Hashable, dict[str, Declaration]] = {}
        self._declared_topics: dict[str, TopicDeclaration] = {}
        self._before: list[tuple[tuple[str, ...], Handler]] = []
        self._after: list[tuple[tuple[str, ...], Handler]] = []
        self._configurators: list[Handler] = []
        self._startup: list[Handler] = []
        self._shutdown: list[Handler] = []
        self._subscribers: dict[str, list[Handler]] = {}
        self._responders: dict[tuple[Responder, int], Declarations] = {}
        self._handlings: dict[str, Handling] | None = None
        self._started_in = 0
        self._lock = threading.RLock()
        self._producer: Producer | None = None
        self._monitor: Any = None
        self.reference = ""
        """``module:attribute`` by which a worker finds this application; set by whoever found it so."""

    def __repr__(self) -> str:
        return f"<Flowkit {self._given['name'] or self.reference!r}, {len(self._routes)} topics>"

    # Registering.

    def topic(self, name: str, **options: Unpack[TopicOptions]) -> Callable[[F], F]:
        """Registers the decorated function for the messages of the topic ``name``.

        The function takes the payload and, where a parameter is annotated ``Message``, the message. For the options see
        ``TopicOptions``. Raises ``ConfigurationError`` for a name, an option or a second handler that cannot be.
        """
        _check_topic(name, dict(options))  # here, because a decorator without parentheses would never be called

        def decorator(function: F) -> F:
            self.add_topic(name, function, **options)
            return function

        return decorator

    def add_topic(self, name: str, handler: Handler, **options: Unpack[TopicOptions]) -> None:
        """What ``topic`` does, without the decorator."""
        self._check_open(f"topic {name!r}")
        given: dict[str, Any] = dict(options)
        _check_topic(name, given)
        if not callable(handler):
            raise ConfigurationError(f"topic {name!r}: a handler is a function, not {handler!r}")
        if isinstance(handler, type):
            raise ConfigurationError(
                f"topic {name!r}: a handler is a function, and {handler.__qualname__} is a class, of which each message would"
                f" only make an object; register a method of one: app.add_topic({name!r}, {handler.__qualname__}().method)"
            )
        route = Route(name, handler, **given)
        if name in self._routes:
            raise ConfigurationError(
                f"topic {name!r} has a handler already, {self._routes[name].where}; a topic is handled by one function:"
                f" call {route.name} from it, or move one of them to an application of its own group"
            )
        self._routes[name] = route

    def responds_to(self, topic: str, **options: Unpack[ResponseOptions]) -> Callable[[F], F]:
        """Declares that the decorated handler (or responder) sends to ``topic``. For the options see ``ResponseOptions``.

        Raises ``ConfigurationError`` for a name or an option that cannot be.
        """
        _check_decorator("responds_to", topic)
        _check_response(topic, options)

        def decorator(function: F) -> F:
            self.add_response(function, topic, **options)
            return function

        return decorator

    def add_response(self, handler: Handler | Responder, topic: str, **options: Unpack[ResponseOptions]) -> None:
        """What ``responds_to`` does, without the decorator."""
        self._check_open(f"response to {topic!r}")
        check_name("topic", topic)
        _check_response(topic, options)
        if not callable(getattr(handler, "respond", handler)):
            raise ConfigurationError(f"response to {topic!r}: a handler is a function, not {handler!r}")
        if not isinstance(handler, Hashable):
            raise ConfigurationError(f"response to {topic!r}: {handler!r} cannot declare it; let its class do so")
        declared = self._declarations.setdefault(handler, {})
        if topic in declared:
            raise ConfigurationError(
                f"{getattr(handler, '__qualname__', handler)} declares {topic!r} twice; declare it once, with"
                " multiple_usage=True if it sends several messages"
            )
        declared[topic] = Declaration(topic, **options)

    def declare_topic(
        self,
        name: str,
        *,
        partitions: int | None = None,
        replication_factor: int | None = None,
        config: Mapping[str, ConfigValue] | None = None,
    ) -> None:
        """Says how a topic of the cluster is to be: one that is read, sent to, or holds dead letters.

        ``flowkit topics --create`` makes it so, ``flowkit topics --check`` compares; nothing else looks at it. ``config`` are
        Kafka's own settings of a topic, such as ``{"retention.ms": 86400000}``. What is left out is as ``kafka.partitions`` and
        ``kafka.replication_factor`` say, or as the brokers have it. Raises ``ConfigurationError``.
        """
        from .topics import declare

        self._check_open(f"topic {name!r}")
        declaration = declare(name, partitions, replication_factor, config)
        if name in self._declared_topics:
            raise ConfigurationError(f"topic {name!r} is declared twice; declare it once, with all its options")
        self._declared_topics[name] = declaration

    @overload
    def before_enqueue(self, topic: F, /) -> F: ...
    @overload
    def before_enqueue(self, *topics: str) -> Callable[[F], F]: ...
    def before_enqueue(self, *topics: Any) -> Any:
        """Runs the decorated function in the consumer, before a message of these topics (none named: of any) goes on.

        It takes what a handler takes; it may change ``message.payload``, ``message.queue`` and ``message.worker``, and call
        ``app.abort()``. Hooks run in the order they were registered, for inline routes too, and never again in the worker.
        """
        return self._hook(self._before, topics)

    @overload
    def after_failure(self, topic: F, /) -> F: ...
    @overload
    def after_failure(self, *topics: str) -> Callable[[F], F]: ...
    def after_failure(self, *topics: Any) -> Any:
        """Calls the decorated function with the error and, where annotated ``Message``, the message, on every failed
        attempt of these topics (none named: of any)."""
        return self._hook(self._after, topics)

    def _hook(self, hooks: list[tuple[tuple[str, ...], Handler]], topics: tuple[Any, ...]) -> Any:
        self._check_open("a hook")
        if len(topics) == 1 and callable(topics[0]):
            hooks.append(((), topics[0]))
            return topics[0]
        names = tuple(check_name("topic", topic) for topic in topics)

        def decorator(function: F) -> F:
            self._check_open("a hook")
            hooks.append((names, function))
            return function

        return decorator

    def configurator(self, function: F) -> F:
        """Runs the decorated function when the settings are final, before the first connection; it may take them."""
        self._check_open("a configurator")
        self._configurators.append(function)
        return function

    def on_startup(self, function: F) -> F:
        """Runs the decorated function once in each process that handles messages, before the first one."""
        self._check_open("an on_startup hook")
        self._startup.append(function)
        return function

    def on_shutdown(self, function: F) -> F:
        """Runs the decorated function when such a process ends in order. RQ's forked work horses do not."""
        self._check_open("an on_shutdown hook")
        self._shutdown.append(function)
        return function

    def on_event(self, *events: str) -> Callable[[F], F]:
        """Calls the decorated function as ``function(event, **details)`` at each of these events (none named: at all).

        The events and their details are those of ``Monitor``. It runs where the event happens, in the consumer or in the
        worker, so it should be quick; what it raises is logged.
        """
        self._check_open("a subscriber")
        for event in events:
            if event not in EVENTS:
                hint = "; write @app.on_event() for all events" if callable(event) else ""
                raise ConfigurationError(unknown_name("on_event", str(event), EVENTS, "event") + hint)

        def decorator(function: F) -> F:
            self._check_open("a subscriber")
            for event in events or EVENTS:
                self._subscribers.setdefault(event, []).append(function)
            return function

        return decorator

    def _check_open(self, what: str) -> None:
        if self._handlings is not None:
            raise AlreadyStarted(
                f"{what} was registered after the application had started, so it would not be used; register at the"
                " top level of the module, not inside a handler or hook"
            )

    # Inside handlers.

    def respond_to(
        self,
        topic: str,
        data: Any,
        *,
        key: str | bytes | None = None,
        partition: int | None = None,
        partition_key: str | bytes | None = None,
        headers: Any = None,
    ) -> None:
        """Responds to the message in hand: ``data`` goes to ``topic`` when the handler has ended and the check has passed.

        ``data`` goes through the parser of ``responds_to``, or else the route's; text and bytes pass as they are, None is a
        tombstone. ``key`` places and labels the message; ``partition_key`` only places it; ``partition`` names the partition.
        ``headers`` is a dict, or a list of pairs. Raises ``ResponseUnregistered`` for a topic that the handler does not
        declare.
        """
        call = current_call()
        if call is None:
            raise ResponseError(
                f"app.respond_to({topic!r}, ...) answers a message, and there is none here; outside a handler call"
                " app.respond_with(responder, ...) or app.producer.send(topic, value)"
            )
        call.respond_to(topic, data, key=key, partition=partition, partition_key=partition_key, headers=headers)

    def respond_with(self, responder: Responder, *args: Any) -> None:
        """Calls ``responder(*args)``, a function that declares its topics with ``responds_to`` and calls ``respond_to``.

        Its declarations are checked at its end. Inside a handler its responses are sent with the handler's own; outside, it
        sends and waits, and raises ``DeliveryError`` if Kafka does not take them.
        """
        call = current_call()
        parser = call.parser if call is not None else Json
        responses = respond_with(call, responder, self._declarations_for(responder, parser), parser, args)
        if call is None:
            self.producer.send_all(responses)

    def _declarations_for(self, responder: Responder, parser: Any) -> Declarations:
        """What a checked responder declares. Of functions and classes, which are few, it is remembered after the start."""
        key = (responder, id(parser))  # a parser of a route lives as long as the application
        if isinstance(responder, FunctionType | type) and key in self._responders:
            return self._responders[key]
        declarations = with_parsers(self.declarations_of(responder), parser)
        check_responder(responder, declarations, responder_name(responder))
        if isinstance(responder, FunctionType | type) and self._handlings is not None:
            self._responders[key] = declarations
        return declarations

    def abort(self) -> NoReturn:
        """Ends the message in hand: it is done, nothing is queued and nothing is sent."""
        raise Abort

    # What the application is, made ready once.

    @property
    def routes(self) -> Mapping[str, Route]:
        """The routes by topic, in the order they were registered."""
        return self._routes

    @property
    def declared_topics(self) -> Mapping[str, TopicDeclaration]:
        """What ``declare_topic`` was told, by topic."""
        return self._declared_topics

    @property
    def response_topics(self) -> set[str]:
        """Every topic that some handler or responder declares, also a responder that no route names."""
        return {topic for declared in self._declarations.values() for topic in declared}

    def declarations_of(self, handler: Handler | Responder) -> Declarations:
        """What a function or a class declares, also where other decorators wrapped it in between."""
        found: dict[str, Declaration] = {}
        for thing in declaring(handler):
            if isinstance(thing, Hashable):
                found = {**self._declarations.get(thing, {}), **found}
        return found

    @property
    def settings(self) -> Settings:
        """The settings, read when first asked for. Raises ``SettingsError`` that lists every mistake."""
        if self._settings is None:
            self._settings = Settings.load(self._given, os.environ, needs_kafka=False)
        return self._settings

    def settings_for_kafka(self) -> Settings:
        """The settings, for what needs brokers. Raises ``SettingsError``."""
        self._settings = self._connected_settings()
        return self._settings

    def settings_for_queues(self) -> Settings:
        """The settings, for what needs brokers and Redis. Raises ``SettingsError``."""
        self._settings = self._connected_settings(needs_redis=True)
        return self._settings

    def settings_for_run(self) -> Settings:
        """The settings, for what needs brokers, and Redis where a route queues. Raises ``SettingsError``."""
        self._settings = self._connected_settings(self._queues)
        return self._settings

    def _connected_settings(
        self, needs_redis: bool | Callable[[Settings], bool] = False, *, check_client: bool = True
    ) -> Settings:
        if not check_client:
            return Settings.load(self._given, os.environ, needs_redis=needs_redis)
        from .clients.kafka_options import option_mistakes

        return Settings.load(self._given, os.environ, needs_redis=needs_redis, check=option_mistakes)

    @property
    def monitor(self) -> Any:
        """The object that is told of every event."""
        if self._monitor is None:
            given = self.settings.monitor or Monitor
            self._monitor = given(logger_of(self.settings)) if isinstance(given, type) else given
        return self._monitor

    @property
    def events(self) -> Guard:
        """The monitor and the subscribers, as flowkit tells them: an error of their own is logged, and goes no further."""
        return Guard(self.monitor, self._subscribers)

    @property
    def producer(self) -> Producer:
        """Sends messages outside handlers: ``app.producer.send(topic, value)``. Connects when first used."""
        if self._producer is None:
            from .producer import Producer

            self._producer = Producer(lambda: self.settings, self._make_producer)
        return self._producer

    def _make_producer(self, settings: Settings, **options: Any) -> ProducerClient:
        from .clients.opening import producer_client

        return producer_client(settings if settings.kafka.hosts else self.settings_for_kafka(), **options)

    @property
    def handlings(self) -> Mapping[str, Handling]:
        """The routes made ready, by topic. Nothing can be registered after this was asked for."""
        if self._handlings is None:
            with self._lock:
                if self._handlings is None:
                    self._handlings = self._make_handlings()
        return self._handlings

    def handling(self, topic: str) -> Handling:
        """The ready route of one topic. Raises ``RouteNotFound``."""
        try:
            return self.handlings[topic]
        except KeyError:
            raise RouteNotFound(
                f"no handler is registered for topic {topic!r}; known are: {', '.join(sorted(self.handlings)) or 'none'}"
            ) from None

    def _make_handlings(self) -> dict[str, Handling]:
        settings = self.settings
        for topics, hook in [*self._before, *self._after]:
            for topic in topics:
                if topic not in self._routes:
                    raise ConfigurationError(
                        unknown_name(
                            f"hook {getattr(hook, '__qualname__', hook)}: {topic}",
                            topic,
                            self._routes,
                            "topic",
                        )
                    )
        for route in self._routes.values():
            route.declarations = dict(self.declarations_of(route.handler))
        handlings = {
            topic: self._kind_of(route)(
                route,
                settings,
                [hook for topics, hook in self._before if not topics or topic in topics],
                [hook for topics, hook in self._after if not topics or topic in topics],
                self.declarations_of,
            )
            for topic, route in self._routes.items()
        }
        check_ways({topic: handling.dead_letter for topic, handling in handlings.items()})
        check_retry_topics(handlings)
        return handlings

    def _kind_of(self, route: Route) -> type[Handling]:
        if route.concurrency is not None and route.concurrency > 1:
            from .parallel import Parallel

            return Parallel
        if route.batch:
            from .batches import Batching

            return Batching
        return Handling

    # Running.

    def start(self, *, connected: bool = True, check_client: bool = True) -> None:
        """Makes this process ready to handle messages: settings, routes, configurators, ``on_startup``. Once a process.

        Raises ``SettingsError`` or ``ConfigurationError``. ``connected=False`` is for tests: Kafka and Redis are not asked for.
        ``check_client=False`` leaves the options of the Kafka client unchecked until there is one, which is not imported then.
        """
        with self._lock:
            if self._started_in == os.getpid():
                return
            if connected:
                for sentence in unknown_variables(os.environ):
                    logger_of(self.settings).warning(sentence)
                self._settings = self._connected_settings(self._queues, check_client=check_client)
            self.handlings  # noqa: B018
            for function in self._configurators:
                takes = len(inspect.signature(function).parameters)
                finish(function(*(self.settings,) * takes))
            for function in self._startup:
                finish(function())
            self._started_in = os.getpid()

    def _queues(self, settings: Settings) -> bool:
        return any(
            route.worker is None and not (settings.inline if route.inline is None else route.inline)
            for route in self._routes.values()
        )

    def stop(self) -> None:
        """Runs ``on_shutdown`` and closes the producers, in a process that had started.

        Raises what an ``on_shutdown`` hook raised, when the others have run.
        """
        with self._lock:
            if self._started_in != os.getpid():
                return
            self._started_in = 0
            with ExitStack() as stack:
                if self._producer is not None:
                    stack.callback(self._producer.close)
                stack.callback(close_loop)
                for function in reversed(self._shutdown):
                    stack.callback(lambda function: finish(function()), function)

    def run(self) -> None:
        """Consumes until SIGTERM or SIGINT, as ``flowkit run`` does. Exits with code 1 if it did not end clean."""
        from .locate import main_reference
        from .logs import log_to_stderr
        from .reporting import reported
        from .server import Server

        log_to_stderr(self)
        with reported():
            if not self.reference:
                self.reference = main_reference(self)
            code = Server(self).run()
        if code:
            sys.exit(code)

    def perform(self, topic: str, params: Mapping[str, Any]) -> None:
        """Handles one message in a custom worker, from what ``perform_async(topic, params)`` was given.

        Sends the responses and waits for them. Raises what the handler or the check raised, for that worker to retry: by its
        own rules, so it may add to ``params`` the number of the ``attempt`` and whether it is the ``last_attempt``.
        """
        from .jobs import run_entries

        self.start()
        handling = self.handling(topic)
        attempt, last = int(params.get("attempt", 1)), bool(params.get("last_attempt", False))
        failures = run_entries(self, handling, [handling.entry_of(params)], attempt, last=last)
        self.events.notice("performed", topic=topic, count=1, failed=len(failures))
        for failure in failures:
            details = about(failure.record, handling.group) if failure.record else {"topic": topic}
            where = place(failure.record) if failure.record else topic
            text = f"{where} failed, attempt {attempt}: {type(failure.error).__name__}: {failure.error}"
            self.events.notice_error("failed", failure.error, message=text, **details, attempt=attempt, last=last)
            if failure.record is not None:
                handling.failed(failure.record, failure.error, attempt, failure.record.received, last=last)
            raise failure.error


def _check_topic(name: str, options: dict[str, Any]) -> None:
    _check_decorator("topic", name)
    for option in options:
        if option not in OPTIONS:
            raise ConfigurationError(unknown_name(f"topic {name!r}: {option}", option, OPTIONS, "option"))
    check_options(name, options)


def _check_response(topic: str, options: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if option not in RESPONSE_OPTIONS:
            raise ConfigurationError(
                unknown_name(f"response to {topic!r}: {option}", option, RESPONSE_OPTIONS, "option")
            )
        if option != "parser" and not isinstance(value, bool):
            raise ConfigurationError(f"response to {topic!r}: {option} is True or False, not {value!r}")
    check_parser(f"response to {topic!r}", options.get("parser"))


def _check_decorator(decorator: str, name: object) -> None:
    if mistake := name_mistake("topic", name):
        hint = f"; write @app.{decorator}(...) with the name of the topic" if callable(name) else ""
        raise ConfigurationError(mistake + hint)
