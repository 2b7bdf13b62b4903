"""Two processes under a Lightning Trainer: `python -m tests.lightning_ranks RANK FILE SCENARIO ...`."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from tests.modules import Classifier, cnn, digits, loader, mlp
from tests.training import QUIET, seeded, state_hash

STEPS = 8


class Sharded(Classifier):
    """The same classifier under FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        net: Any = self.net
        fully_shard(net[1], mesh=mesh)
        fully_shard(net, mesh=mesh)


class Normalised(Classifier):
    """Batches change on their way to the device, so that only the training batches themselves can be probed."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - 0.5, batch[1]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Digits one after the other, others on every process."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank = int(os.environ["LOCAL_RANK"])
        data = digits()
        return (data[i] for i in range(rank, len(data), 2))


def fit(root: Path, module: L.LightningModule, data: Any, strategy: Any, callbacks: list[Any]) -> dict[str, Any]:
    """Train eight steps; return what this process saw."""
    options = {**QUIET, "devices": 2, "enable_checkpointing": True}
    trainer = L.Trainer(
        **options,
        strategy=strategy,
        max_steps=STEPS,
        logger=TensorBoardLogger(root) if callbacks else False,
        default_root_dir=root,
        callbacks=[*callbacks, *([] if callbacks else [ModelCheckpoint(save_last=False, save_top_k=0)])],
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    full = [getattr(p, "full_tensor", lambda p=p: p)() for p in module.parameters()]
    found: dict[str, Any] = {
        "rank": trainer.global_rank,
        "weights": state_hash([p.detach() for p in full]),
        "buffers": state_hash(list(module.buffers())),
        "random": state_hash(torch.get_rng_state()),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("ntk/")},
    }
    files = sorted(root.rglob("*tfevents*"))
    if callbacks and trainer.is_global_zero:
        history = ntk.load_history(files[0].parent)
        found["files"] = len(files)
        found["steps"] = [s.step for s in history.snapshots]
        found["status"] = [s.status for s in history.snapshots]
        found["reasons"] = [s.engine_reason or s.reason for s in history.snapshots]
        found["loss"] = history.snapshots[-1].loss_status
        found["stability"] = history.snapshots[-1].texts.get("stability", "")
        found["source"] = history.snapshots[-1].probe_source
        found["eigenvalues"] = history.snapshots[-1].eigenvalues.tolist()
        plain = _plain(module, full)
        probe = callbacks[0].monitor.probe
        wanted = ntk.empirical_ntk(plain, probe.inputs)
        found["wanted"] = ntk.Spectrum.of(wanted.flatten(0, 1).flatten(1, 2)).eigenvalues.tolist()
    return found


def _plain(module: Any, full: list[Tensor]) -> nn.Module:
    """Return a plain network with these weights and the module's buffers."""
    net: nn.Module = cnn() if list(module.buffers()) else mlp()
    with torch.no_grad():
        for new, value in zip([*net.parameters(), *net.buffers()], [*full, *module.buffers()], strict=True):
            new.copy_(value)
    return net.to(full[0].dtype)


def monitor(**options: Any) -> NTKMonitor:
    return NTKMonitor(**{"probe": 12, "every_n_steps": 4, "reference": 16, **options})


def stops(root: Path) -> list[Any]:
    """Callbacks whose decisions would hang a run where they differ from process to process."""
    return [
        EarlyStopping("ntk/trace", mode="max", patience=100),
        ModelCheckpoint(root / "kept", monitor="ntk/condition_log10", mode="min", every_n_train_steps=3, save_top_k=2),
    ]


def replicated(root: Path, callbacks: list[Any]) -> dict[str, Any]:
    seeded()
    return fit(root, Classifier(cnn()), loader(digits()), "ddp", callbacks)


def streamed(root: Path) -> dict[str, Any]:
    seeded()
    return fit(root, Normalised(cnn()), DataLoader(Stream(), 16), "ddp", [monitor()])


def sharded(root: Path, callbacks: list[Any]) -> dict[str, Any]:
    seeded()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return fit(root, Sharded(mlp()), loader(digits()), strategy, callbacks)


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda root: replicated(root, []),
    "watched": lambda root: replicated(root, [monitor(), *stops(root)]),
    "budget": lambda root: replicated(root, [monitor(every_n_steps=None, max_overhead=0.5)]),
    "stream": streamed,
    "plain sharded": lambda root: sharded(root, []),
    "sharded": lambda root: sharded(root, [monitor()]),
}


def main() -> None:
    rank, rendezvous, *scenarios = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": rank, "NODE_RANK": "0"}
    for name in scenarios:
        root = Path(rendezvous).parent / name.replace(" ", "_")
        sys.stdout.write(json.dumps({"scenario": name, **SCENARIOS[name](root)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
