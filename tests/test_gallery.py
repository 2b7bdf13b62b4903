"""The gallery: one script for each application, which runs, prints a report, draws, and stays short."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from ntk_monitor.applications import APPLICATIONS, Report

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "examples" / "gallery"
PAGE = ROOT / "docs" / "applications.md"
PICTURES = ROOT / "docs" / "applications"


def run(name: str, out: Path, *, quick: bool) -> Report:
    report = runpy.run_path(str(GALLERY / f"{name}.py"))["main"](quick=quick, out=out)
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize("name", APPLICATIONS)
def test_script_answers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []

    def picture(figure: dict[str, Any], width: int, height: int) -> bytes:
        # Drawing takes half a second each; the tests of the applications draw, and so do the scripts in full.
        drawn.append(figure)
        return f"{width} x {height}".encode()

    monkeypatch.setattr("ntk_monitor.render.png", picture)
    report = run(name, tmp_path, quick=True)
    assert report.name == name
    assert report.verdicts
    assert report.text() in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes() == b"720 x 450"
    assert len(drawn) == 1
    assert drawn[0] in report.figures.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_script_in_full(name: str, tmp_path: Path) -> None:
    report = run(name, tmp_path, quick=False)
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000
    # At full size something can be said; a quick one may leave everything open.
    assert any(verdict.holds is not None for verdict in report.verdicts)


def test_every_application_has_a_script_and_a_place_on_the_page() -> None:
    assert {path.stem for path in GALLERY.glob("*.py")} == set(APPLICATIONS)
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in APPLICATIONS if f"](applications/{name}.png)" not in page] == []
    assert [name for name in APPLICATIONS if f"](../examples/gallery/{name}.py)" not in page] == []
    assert {path.stem for path in PICTURES.glob("*.png")} == set(APPLICATIONS)
    # In the order of the list, each once.
    assert sorted(APPLICATIONS, key=lambda name: page.index(f"## {name}\n")) == list(APPLICATIONS)
    assert "(docs/applications.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(GALLERY.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_short_and_say_what_they_teach(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "You learn" in text
    assert f"runs/gallery/{path.stem}.png" in text


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_small(path: Path) -> None:
    assert path.stat().st_size < 60_000
