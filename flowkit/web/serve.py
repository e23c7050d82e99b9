"""Serving the pages until SIGTERM or Ctrl-C."""

from __future__ import annotations

import ipaddress
import logging
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import waitress.server
from flask import Flask

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 8
"""Requests answered at the same time."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(pages: Flask, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Answers requests until SIGTERM or SIGINT, then finishes those in hand, for 5 seconds at most.

    ``ready`` is told the address when it is open. Raises ``ConfigurationError`` where that cannot be had.
    """
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits a moment
    listen = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        server = waitress.server.create_server(
            pages,
            listen=listen,
            threads=THREADS,
            ident="",
            max_request_body_size=64 * 1024,
            channel_timeout=30,
            clear_untrusted_proxy_headers=False,  # one of them ends a warning, and no more
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{listen} cannot be listened on: {getattr(error, 'strerror', None) or error}; choose another with --host and"
            " --port"
        ) from error
    opened = server.effective_listen if hasattr(server, "effective_listen") else [(host, server.effective_port)]
    shown, number = opened[0]
    ready(f"http://{f'[{shown}]' if ':' in str(shown) else shown}:{number}/")
    server.run()  # ends with SystemExit, which it takes as the wish to stop
    server.close()


def _end(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    sys.exit(0)
