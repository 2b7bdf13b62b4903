"""Checkpoints as real libraries write them, and everything that may be wrong with a file."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from ntk_monitor.checkpoints import LIVE, Checkpoint, digest, find, ordered
from ntk_monitor.errors import CheckpointError
from ntk_monitor.reading import read
from ntk_monitor.weights import apply, chosen
from tests.modules import Classifier, digits, loader, mlp
from tests.training import seeded, trainer


def fitted(root: Path, **options: Any) -> tuple[L.LightningModule, L.Trainer]:
    seeded()
    module = Classifier(mlp(), optimizer="adamw")
    run = trainer(root, options.pop("callbacks", []), max_steps=3, max_epochs=-1, **options)
    run.fit(module, loader(digits(64)))
    return module, run


@pytest.fixture(scope="module")
def lightning_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, L.LightningModule]:
    root = tmp_path_factory.mktemp("lightning")
    keep = ModelCheckpoint(root, filename="a", every_n_train_steps=3)
    module, _ = fitted(root, callbacks=[EMAWeightAveraging(decay=0.5), keep], enable_checkpointing=True)
    return root / "a.ckpt", module


def test_lightning_checkpoints_keep_live_weights_average_and_optimizer(
    lightning_checkpoint: tuple[Path, L.LightningModule],
) -> None:
    path, _ = lightning_checkpoint
    found = read(path)
    assert (found.kind, found.step) == ("lightning", 3)
    assert set(found.states) == {LIVE, "average"}
    # On the way out the callback leaves the average in the module, so the file itself is asked.
    content = torch.load(path, weights_only=True)
    assert all(torch.equal(found.states[LIVE][k], v) for k, v in content["current_model_state"].items())
    assert all(torch.equal(found.states["average"][k], v) for k, v in content["state_dict"].items())
    assert not torch.equal(found.states[LIVE]["net.1.weight"], found.states["average"]["net.1.weight"])
    assert float(found.optimizers[0]["state"][0]["step"]) == 3
    assert not found.notes
    fresh = Classifier(mlp())
    assert apply(fresh, chosen(found, average=True)) == ()
    assert torch.equal(fresh.net[1].weight, content["state_dict"]["net.1.weight"])  # type: ignore[index]
    with pytest.raises(CheckpointError, match="holds live, average, wanted swa"):
        chosen(found, key="swa")


class Named(L.LightningModule):
    def __init__(self, width: int = 4, where: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)


def test_hyper_parameters_that_lightning_writes_are_read_without_trust(tmp_path: Path) -> None:
    run = trainer(tmp_path, [])
    run.strategy.connect(Named(7, tmp_path))
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    found = read(tmp_path / "a.ckpt")
    assert dict(found.hyper_parameters) == {"width": 7, "where": tmp_path}
    assert any("no optimizer state" in note for note in found.notes)


@pytest.fixture(scope="module")
def huggingface_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    root = tmp_path_factory.mktemp("huggingface")
    seeded()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    ids = torch.randint(0, 11, (8, 6))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(root),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data).train()
    return root, model


def test_hugging_face_runs_are_found_and_read(huggingface_run: tuple[Path, Any]) -> None:
    root, model = huggingface_run
    found = [read(path) for path in find([root])]
    assert [(one.kind, one.step) for one in found] == [("huggingface", 2), ("huggingface", 4)]
    last = found[-1]
    assert last.optimizers[0]["state"][0]["exp_avg"].shape
    from transformers import GPT2LMHeadModel

    fresh = GPT2LMHeadModel(model.config)
    notes = apply(fresh, chosen(last))
    assert any("lm_head.weight" in note for note in notes)  # safetensors stores tied weights once
    assert all(torch.equal(a, b.cpu()) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_sharded_checkpoints_need_trust_and_then_give_the_same_weights(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = mlp().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it saves in one process, as is meant
        dcp.save({"state_dict": state, "global_step": 7}, checkpoint_id=tmp_path / "sharded", no_dist=True)  # type: ignore[attr-defined]
    path = find([tmp_path])[0]
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        read(path)
    found = read(path, trust=True)
    assert (found.kind, found.step) == ("sharded", 7)
    assert found.digest == digest(state)


def test_plain_files_say_where_weights_and_step_were(tmp_path: Path) -> None:
    net, ema = mlp(), mlp()
    torch.save(net.state_dict(), tmp_path / "step_10.pt")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    content = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": 20}
    torch.save(content, tmp_path / "nested.pth")
    save_file(net.state_dict(), tmp_path / "c-step=30.safetensors", {"step": "31"})
    save_file(ema.state_dict(), tmp_path / "step_10.safetensors")
    found = {path.name: read(path) for path in find([tmp_path])}
    # safetensors are preferred to the pickle of the same name.
    assert set(found) == {"step_10.safetensors", "nested.pth", "c-step=30.safetensors"}
    assert [one.step for one in found.values()] == [31, 20, 10]
    assert found["nested.pth"].optimizers
    assert chosen(found["nested.pth"], average=True)["1.weight"].equal(ema[1].weight)  # type: ignore[index]
    assert 'weights are under "model"' in found["nested.pth"].notes
    assert "the step, 10, is taken from the name" in found["step_10.safetensors"].notes
    assert find([tmp_path / "step_10.pt"]) == (tmp_path / "step_10.pt",)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Evil.mark),)

    mark = Path("/nonexistent")


def test_a_malicious_pickle_runs_nothing_and_is_refused_by_name(tmp_path: Path) -> None:
    Evil.mark = tmp_path / "executed"
    for name, protocol in (("zip.ckpt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save({"state_dict": mlp().state_dict(), "x": Evil()}, tmp_path / name, **protocol)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for path in find([tmp_path]):
        with pytest.raises(CheckpointError, match=r"mkdir.*--trust-checkpoint|cannot be read"):
            read(path)
    assert not Evil.mark.exists()
    # The test can fail: trusted, the same file does run it.
    read(tmp_path / "zip.ckpt", trust=True)
    assert Evil.mark.exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("a.ckpt", lambda path: path.write_bytes(b""), "is empty"),
    "truncated pickle": ("a.pt", truncated, "damaged, of another kind, or still being written"),
    "truncated safetensors": ("a.safetensors", truncated, "damaged or still being written"),
    "text": ("a.pt", lambda path: path.write_text("hello"), "cannot be read"),
    "a tensor": ("a.pt", lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
    "nothing known": ("a.pt", lambda path: torch.save({"cfg": 3}, path), "no state dict: its keys are cfg"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_one_sentence(name: str, tmp_path: Path) -> None:
    file, damage, words = BROKEN[name]
    path = tmp_path / file
    save_file(mlp().state_dict(), path) if path.suffix == ".safetensors" else torch.save(mlp().state_dict(), path)
    damage(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_missing_paths_and_empty_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find([tmp_path / "nowhere"])
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        find([tmp_path])


def test_order_is_by_step_and_copies_count_once(tmp_path: Path) -> None:
    def saved(name: str, step: int | None, seed: int) -> Checkpoint:
        torch.manual_seed(seed)
        content: dict[str, Any] = {"state_dict": mlp().state_dict()}
        torch.save(content if step is None else content | {"step": step}, tmp_path / name)
        return read(tmp_path / name)

    ten, two, last = saved("b.pt", 10, 0), saved("a.pt", 2, 1), saved("last.pt", 10, 0)
    kept, notes = ordered([ten, last, two])
    assert [one.step for one in kept] == [2, 10]
    assert notes == ("last.pt holds the same weights as b.pt",)
    other = saved("other.pt", 10, 5)
    os.utime(other.path, (2e9, 2e9))
    kept, notes = ordered([ten, other])
    assert kept == (other,)
    assert "different networks at step 10" in notes[0]
    bare = [saved("x.pt", None, 1), saved("y.pt", None, 2)]
    os.utime(bare[0].path, (2e9, 2e9))
    kept, notes = ordered(bare)
    assert [(one.path.name, one.step) for one in kept] == [("y.pt", 0), ("x.pt", 1)]
    assert "in the order they were written" in notes[0]
    with pytest.raises(CheckpointError, match="does not say at which step"):
        ordered([ten, bare[0]])


def test_the_digest_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    state = mlp().state_dict()
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    assert read(tmp_path / "a.pt").digest == read(tmp_path / "b.safetensors").digest
    changed = {name: value.clone() for name, value in state.items()}
    changed["1.bias"][0] = torch.nextafter(changed["1.bias"][0], torch.tensor(9.0))
    assert digest(changed) != digest(state)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod.": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "module. and _orig_mod.": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "net.": lambda s: {f"net.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(3)},
    "n_averaged": lambda s: {f"module.{k}": v for k, v in s.items()} | {"n_averaged": torch.tensor(3)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_prefixes_of_wrappers_are_removed_and_told(name: str) -> None:
    source, fresh = mlp(), mlp()
    notes = apply(fresh, WRAPPED[name](dict(source.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), fresh.parameters(), strict=True))
    assert len(notes) == 1
    assert "removed from the names" in notes[0]


def test_a_prefix_can_be_missing_too() -> None:
    source, fresh = mlp(), Classifier(mlp())
    assert apply(fresh, source.state_dict()) == ("the prefix net. put in front of the names",)
    assert torch.equal(fresh.net[1].weight, source[1].weight)  # type: ignore[index]


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "1.bias"}, r"missing 1\.bias"),
    "unexpected": (lambda s: s | {"9.gain": torch.ones(1)}, r"unexpected 9\.gain"),
    "another network": (lambda s: {"a.b": torch.ones(1)}, "missing .* and unexpected"),
    "shape": (lambda s: s | {"1.bias": torch.ones(3)}, r"shapes 1\.bias \(3,\) for \(16,\)"),
    "dtype": (lambda s: s | {"1.bias": torch.ones(16, dtype=torch.int8)}, r"dtypes 1\.bias int8 for float32"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_listed_and_nothing_is_copied(name: str) -> None:
    change, words = MISFITS[name]
    source, fresh = mlp(), mlp()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        apply(fresh, change(dict(source.state_dict())))
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())


def test_half_precision_weights_are_converted_and_told() -> None:
    source, fresh = mlp(), mlp()
    notes = apply(fresh, {k: v.bfloat16() for k, v in source.state_dict().items()})
    assert notes == ("weights are converted: bfloat16 → float32",)


def test_a_copied_directory_is_the_same_history(huggingface_run: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(huggingface_run[0], tmp_path / "copy")
    one, two = (find([root]) for root in (huggingface_run[0], tmp_path / "copy"))
    assert [read(path).digest for path in one] == [read(path).digest for path in two]
