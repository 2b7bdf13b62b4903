"""Models and data again, from names, arguments, configurations and files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_monitor.checkpoints import Checkpoint
from ntk_monitor.errors import InputError
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import save
from ntk_monitor.rebuild import Wish, configuration, data, from_file, imported, instance, model
from tests import analyses


def bare(**hyper_parameters: Any) -> Checkpoint:
    return Checkpoint(Path("a.ckpt"), "lightning", 1, None, {"live": {}}, hyper_parameters=hyper_parameters)


def width(made: nn.Module) -> int:
    return int(next(made.parameters()).shape[0])


def test_words_win_over_hyper_parameters_and_those_over_the_configuration() -> None:
    config = {"model": {"class_path": analyses.MODEL, "init_args": {"width": 5, "lr": 0.7}}}
    made, _ = model(Wish(), bare(), config)
    assert isinstance(made, analyses.Net)
    assert (width(made), made.lr) == (5, 0.7)
    made, _ = model(Wish(), bare(width=6), config)
    assert (width(made), getattr(made, "lr", None)) == (6, 0.7)
    made, _ = model(Wish(None, ("--model.width", "7")), bare(width=6), config)
    assert (width(made), getattr(made, "lr", None)) == (7, 0.7)
    # The arguments of another class say nothing about this one.
    made, _ = model(Wish("tests.analyses:network"), bare(), config)
    assert width(made) == 8


def test_hyper_parameters_that_the_class_does_not_take_are_told() -> None:
    made, notes = model(Wish(analyses.MODEL), bare(width=4, dropout=0.1, _instantiator="x"))
    assert width(made) == 4
    assert notes == ("dropout are no arguments of Net and are left aside",)


class Nested(nn.Module):
    """A module with a module inside, as configurations nest them."""

    def __init__(self, inner: nn.Module, names: list[str], scale: float | None = None) -> None:
        super().__init__()
        self.inner, self.names, self.scale = inner, names, scale


def test_nested_classes_and_lists_are_parsed_as_lightning_cli_does() -> None:
    inner = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    made, _ = instance(Nested, {"inner": inner, "names": ["a", "b"]}, ("--model.scale", "0.5"), "model")
    assert (made.inner.out_features, made.names, made.scale) == (3, ["a", "b"], 0.5)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no class": (lambda: model(Wish(), bare()), r"nothing says which class a\.ckpt belongs to"),
    "no module": (lambda: model(Wish("os.getcwd"), bare()), "--model must give a torch.nn.Module, got str"),
    "no attribute": (lambda: imported("tests.analyses.Absent"), "'tests.analyses.Absent' cannot be imported"),
    "no package": (lambda: imported("no_such_package.Net"), "cannot be imported: ModuleNotFoundError"),
    "no name": (lambda: imported("Net"), "wanted pkg.Class or pkg:function, got 'Net'"),
    "missing": (lambda: instance(Nested, {}, (), "model"), r"Nested cannot be built from no arguments.*--model\.NAME"),
    "wrong": (lambda: model(Wish(analyses.MODEL, ("--model.width", "wide")), bare()), "Net cannot be built"),
    "unknown": (lambda: model(Wish(analyses.MODEL, ("--model.depth", "2")), bare()), "Net cannot be built"),
    "no data": (lambda: data(Wish(), [Path("nowhere/a.ckpt")]), "nothing says which data"),
    "no file": (lambda: data(Wish("nowhere/data.npz"), []), "--data must be an existing file"),
    "no loader": (lambda: data(Wish("lightning.pytorch.LightningDataModule"), []), "gives no training data"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_built_is_one_sentence(name: str) -> None:
    call, words = FAULTS[name]
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_to_import_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_shop.py").write_text("1 / 0\n")
    (tmp_path / "shop_here.py").write_text(
        "import torch\n\ndef net() -> torch.nn.Module:\n    return torch.nn.Linear(1, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'broken_shop\.Net' cannot be imported: ZeroDivisionError"):
        imported("broken_shop.Net")
    assert width(imported("shop_here:net")()) == 1


def test_the_configuration_is_found_above_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    assert configuration(None, [folder / "a.ckpt"]) == ({}, ())
    (tmp_path / "version_0" / "config.yaml").write_text("model: {width: 3}\n")
    found, notes = configuration(None, [folder / "a.ckpt"])
    assert found == {"model": {"width": 3}}
    assert "version_0/config.yaml says" in notes[0]
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="must hold a mapping, got list"):
        configuration(tmp_path / "list.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match="must be a YAML file"):
        configuration(tmp_path / "bad.yaml", [])


def test_a_saved_probe_comes_first_and_data_are_the_training_set_beside_it(tmp_path: Path) -> None:
    probe = Probe.of(analyses.data(), 8)
    save(probe, tmp_path)
    place = [tmp_path / "a.ckpt"]
    alone, notes = data(Wish(), place)
    assert (alone.probe.hash, alone.training) == (probe.hash, None)
    assert "the probe that the run itself measured" in notes[-1]
    both, _ = data(Wish("tests.analyses.Data"), place)
    assert both.probe.hash == probe.hash
    assert isinstance(both.training, DataLoader)
    drawn, _ = data(Wish("tests.analyses.Data", ("--data.batch", "4")), place, drawn=True)
    assert drawn.probe is drawn.training
    assert drawn.probe.batch_size == 4
    # A run whose data are no longer there is still measured.
    lost, notes = data(Wish(), place, {"data": {"class_path": "gone.Data"}})
    assert (lost.probe.hash, lost.training) == (probe.hash, None)
    assert "no forecasts, since the training data are not there" in notes[0]


X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 1, 0])


def _npz(**arrays: Any) -> Callable[[Path], Any]:
    return lambda path: np.savez(path, **arrays)


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "npz x y": ("a.npz", _npz(x=X.numpy(), y=Y.numpy())),
    "npz inputs targets": ("a.npz", _npz(targets=Y.numpy(), inputs=X.numpy())),
    "npz of two": ("a.npz", _npz(images=X.numpy(), digits=Y.numpy())),
    "pt pair": ("a.pt", lambda path: torch.save((X, Y), path)),
    "pt list": ("a.pt", lambda path: torch.save([X, Y], path)),
    "pt mapping": ("a.pth", lambda path: torch.save({"x": X, "y": Y}, path)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_inputs_and_targets_are_data_sets(name: str, tmp_path: Path) -> None:
    file, write = FILES[name]
    write(tmp_path / file)
    found = from_file(tmp_path / file)
    assert isinstance(found, TensorDataset)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, (X, Y), strict=True))
    samples, _ = data(Wish(str(tmp_path / file)), [])
    assert samples.probe is samples.training
    assert Probe.of(samples.probe, 2).samples == 2


def test_other_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.numpy())
    assert torch.equal(Probe.of(from_file(tmp_path / "a.npy"), 9).inputs, X)
    torch.save({"input_ids": X.long(), "labels": Y}, tmp_path / "batch.pt")
    probe = Probe.of(from_file(tmp_path / "batch.pt"), 3)
    assert set(probe.inputs) == {"input_ids"}
    assert probe.samples == 3
    kept = save(probe, tmp_path)
    assert from_file(kept).hash == probe.hash
    np.savez(tmp_path / "three.npz", a=X, b=X, c=X)
    with pytest.raises(InputError, match="must hold inputs and targets"):
        from_file(tmp_path / "three.npz")
    np.savez(tmp_path / "uneven.npz", x=X, y=Y[:2])
    with pytest.raises(InputError, match="cannot be read as samples"):
        from_file(tmp_path / "uneven.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "three.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read as samples"):
        from_file(tmp_path / "bad.npz")
    np.save(tmp_path / "evil.npy", np.array([os.getcwd], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as samples"):
        from_file(tmp_path / "evil.npy")
