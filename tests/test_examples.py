"""Each example runs, prints what its docstring promises, and stays short."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ntk_monitor as ntk

EXAMPLES = Path(__file__).parent.parent / "examples"


def _main(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_lightning_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = _main("lightning_digits")(epochs=2, out=tmp_path)
    assert history.steps.tolist() == [0, 50, 58]
    assert {snapshot.loss_status for snapshot in history} == {"matched"}
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(history)


def test_regression_diabetes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = _main("regression_diabetes")(epochs=10, out=tmp_path)
    assert len(slow) == 3
    assert all(0 <= share <= 1 for share in slow)
    # Fast modes are learned first, so what is left is slow.
    assert slow[-1] > slow[0]
    assert "%" in capsys.readouterr().out


def test_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = _main("plain_loop")(epochs=2, out=tmp_path)
    assert [snapshot.step for snapshot in taken] == [0, 50]
    assert ntk.load_history(tmp_path).steps.tolist() == [0, 50]
    assert taken[-1].loss_value < taken[0].loss_value
    assert "loss" in capsys.readouterr().out


@pytest.mark.slow
def test_huggingface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = _main("huggingface")(steps=3, out=tmp_path)
    assert history.steps.tolist() == [0, 1, 2, 3]
    assert {(s.kernel, s.loss, s.loss_status) for s in history} == {
        ("loss", "token_cross_entropy(mean, shifted)", "matched")
    }
    assert "layers that move the outputs" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert "You learn" in text
