"""Analyze gives what the live monitor gave, from every kind of checkpoint, and one sentence for each that is bad."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ntk_monitor as ntk
from ntk_monitor.cli import main
from tests import analyses
from tests.analyses import DATA, MODEL
from tests.launch import ROOT

NETWORK = ["--model", "tests.analyses:network", "--data", DATA, "--loss", "cross_entropy", "--probe", "8"]
NETWORK += ["--reference", "0"]


def analyzed(*words: Any, model: list[str] = NETWORK) -> int:
    return main(["analyze", *map(str, words), "--no-report", *model])


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.warns() as _:  # of Lightning, about logging intervals and workers
        return analyses.fitted(tmp_path_factory.mktemp("live"), 3, live=True)


def test_a_fresh_process_finds_what_the_live_monitor_found(live: Path, tmp_path: Path) -> None:
    words = ["analyze", str(live), "--model", MODEL, "--data", DATA, "--reference", "16", "--batch-size", "8"]
    command = [sys.executable, "-m", "ntk_monitor.cli", *words, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 checkpoints measured, 0 were measured before" in done.stdout
    found, then = ntk.load_history(tmp_path / "out"), ntk.load_history(live)
    seen = {snapshot.step: snapshot for snapshot in then.measured}
    assert [s.step for s in found] == [4, 8, 12]
    for now in found:
        was = seen[now.step]
        assert (now.probe, now.loss, now.epoch) == (was.probe, was.loss, was.epoch)
        for name in ("eigenvalues", "rates", "coordinates", "layer_trace", "predictions"):
            np.testing.assert_allclose(getattr(now, name), getattr(was, name), rtol=1e-6, err_msg=name)
        for name in ("trace", "effective_rank", "alignment"):
            np.testing.assert_allclose(now.metrics[name], was.metrics[name], rtol=1e-6, err_msg=name)
        # Lanczos from another start.
        assert now.metrics["lr_headroom_high"] == pytest.approx(was.metrics["lr_headroom_high"], rel=1e-3)
    for now in list(found)[1:]:
        assert now.metrics["kernel_change"] == pytest.approx(seen[now.step].metrics["kernel_change"], rel=1e-6)
        assert now.metrics["linearisation_error"] == pytest.approx(
            seen[now.step].metrics["linearisation_error"], rel=1e-4
        )
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_one_lightning_checkpoint_with_its_hyper_parameters(
    live: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(live.rglob("*step=8.ckpt"))
    assert analyzed(file, "--out", tmp_path, model=["--model", MODEL, "--data", DATA]) == 0
    assert "the probe that the run itself measured" in capsys.readouterr().out
    (one,) = ntk.load_history(tmp_path)
    assert (one.step, one.samples, one.probe) == (8, 8, ntk.load_history(live)[0].probe)
    # Another width is another network.
    assert analyzed(file, "--out", tmp_path, model=["--model", MODEL, "--data", DATA, "--model.width", "9"]) == 2
    assert "shapes net.0.weight (8, 6) for (9, 6)" in capsys.readouterr().err


def test_state_dicts_and_safetensors_with_data_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = analyses.data().tensors
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    torch.save((x, y), tmp_path / "data.pt")
    nets = [analyses.network() for _ in range(2)]
    for i, net in enumerate(nets):
        torch.save(net.state_dict(), tmp_path / f"step={i}.pth")
        (tmp_path / "safe").mkdir(exist_ok=True)
        save_file(net.state_dict(), tmp_path / "safe" / f"a-{i}.safetensors", {"step": str(i)})
    common = ["--model", "tests.analyses:network", "--loss", "cross_entropy", "--probe", "8"]
    plain = ["step=0.pth", "step=1.pth"]
    assert (
        analyzed(*(tmp_path / p for p in plain), "--out", tmp_path / "a", "--data", tmp_path / "data.npz", model=common)
        == 0
    )
    assert analyzed(tmp_path / "safe", "--out", tmp_path / "b", "--data", tmp_path / "data.pt", model=common) == 0
    one, other = ntk.load_history(tmp_path / "a"), ntk.load_history(tmp_path / "b")
    assert analyses.differences(one, other) == []
    for snapshot, net in zip(one, nets, strict=True):
        inputs = ntk.Probe.of(analyses.data(), 8).inputs
        wanted = ntk.empirical_ntk(net, inputs).reshape(24, 24).double()
        np.testing.assert_allclose(snapshot.eigenvalues, np.linalg.eigvalsh(wanted.numpy())[::-1], rtol=1e-4, atol=1e-6)
    assert "no optimizer state is saved with it" in capsys.readouterr().out


# Each makes a bad file of a good one.
def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _wrong_dtype(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "model": {k: v.to(torch.int8) for k, v in content["model"].items()}}, path)


def _unfit(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "model": analyses.network(5).state_dict()}, path)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (_truncated, "damaged, of another kind, or still being written"),
    "wrong architecture": (_unfit, "does not fit Sequential: shapes"),
    "wrong dtype": (_wrong_dtype, "does not fit Sequential: dtypes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_alone_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = analyses.series(tmp_path, 1)
    damage, words = BAD[name]
    damage(path)
    assert analyzed(path) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert "measured" not in said.out


def test_bad_checkpoints_among_good_ones_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = analyses.series(tmp_path / "all", 8)
    bad = (0, 2, 3, 7)
    for i, name in zip(bad, ("wrong architecture", "empty", "truncated", "wrong dtype"), strict=True):
        BAD[name][0](paths[i])
    assert analyzed(tmp_path / "all") == 0
    said = capsys.readouterr().out
    assert "4 checkpoints measured" in said
    assert said.count("not measured: ") == 4
    assert all(f"not measured: {paths[i].name}: " in said for i in bad)
    assert analyzed(tmp_path / "all", "--strict") == 1
    assert "0 checkpoints measured, 4 were measured before" in capsys.readouterr().out
    # As if the bad ones had never been there.
    good = [path for i, path in enumerate(paths) if i not in bad]
    assert analyzed(*good, "--out", tmp_path / "good") == 0
    found = ntk.load_history(tmp_path / "all" / "ntk_analysis")
    assert analyses.differences(found, ntk.load_history(tmp_path / "good")) == []


class Evil:
    """A pickle that makes a directory when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.mark), 0o777, True)


def test_a_malicious_checkpoint_executes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "executed"
    (path,) = analyses.series(tmp_path / "run", 1)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Evil(mark)}, path)
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Evil(mark)))
    assert analyzed(path) == 2
    said = capsys.readouterr().err
    assert "makedirs" in said
    assert "--trust-checkpoint" in said
    assert said.count("\n") == 1
    assert analyzed(bare) == 2
    assert main(["plan", str(path), *NETWORK]) == 2
    assert not mark.exists()
    # The test can fail: with trust it does run.
    assert analyzed(path, "--trust-checkpoint") == 0
    assert mark.exists()


def test_a_diverged_network_is_recorded_as_a_live_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = analyses.series(tmp_path, 4)
    content = torch.load(paths[1], weights_only=True)
    content["model"]["0.weight"][0, 0] = float("nan")
    torch.save(content, paths[1])
    assert analyzed(tmp_path) == 0
    assert "not measured: step 1: " in capsys.readouterr().out
    found = ntk.load_history(tmp_path / "ntk_analysis")
    assert [s.status for s in found] == ["measured", "skipped", "measured", "measured"]
    # Nothing is compared across it, and what follows is compared again.
    assert "kernel_change" not in found[2].metrics
    assert "kernel_change" in found[3].metrics
    assert analyzed(tmp_path, "--strict") == 1
    assert analyzed(paths[1], "--out", tmp_path / "alone") == 2


def test_half_precision_weights_and_averages_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, mean = analyses.network(), analyses.network()
    half = {f"module.{name}": value.bfloat16() for name, value in net.state_dict().items()}
    torch.save({"model": half, "ema": mean.state_dict(), "step": 3}, tmp_path / "a.pt")
    assert analyzed(tmp_path / "a.pt") == 0
    said = capsys.readouterr().out
    assert "weights are converted: bfloat16 → float32" in said
    assert "module. removed from the names" in said
    assert analyzed(tmp_path / "a.pt", "--average", "--out", tmp_path / "mean") == 0
    live, average = ntk.load_history(tmp_path / "ntk_analysis")[0], ntk.load_history(tmp_path / "mean")[0]
    assert live.metrics["trace"] != average.metrics["trace"]
    assert analyzed(tmp_path / "a.pt", "--state-dict-key", "swa") == 2
    assert "holds live, ema, average, wanted swa" in capsys.readouterr().err


def test_plan_says_bytes_and_seconds_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyses.series(tmp_path, 2)
    assert main(["plan", str(tmp_path), *NETWORK]) == 0
    said = capsys.readouterr().out
    assert "2 checkpoints x " in said
    assert "MiB" in said or "KiB" in said or "kB" in said or "MB" in said
    assert not (tmp_path / "ntk_analysis").exists()


def test_what_cannot_fit_is_refused_with_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    analyses.series(tmp_path, 1)
    monkeypatch.setattr("ntk_monitor.analysis.free", lambda _: 6_000)
    for command in ("plan", "analyze"):
        assert main([command, str(tmp_path), *NETWORK]) == 2
        said = capsys.readouterr().err
        assert "a kernel of 24 x 24" in said
        assert "take 18,432 bytes, 6,000 bytes are free; --probe 4 or --outputs loss would fit" in said
    assert main(["plan", str(tmp_path), *NETWORK, "--outputs", "loss"]) == 0
    assert main(["plan", str(tmp_path), *NETWORK, "--probe", "4"]) == 0


MISSING: dict[str, tuple[list[str], str]] = {
    "model": (["--data", DATA], "nothing says which class"),
    "data": (["--model", "tests.analyses:network"], "nothing says which data"),
    "import": (["--model", "tests.analyses.Nothing", "--data", DATA], "cannot be imported"),
    "probe": ([*NETWORK, "--probe", "0"], "--probe must be at least 1, got 0"),
    "outputs": ([*NETWORK, "--outputs", "some"], "outputs must be auto"),
    "loss": ([*NETWORK, "--loss", "cross"], "cross"),
    "device": ([*NETWORK, "--device", "tpu9"], "--device must be"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = analyses.series(tmp_path, 1)
    model, words = MISSING[name]
    assert analyzed(path, model=model) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
