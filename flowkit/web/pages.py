"""The pages: what is where, who may see it, and what a browser may do with it."""

from __future__ import annotations

import functools
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import redis
from flask import Flask, Response, abort, redirect, render_template, request, url_for
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from ..backlog import Backlog, backlog, queue_names
from ..clients.kafka_admin import Lag, lag
from ..errors import FlowkitError
from ..flowmap import leads_to, svg
from ..queues import connect
from ..topics import groups
from .failed import FailedJob, FailedJobs, Gone, delete, failed_job, failed_jobs, retry
from .recent import Answer, Recent
from .workers import WorkerState, workers

if TYPE_CHECKING:
    from ..app import Flowkit

logger = logging.getLogger(__name__)

PER_PAGE = 25
"""Failed jobs on one page."""

REFRESH = 5
"""Seconds after which an open page looks again."""

REDIS_SECONDS = 2.0
"""Seconds that one request to Redis may take: somebody waits for the page."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""On every answer: nothing comes from elsewhere, no script but our own file runs, and no other site may frame a page."""

PLACE = re.compile(r"[A-Za-z0-9._@\[\] -]{1,600}")
"""What names a job or its messages; anything else in the address of a page is not from us."""

NOTICES = {
    "retried": "is back in its queue.",
    "deleted": "is deleted.",
    "gone": "has not failed any more: somebody else was faster. Nothing was changed.",
}


@dataclass(frozen=True, slots=True)
class Access:
    """Who may come in, and what they may do. ``exposed``: other machines reach the page, and nothing hides the password."""

    password: str
    user: str = "flowkit"
    read_only: bool = False
    exposed: bool = False


@dataclass(frozen=True, slots=True)
class Queues:
    """What Redis knows of an application."""

    backlogs: list[Backlog]
    workers: list[WorkerState]
    failed: FailedJobs


def make_pages(app: Flowkit, access: Access, ask_kafka: Callable[[], list[Lag]] | None = None) -> Flask:
    """The WSGI application. It asks Kafka and Redis when somebody looks, and waits for neither longer than a few seconds.

    ``ask_kafka`` gives the lag of the application's groups; its own brokers are asked if not given.
    """
    pages = Flask(__name__)
    pages.config.update(MAX_CONTENT_LENGTH=16 * 1024)
    site = Site(app, access, ask_kafka or (lambda: lag(app.settings, groups(app))))
    pages.before_request(site.check)
    pages.after_request(site.finish)
    pages.register_error_handler(HTTPException, site.problem)
    pages.register_error_handler(FlowkitError, site.unavailable)
    pages.add_url_rule("/", "overview", site.overview)
    pages.add_url_rule("/flow.svg", "flow", site.flow)
    pages.add_url_rule("/delete", "confirm", site.confirm, methods=["GET"])
    pages.add_url_rule("/delete", "delete", site.delete, methods=["POST"])
    pages.add_url_rule("/retry", "retry", site.retry, methods=["POST"])
    pages.jinja_env.filters.update(number=number, ago=ago)
    pages.jinja_env.trim_blocks = pages.jinja_env.lstrip_blocks = True
    pages.context_processor(site.everywhere)
    return pages


class Site:
    """The views of one application."""

    def __init__(self, app: Flowkit, access: Access, ask_kafka: Callable[[], list[Lag]]) -> None:
        self.app = app
        self.access = access
        self.token = secrets.token_urlsafe(32)
        """What a form must carry: only our own pages have it, and other sites cannot read those."""
        self.kafka: Recent[list[Lag]] = Recent(ask_kafka)
        self.redis = _impatient(app.settings.redis) if app.settings.redis else None

    # Who may come in.

    def check(self) -> AnyResponse | None:
        """Asks for the password before everything else; refuses forms that are not from one of our pages."""
        login = request.authorization
        given = (login.username or "", login.password or "") if login is not None and login.type == "basic" else None
        if given is None or not self._is_welcome(*given):
            if given is not None:
                logger.warning("flowkit web refused a login as %.50r from %s", given[0], request.remote_addr)
            answer = Response("A user and a password are needed here.\n", 401, mimetype="text/plain")
            answer.headers["WWW-Authenticate"] = 'Basic realm="flowkit", charset="UTF-8"'
            return answer
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            if self.access.read_only:
                abort(403, "This page is for reading only: flowkit web was started with --read-only.")
            elsewhere = request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none")
            if elsewhere or not _same(request.form.get("token", ""), self.token):
                abort(
                    403,
                    "This did not come from a page of this flowkit web, or it was started anew since: go back, load the page"
                    " again, and try once more. Nothing was changed.",
                )
        return None

    def _is_welcome(self, user: str, password: str) -> bool:
        return _same(user, self.access.user) & _same(password, self.access.password)

    def finish(self, answer: Response) -> Response:
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        if request.endpoint != "static":
            answer.headers["Cache-Control"] = "no-store"
        return answer

    # What there is to see.

    def everywhere(self) -> dict[str, Any]:
        """What every template may use."""
        secure = request.is_secure or request.headers.get("X-Forwarded-Proto") == "https"
        return {
            "app": self.app,
            "access": self.access,
            "token": self.token,
            "exposed": self.access.exposed and not secure,
        }

    def overview(self) -> str:
        page = min(max(1, request.args.get("page", 1, type=int)), 1_000_000)
        queues, redis_problem = self._queues((page - 1) * PER_PAGE)
        kafka = self.kafka.look()
        notice, place = NOTICES.get(request.args.get("done", "")), request.args.get("place", "")
        return render_template(
            "overview.html",
            kafka=kafka,
            behind=by_group(kafka),
            queues=queues,
            redis_problem=redis_problem,
            has_queues=self.redis is not None,
            handlings=self.app.handlings,
            flow=flow_text(self.app),
            notice=notice and f"{place if PLACE.fullmatch(place) else 'The job'} {notice}",
            page=page,
            pages=-(-queues.failed.total // PER_PAGE) if queues else 1,
            live=request.args.get("live") != "off",
            refresh=REFRESH,
        )

    def _queues(self, start: int) -> tuple[Queues | None, str | None]:
        if self.redis is None:
            return None, None
        try:
            backlogs = backlog(self.app, self.redis)
            names = [item.queue for item in backlogs]
            found = Queues(backlogs, workers(self.redis, names), failed_jobs(self.redis, names, start, PER_PAGE))
        except FlowkitError as error:
            return None, str(error)
        return found, None

    @functools.cached_property
    def drawing(self) -> str:
        return svg(self.app)  # which takes a second where there are hundreds of routes

    def flow(self) -> Response:
        answer = Response(self.drawing, mimetype="image/svg+xml")
        # a drawing of its own, which runs and loads nothing, but has its colours in it
        answer.headers["Content-Security-Policy"] = (
            "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"
        )
        return answer

    # What can be done.

    def retry(self) -> AnyResponse:
        return self._act(retry, "retried")

    def delete(self) -> AnyResponse:
        return self._act(delete, "deleted")

    def confirm(self) -> str | AnyResponse:
        """Asks whether a job is really to be deleted."""
        try:
            job = self._job(request.args)
        except Gone as gone:
            return _back("gone", str(gone))
        return render_template("confirm.html", job=job)

    def _act(self, action: Any, done: str) -> AnyResponse:
        try:
            job = self._job(request.form)
            action(self.redis, job)
        except Gone as gone:
            return _back("gone", str(gone))
        logger.info("flowkit web: job %s (%s) of queue %s is %s", job.id, job.place, job.queue, done)
        return _back(done, job.place)

    def _job(self, given: Mapping[str, str]) -> FailedJob:
        queue, job_id = given.get("queue", ""), given.get("job", "")
        if self.redis is None or not (queue and job_id):
            abort(404)
        if queue not in queue_names(self.app, self.redis):
            raise Gone(job_id)
        return failed_job(self.redis, queue, job_id)

    # What goes wrong.

    def problem(self, error: HTTPException) -> AnyResponse:
        answer = Response(status=error.code, headers=error.get_headers(request.environ))
        answer.set_data(render_template("problem.html", title=error.name, what=error.description))
        return answer

    def unavailable(self, error: FlowkitError) -> AnyResponse:
        page = render_template("problem.html", title="That did not work", what=str(error))
        return Response(page, 503)


def _impatient(settings: str | Mapping[str, Any]) -> redis.Redis:
    """A Redis client that gives up soon and does not try again: somebody waits for the page."""
    connection = connect(settings)
    connection.connection_pool.connection_kwargs.update(
        socket_connect_timeout=REDIS_SECONDS, socket_timeout=REDIS_SECONDS, retry=Retry(NoBackoff(), 0)
    )
    return connection


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that tells nothing of ``wanted``."""
    return hmac.compare_digest(sha256(given.encode()).digest(), sha256(wanted.encode()).digest())


def _back(done: str, place: str) -> AnyResponse:
    return redirect(url_for("overview", done=done, place=place), 303)


@dataclass(frozen=True, slots=True)
class GroupLag:
    """The partitions of one group. ``total`` counts those whose lag is known."""

    group: str
    rows: list[Lag]

    @property
    def total(self) -> int:
        return sum(row.lag or 0 for row in self.rows)

    @property
    def unknown(self) -> bool:
        return any(row.lag is None for row in self.rows)


def by_group(answer: Answer[list[Lag]]) -> list[GroupLag]:
    found: dict[str, list[Lag]] = {}
    for row in answer.value or ():
        found.setdefault(row.group, []).append(row)
    return [GroupLag(group, rows) for group, rows in found.items()]


def flow_text(app: Flowkit) -> list[tuple[str, list[str]]]:
    """The flow map in words: each topic, and what it leads to."""
    return [
        (topic, [f"{target} ({how})" for target, how in leads_to(handling)])
        for topic, handling in sorted(app.handlings.items())
    ]


def number(value: int | None) -> str:
    """With a thin space between thousands; a dash for what is not known."""
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def ago(moment: datetime | None) -> str:
    """How long ago, in the largest unit that fits."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
