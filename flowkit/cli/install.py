"""``flowkit install``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import style


def install(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the project, made if need be.")] = Path(),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the application; the folder's if not given.")
    ] = None,
) -> None:
    """Make a new project: application, tests and deployment.

    That is app.py with its tests, a Dockerfile, a compose file, systemd units and manifests for Kubernetes.

    Files that are there already stay as they are.

    \b
    Examples:
      flowkit install shop
      flowkit install . --name shop
    """
    from ..install import install, project_name

    made = skipped = 0
    for file in install(folder, project_name(folder, name)):
        made += file.made
        skipped += not file.made
        word = style("made   ", fg=typer.colors.GREEN) if file.made else style("skipped", fg=typer.colors.YELLOW)
        typer.echo(f"{word}  {file.path}" + ("" if file.made else "  (it is there already)"))
    typer.echo(f"{made} files made, {skipped} skipped" + ("; README.md says what is what. Next:" if made else ""))
    if made:
        steps = ["pip install -r requirements-dev.txt", "pytest", "flowkit dev app:app"]
        for step in [*([] if folder.resolve() == Path.cwd() else [f"cd {folder}"]), *steps]:
            typer.echo(f"  {step}")
