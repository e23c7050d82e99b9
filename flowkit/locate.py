"""Finding an application by its reference, ``module:attribute``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import AppNotFound

if TYPE_CHECKING:
    from .app import Flowkit

DEFAULT_ATTRIBUTE = "app"


def locate(reference: str | None, folder: Path | None = None) -> Flowkit:
    """The application at ``reference``, for example ``shop:app``; ``shop`` alone means ``shop:app``.

    ``folder`` is searched first; if not given, the working directory. Raises ``AppNotFound`` where the reference leads
    nowhere; what the user's module raises itself, an ImportError of its own included, passes through as it is.
    """
    reference = reference or os.environ.get("FLOWKIT_APP")
    if not reference:
        raise AppNotFound(
            "no application named; give one as module:attribute, for example app:app, or set FLOWKIT_APP"
        )
    name, _, attribute = reference.partition(":")
    name = name.removesuffix(".py").replace("/", ".").lstrip(".")
    attribute = attribute or DEFAULT_ATTRIBUTE
    here = str(folder or Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # before site-packages: an installed package named "app" must not win
    if not _exists(name):
        raise AppNotFound(
            f"there is no module {name!r} in {here} or on the Python path; go to the folder of {name}.py, or correct"
            f" {reference!r}"
        )
    module = importlib.import_module(name)
    return _application(module, name, attribute)


def _exists(name: str) -> bool:
    if name in sys.modules:
        return True
    parent, _, _ = name.rpartition(".")
    if parent:
        if not _exists(parent):
            return False
        package = importlib.import_module(parent)  # here, because find_spec would hide what it raises
        if not hasattr(package, "__path__"):
            return False
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False


def _application(module: object, name: str, attribute: str) -> Flowkit:
    from .app import Flowkit

    found = getattr(module, attribute, None)
    if not isinstance(found, Flowkit):
        apps = sorted(key for key, value in vars(module).items() if isinstance(value, Flowkit))
        hint = (
            f"it has {', '.join(f'{name}:{app}' for app in apps)}" if apps else "it has no Flowkit application at all"
        )
        what = "is not a Flowkit application" if hasattr(module, attribute) else "does not exist"
        raise AppNotFound(f"{name}:{attribute} {what}; {hint}")
    found.reference = f"{name}:{attribute}"
    return found


def main_reference(app: Flowkit) -> str:
    """The reference of an application in the script that was started: jobs cannot name the module ``__main__``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec else os.path.splitext(os.path.basename(getattr(main, "__file__", "") or ""))[0]
    for attribute, value in vars(main).items():
        if value is app and name:
            return f"{name}:{attribute}"
    raise AppNotFound(
        "app.run() cannot find its application in the module that was started; start it with"
        " `flowkit run module:attribute`"
    )
