"""ntk-monitor app: examples, a user's own model and data, checkpoints, and bad input in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ntk_monitor.applications import APPLICATIONS, Number, Report, Table, Verdict
from ntk_monitor.cli import main
from ntk_monitor.cli.app import written
from ntk_monitor.report.applied import application_page

Said = pytest.CaptureFixture[str]


class Small(nn.Module):
    """A model to be named on the command line."""

    def __init__(self, width: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, outputs)."""
        outputs: torch.Tensor = self.layers(x)
        return outputs


def failing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A forward that a user got wrong."""
    raise RuntimeError(f"no way through {type(model).__name__} for {len(x)} samples")


MODEL = f"{__name__}.Small"


@pytest.fixture
def samples(tmp_path: Path) -> str:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((40, 3)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x, y=x[:, :1] ** 2)
    return str(tmp_path / "samples.npz")


def test_example_prints_a_verdict_and_draws(tmp_path: Path, capsys: Said) -> None:
    assert main(["app", "early_stopping", "--quick", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "built-in example: a small network on the progression of diabetes" in said
    assert "DOES NOT HOLD: stopping early is the same as one ridge" in said
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "early_stopping.html",
        "report.json",
        *(f"{name}.{kind}" for name in ("ridges", "filters", "errors") for kind in ("png", "json")),
    }
    assert (tmp_path / "out/errors.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out/errors.json").read_text())["data"]
    page = (tmp_path / "out/early_stopping.html").read_text()
    assert "does not hold:" in page
    assert 'id="early_stopping-errors"' in page


def test_own_model_and_data(samples: str, tmp_path: Path, capsys: Said) -> None:
    words = ["app", "kernel_regression", "--model", MODEL, "--model.width", "16", "--data", samples]
    assert main([*words, "--set", "ridge=0.5", "steps=50", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Kernel regression and Small, trained" in said
    assert "note: fresh weights" in said
    assert "built-in" not in said


def test_checkpoint_gives_the_weights(samples: str, tmp_path: Path, capsys: Said) -> None:
    """Weights of zero: the outputs now are zero, so the error now is the mean square of the targets."""
    model = Small()
    with torch.no_grad():
        for p in model.layers[2].parameters():
            p.zero_()
    torch.save(model.state_dict(), tmp_path / "last.pt")
    words = ["app", "kernel_regression", "--model", MODEL, "--checkpoint", str(tmp_path / "last.pt"), "--data", samples]
    assert main([*words, "--set", "ridge=0.5", "steps=20", "held_out=0.5", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("held-out error, network, now"))
    y = np.load(samples)["y"]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()
    assert float(line.split()[4]) == pytest.approx(float((y[order][20:] ** 2).mean()), rel=1e-2)


def test_answers_about_a_checkpoint_go_into_its_run(samples: str, tmp_path: Path, capsys: Said) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "events.out.tfevents.1").touch()
    torch.save(Small().state_dict(), tmp_path / "run/checkpoints/last.pt")
    words = ["--model", MODEL, "--checkpoint", str(tmp_path / "run/checkpoints/last.pt"), "--data", samples]
    assert main(["app", "saliency", *words, "--set", "resamples=20"]) == 0
    left = tmp_path / "run/ntk_apps/saliency/report.json"
    assert str(left) in capsys.readouterr().out
    assert Report.from_json(left.read_text()).name == "saliency"


def test_list_names_every_application(capsys: Said) -> None:
    assert main(["app", "--list"]) == 0
    said = capsys.readouterr().out
    entries = [line.split() for line in said.splitlines() if line and not line.startswith((" ", "Without"))]
    assert [words[0] for words in entries] == list(APPLICATIONS)
    assert all(len(words) > 4 for words in entries)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "wanted an application"),
        (["nonsense"], "got nonsense"),
        (["kernel_regression", "--probe", "8"], "--probe needs --model"),
        (["kernel_regression", "--example", "--model", MODEL], "leave --model"),
        (["kernel_regression", "--model", MODEL], "pass --data"),
        (["kernel_regression", "--model", "json.dumps", "--data", "{}"], "cannot be built"),
        (["kernel_regression", "--model", MODEL, "--data", "{}", "--loss", "mse"], "no option loss"),
        (["kernel_regression", "--model", MODEL, "--data", "{}", "--set", "depth=3"], "no option depth"),
        (["kernel_regression", "--model", MODEL, "--data", "{}", "--set", "depth"], "NAME=VALUE"),
        (["kernel_regression", "--model", MODEL, "--data", "{}", "--probe", "0"], "at least 1"),
        (["kernel_regression", "--model", MODEL, "--data", "{}", "--forward", f"{__name__}:failing"], "no way through"),
        (["kernel_regression", "--history", "."], "cannot be answered from a history"),
        (["early_stopping", "--history", "nowhere"], "nowhere"),
        (["kernel_regression", "--model", MODEL, "--model.outputs", "2", "--data", "{}"], "fit the outputs"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(words: list[str], sentence: str, samples: str, capsys: Said) -> None:
    assert main(["app", *(word.replace("{}", samples) for word in words)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_page_escapes_words_and_shows_every_part(tmp_path: Path) -> None:
    report = Report(
        name="made",
        title="a < b",
        summary="words & numbers",
        numbers=(Number("gap", 0.25, "of <it>"),),
        verdicts=(Verdict("yes", True, "e"), Verdict("no", False, "e"), Verdict("perhaps", None, "e")),
        tables={"rows": Table(("k", "v"), ((1, 0.5),))},
        caveats=("<script>alert(1)</script>",),
    )
    page = application_page(report)
    assert "a &lt; b" in page
    assert "<script>alert(1)" not in page
    for words in ("holds:", "does not hold:", "undecided:", "0.25 of &lt;it&gt;", "<td>0.5</td>"):
        assert words in page
    assert any("made.html" in line for line in written(report, tmp_path))
