"""``flowkit install``: what it makes, what it leaves alone, and that it works from a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import command, flowkit, python
from processes import BIN

import flowkit as package
from flowkit.errors import ConfigurationError
from flowkit.install import SUFFIX, Installed, _next, install, project_name

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = REPOSITORY / "flowkit" / "templates" / "project"


def templates() -> set[str]:
    """The paths of the templates."""
    return files_in(TEMPLATES)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_template_becomes_a_file_with_its_words_filled_in(tmp_path: Path) -> None:
    done = list(install(tmp_path / "new" / "shop", "shop"))

    made = files_in(tmp_path / "new" / "shop")
    expected = {p.removesuffix(SUFFIX).replace("@NAME@", "shop").replace("@DOT@", ".") for p in templates()}
    assert made == expected
    assert done == [Installed(path, made=True) for path in sorted(made)]
    for path in made:
        assert not re.findall(r"@[A-Z]+@", (tmp_path / "new" / "shop" / path).read_text()), path


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("mine")
    (tmp_path / "README.md").symlink_to("nowhere")
    done = {file.path: file.made for file in install(tmp_path, "shop")}
    assert [path for path, made in done.items() if not made] == ["README.md", "app.py"]
    assert (tmp_path / "app.py").read_text() == "mine"
    assert (tmp_path / "README.md").is_symlink()

    before = {path: (tmp_path / path).stat() for path in files_in(tmp_path)}
    assert not any(file.made for file in install(tmp_path, "shop"))
    assert {path: (tmp_path / path).stat() for path in files_in(tmp_path)} == before


def test_the_command_says_what_it_made_and_what_it_skipped(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("mine")
    done = flowkit("install", cwd=tmp_path)
    count = len(templates())
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "skipped  app.py  (it is there already)" in lines
    assert "made     tests/test_app.py" in lines
    assert f"{count - 1} files made, 1 skipped; README.md says what is what. Next:" in lines
    assert lines[-1] == "  flowkit dev app:app"
    assert "cd " not in done.out

    done = flowkit("install", cwd=tmp_path)
    assert done.out.splitlines()[-1] == f"0 files made, {count} skipped"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("shop", "shop"), ("My Shop_2", "my-shop-2"), ("-x-", "x"), ("ab" * 20, "ab" * 20)],
)
def test_the_folder_gives_the_name(folder: str, name: str) -> None:
    assert project_name(Path("/srv") / folder, None) == name


@pytest.mark.parametrize("folder", ["2nd", "---", "x" * 41, "Größe 1"[2:4]])
def test_a_folder_without_a_name_asks_for_one(folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"gives no name for a project: .* --name shop"):
        project_name(Path("/srv") / folder, None)


@pytest.mark.parametrize("name", ["Shop", "a_b", "-a", "a-", "1a", "", "a" * 41, "a\n"])
def test_a_name_that_pods_or_units_refuse_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no name for a project"):
        project_name(Path("/srv/shop"), name)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "deploy").write_text("no folder")
    done = flowkit("install", str(tmp_path), "--name", "shop")

    assert done.code == 1
    assert re.search(r"flowkit: .*deploy/kubernetes/config.yaml cannot be made: ", done.err), done.err


@pytest.mark.parametrize(
    ("version", "following"), [("0.1.0", "0.2"), ("0.12.3", "0.13"), ("1.4.0", "2"), ("2.0", "3")]
)
def test_the_next_version_may_break_things(version: str, following: str) -> None:
    assert _next(version) == following


def test_the_requirements_allow_the_version_that_made_them(tmp_path: Path) -> None:
    list(install(tmp_path, "shop"))

    text = (tmp_path / "requirements.txt").read_text()
    assert f"flowkit-kafka>={package.__version__},<" in text


def test_the_readme_names_every_file(tmp_path: Path) -> None:
    list(install(tmp_path, "shop"))
    text = (tmp_path / "README.md").read_text()

    for path in files_in(tmp_path) - {"README.md", ".gitignore"}:
        assert f"`{path.split('/')[0]}" in text, path


def test_the_projects_python_is_in_order(tmp_path: Path) -> None:
    list(install(tmp_path, "shop"))

    rules = ("--isolated", "--line-length", "118", str(tmp_path))
    assert command(str(BIN / "ruff"), "check", *rules, "--select", "E,F,I,B,UP").code == 0
    assert command(str(BIN / "ruff"), "format", "--check", *rules).code == 0


def test_a_wheel_has_the_templates_and_makes_projects(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(
        REPOSITORY / "flowkit", source / "flowkit", ignore=shutil.ignore_patterns("__pycache__", "node_modules")
    )
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("flowkit_kafka-*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("flowkit/templates/project/")}
    assert inside == {f"flowkit/templates/project/{path}" for path in templates()}

    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=120)
    env = {"PYTHONPATH": str(target)}
    where = python("-c", "import flowkit; print(flowkit.__file__)", cwd=tmp_path, env=env)
    assert where.out.startswith(str(target)), where
    done = python("-m", "flowkit", "install", "shop", cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert len(files_in(tmp_path / "shop")) == len(inside)
    assert os.access(tmp_path / "shop" / "app.py", os.R_OK)
