"""An application whose own import fails, two calls deep."""

import importlib

from flowkit import Flowkit

app = Flowkit("broken")


def load_plugin(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError("no plugin, no work") from error


load_plugin("plugin_that_is_missing")
