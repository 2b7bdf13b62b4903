"""What is on disk, what is declared and what an installed package offers are the same thing."""

import configparser
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ntk_monitor

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _declared() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["packages"].split()


def _on_disk() -> set[str]:
    """Every folder with Python files, named as it is imported.

    Links are skipped: an unpacked sdist has none.
    """
    folders = {path.parent for path in (ROOT / "ntk_monitor").rglob("*.py")}
    inside = {".".join(folder.relative_to(ROOT).parts) for folder in folders if not _behind_a_link(folder)}
    callbacks = {path.parent.relative_to(ROOT) for path in (ROOT / "callbacks").rglob("*.py")}
    return inside | {".".join(("ntk_monitor", *folder.parts)) for folder in callbacks}


def _behind_a_link(folder: Path) -> bool:
    return folder.resolve() != ROOT.resolve() / folder.relative_to(ROOT)


def _python(code: str, folder: Path) -> str:
    """Run `code` from a folder that is not the checkout and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_on_disk_is_declared() -> None:
    assert _on_disk() == set(_declared())


@pytest.mark.parametrize("package", _declared())
def test_declared_packages_import(package: str) -> None:
    assert importlib.import_module(package).__file__ is not None


def test_the_door_opens_from_any_folder(tmp_path: Path) -> None:
    assert _python("import ntk_monitor.callbacks as c; print(c.__name__)", tmp_path) == "ntk_monitor.callbacks"


def test_nothing_else_is_installed_at_the_top(tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec; print([n for n in ('callbacks', 'tests', 'examples') if find_spec(n)])"
    )
    assert _python(code, tmp_path) == "[]"


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert ntk_monitor.__version__ == version
    # Stale metadata of an editable install shows up here; `make test` installs again when pyproject.toml changes.
    assert importlib.metadata.version("ntk-monitor") == version


def test_changelog_knows_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert any(f"[{PROJECT['project']['version']}]" in line or "[Unreleased]" in line for line in headings)


def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # A build writes into its source tree, so it gets a copy; without the link, as in an unpacked sdist.
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "callbacks", source / "callbacks", ignore=ignored)
    shutil.copytree(
        ROOT / "ntk_monitor", source / "ntk_monitor", ignore=shutil.ignore_patterns("__pycache__", "callbacks")
    )
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    wheel = tmp_path / _python(build, source).splitlines()[-1]

    names = zipfile.ZipFile(wheel).namelist()

    modules = {name for name in names if ".dist-info/" not in name}
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in modules}
    assert folders - {"ntk_monitor.dashboard.static"} == set(_declared())
    assert "ntk_monitor/py.typed" in modules
    # The page of the tab is no Python, which a build leaves out unless it is told.
    assert "ntk_monitor/dashboard/static/index.js" in modules
    for folder in ("dashboard/static", "report"):
        files = {
            f"ntk_monitor/{folder}/{path.name}" for path in (ROOT / "ntk_monitor" / folder).iterdir() if path.is_file()
        }
        assert files <= modules
    assert any(name.endswith("licenses/LICENSE") for name in names)


HEAVY = ("torch", "lightning", "pytorch_lightning", "transformers", "scipy", "plotly", "matplotlib")
LIGHT = next(c["source_modules"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "light")

# Attempts are recorded as well as refused: `try: import torch` would cost seconds wherever torch is installed.
IMPORT_WITHOUT = """
import importlib, importlib.abc, sys

attempts = []

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            attempts.append(name)
            raise ImportError(name + " is out of reach in this test")

sys.meta_path.insert(0, Refuse())
importlib.import_module("{module}")
print(attempts)
"""


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_without_the_heavy_ones(module: str, tmp_path: Path) -> None:
    assert _python(IMPORT_WITHOUT.format(module=module, blocked=HEAVY), tmp_path) == "[]"


# TensorBoard calls it unguarded: an entry point that fails to load keeps all of TensorBoard from starting.
TENSORBOARD = """
import sys
from importlib.metadata import entry_points
(ours,) = [one for one in entry_points(group="tensorboard_plugins") if one.name == "ntk"]
before = set(sys.modules)
loader = ours.load()
print(loader.__name__, sorted(m for m in set(sys.modules) - before if m.startswith("ntk_monitor")))
"""


def test_tensorboard_finds_the_tab_and_loads_next_to_nothing(tmp_path: Path) -> None:
    loaded = "['ntk_monitor', 'ntk_monitor.dashboard', 'ntk_monitor.dashboard.loader']"
    assert _python(TENSORBOARD, tmp_path) == f"NTKLoader {loaded}"
    (ours,) = PROJECT["project"]["entry-points"]["tensorboard_plugins"].items()
    assert ours == ("ntk", "ntk_monitor.dashboard.loader:NTKLoader")


# What the tab imports later, when the first question comes, is as light as what it imports at the start.
ANSWERED = (
    IMPORT_WITHOUT
    + """
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

class Empty:
    def list_tensors(self, *_, **__):
        return {{}}

plugin = sys.modules["ntk_monitor.dashboard.loader"].NTKLoader().load(TBContext(data_provider=Empty()))
apps = plugin.get_plugin_apps()
print([Client(apps["/" + route]).get("/").status_code for route in ("catalogue", "runs", "manifest")])
print(attempts, sorted(set(sys.modules) & set({blocked})))
"""
)


def test_the_tab_answers_without_the_heavy_ones(tmp_path: Path) -> None:
    code = ANSWERED.format(module="ntk_monitor.dashboard.loader", blocked=HEAVY)
    assert _python(code, tmp_path).splitlines() == ["[]", "[200, 200, 400]", "[] []"]


def test_the_front_door_imports_nothing_heavy(tmp_path: Path) -> None:
    blocked = (*HEAVY, "tensorboard", "sklearn", "pandas", "xarray", "rich", "jsonargparse")
    assert _python(IMPORT_WITHOUT.format(module="ntk_monitor", blocked=blocked), tmp_path) == "[]"
