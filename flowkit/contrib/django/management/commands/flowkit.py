"""``python manage.py flowkit ...``: the ``flowkit`` command, with the application that the settings name."""

from __future__ import annotations

import os
import sys
from argparse import REMAINDER
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from flowkit.cli import main


class Command(BaseCommand):
    """Hands its arguments to flowkit's own command, ``-h`` too. Exit codes are flowkit's."""

    help = (
        'flowkit\'s own command, with the application that the setting FLOWKIT_APP ("module:attribute") names.'
        " `flowkit -h` lists what there is: run, worker, dev, send, routes, ..."
    )
    requires_system_checks: Sequence[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("args", nargs=REMAINDER, metavar="COMMAND ...", help="As for `flowkit`.")

    def run_from_argv(self, argv: list[str]) -> None:
        # Not through Django's parser, which would take -h, --version and others for itself. Its two options for every
        # command have been followed by the time this is called.
        parser = CommandParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--settings")
        parser.add_argument("--pythonpath")
        _, arguments = parser.parse_known_args(argv[2:])
        sys.exit(self._run(f"{os.path.basename(argv[0])} {argv[1]}", arguments))

    def handle(self, *args: str, **options: Any) -> None:  # noqa: ARG002
        """For ``call_command("flowkit", "routes")``. Raises ``CommandError`` where the command would end with another code
        than 0."""
        if code := self._run("manage.py flowkit", args):
            raise CommandError(f"flowkit {' '.join(args)} ended with code {code}", returncode=code)

    def _run(self, program: str, arguments: Sequence[str]) -> int:
        reference = getattr(settings, "FLOWKIT_APP", None)
        if reference is not None and not isinstance(reference, str):
            raise CommandError(f"the setting FLOWKIT_APP is a text, 'module:attribute', not {reference!r}")
        named = bool(reference) and "FLOWKIT_APP" not in os.environ  # as everywhere in flowkit, the environment wins
        if named:
            os.environ["FLOWKIT_APP"] = str(reference)
        before, sys.argv = sys.argv, [program, *arguments]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = before
            if named:
                os.environ.pop("FLOWKIT_APP", None)
            connections.close_all()
