"""Finding an application by its reference."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from flowkit import AppNotFound, ConfigurationError, Flowkit
from flowkit.locate import locate, main_reference

APP = "from flowkit import Flowkit\n{0} = Flowkit('{0}')\n"


@pytest.fixture(autouse=True)
def _fresh_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty working directory; what a test imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("FLOWKIT_APP", raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith("fk_")]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.parent.relative_to(tmp_path).parents:
            if file.parent != tmp_path and parent != Path():
                (tmp_path / parent / "__init__.py").touch()
        file.write_text(text)
        return file

    return write


Write = Callable[[str, str], Path]


@pytest.mark.parametrize(
    "reference", ["fk_shop:app", "fk_shop", "fk_shop:", "fk_shop.py:app", "fk_shop.py", "./fk_shop.py"]
)
def test_a_reference_is_a_module_and_an_attribute(write: Write, reference: str) -> None:
    write("fk_shop.py", APP.format("app"))

    app = locate(reference)

    assert isinstance(app, Flowkit)
    assert app is sys.modules["fk_shop"].__dict__["app"]
    assert app.reference == "fk_shop:app"


def test_an_attribute_may_have_any_name(write: Write) -> None:
    write("fk_shop.py", APP.format("app") + APP.format("other"))

    assert locate("fk_shop:other").settings.name == "other"


@pytest.mark.parametrize("reference", ["fk_pkg.shop:app", "fk_pkg/shop.py:app", "./fk_pkg/shop.py"])
def test_a_module_may_be_in_a_package(write: Write, reference: str) -> None:
    write("fk_pkg/__init__.py", "")
    write("fk_pkg/shop.py", APP.format("app"))

    assert locate(reference).reference == "fk_pkg.shop:app"


def test_a_package_may_be_the_application(write: Write) -> None:
    write("fk_pkg/__init__.py", APP.format("app"))

    assert locate("fk_pkg").reference == "fk_pkg:app"


def test_a_folder_without_init_is_a_package_too(write: Write) -> None:
    write("fk_space/shop.py", APP.format("app"))

    assert locate("fk_space.shop").reference == "fk_space.shop:app"


def test_the_application_is_imported_once(write: Write) -> None:
    write("fk_shop.py", APP.format("app"))

    assert locate("fk_shop") is locate("fk_shop:app")


def test_the_environment_names_the_application(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("fk_shop.py", APP.format("app"))
    write("fk_store.py", APP.format("app"))
    monkeypatch.setenv("FLOWKIT_APP", "fk_shop:app")

    assert locate(None).reference == "fk_shop:app"
    assert locate("").reference == "fk_shop:app"
    assert locate("fk_store").reference == "fk_store:app"


@pytest.mark.parametrize("reference", [None, ""])
def test_no_reference_at_all(reference: str | None) -> None:
    with pytest.raises(AppNotFound, match="no application named; give one as module:attribute, for example app:app"):
        locate(reference)


@pytest.mark.parametrize(
    "reference",
    [
        *("fk_missing", "fk_missing:app", "fk_missing.part:app", ":app", "..", "a b"),
        *("/etc/passwd", "fk-missing", "json.missing", "json.decoder.missing"),
    ],
)
def test_a_module_that_does_not_exist_is_told_with_where_it_was_looked_for(reference: str, tmp_path: Path) -> None:
    with pytest.raises(AppNotFound, match="there is no module") as caught:
        locate(reference)
    assert str(tmp_path) in str(caught.value)
    assert repr(reference) in str(caught.value)


def test_an_attribute_that_does_not_exist_is_told_with_those_that_do(write: Write) -> None:
    write("fk_shop.py", APP.format("store") + APP.format("main"))

    with pytest.raises(
        AppNotFound, match=re.escape("fk_shop:app does not exist; it has fk_shop:main, fk_shop:store")
    ):
        locate("fk_shop")


def test_an_attribute_that_is_something_else(write: Write) -> None:
    write("fk_shop.py", "app = 7")

    with pytest.raises(
        AppNotFound, match="fk_shop:app is not a Flowkit application; it has no Flowkit application at"
    ):
        locate("fk_shop")


def test_where_an_application_is_not_found_the_configuration_is_wrong() -> None:
    assert issubclass(AppNotFound, ConfigurationError)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("import fk_not_installed", ModuleNotFoundError, "fk_not_installed"),
        ("from json import fk_nothing", ImportError, "fk_nothing"),
        ("1 / 0", ZeroDivisionError, "division"),
        ("def", SyntaxError, "invalid syntax"),
        ("raise ValueError('mine')", ValueError, "mine"),
    ],
)
@pytest.mark.parametrize("path", ["fk_shop.py", "fk_pkg/shop.py", "fk_pkg/__init__.py"])
def test_what_the_users_module_raises_passes_through(
    write: Write, path: str, text: str, error: type[Exception], match: str
) -> None:
    write("fk_pkg/shop.py", APP.format("app"))
    write(path, text)

    with pytest.raises(error, match=match):
        locate("fk_shop" if path == "fk_shop.py" else "fk_pkg.shop")


def test_the_working_directory_comes_first(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("elsewhere/fk_shop.py", APP.format("elsewhere"))
    write("fk_shop.py", APP.format("app"))
    sys.path.insert(0, str(tmp_path / "elsewhere"))

    assert locate("fk_shop").settings.name == "app"
    assert sys.path[0] == str(tmp_path)


def test_another_folder_may_come_first(write: Write, tmp_path: Path) -> None:
    write("elsewhere/fk_shop.py", APP.format("app"))

    assert locate("fk_shop", tmp_path / "elsewhere").reference == "fk_shop:app"


# The script that was started.


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def test_a_script_is_found_by_the_name_of_its_file(script: Any) -> None:
    script.__file__ = os.path.join("some", "where", "shop.py")
    script.application = app = Flowkit("shop")

    assert main_reference(app) == "shop:application"


def test_a_module_run_with_m_is_found_by_its_name(script: Any) -> None:
    script.__spec__ = ModuleSpec("pkg.shop", None)
    script.app = app = Flowkit("shop")

    assert main_reference(app) == "pkg.shop:app"


@pytest.mark.parametrize("file", ["shop.py", None])
def test_an_application_that_is_not_at_the_top_level_cannot_be_found(script: Any, file: str | None) -> None:
    if file:
        script.__file__ = file
    else:
        script.app = Flowkit("shop")

    with pytest.raises(AppNotFound, match="start it with `flowkit run module:attribute`"):
        main_reference(script.__dict__.get("app") or Flowkit("shop"))
