"""What a Trainer knows of the run ahead comes true, and asking changes nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

from ntk_monitor.callbacks.ahead import clipping, effective_batch, planned_steps, rates_ahead, training_samples
from ntk_monitor.callbacks.trainer_data import drawn, reference_samples
from ntk_monitor.probe import Probe, beside
from ntk_monitor.recipe import Recipe
from tests.training import state_hash, trainer

BATCHES, EPOCHS = 7, 3

Plan = Callable[[torch.optim.Optimizer], dict[str, Any]]


class Planned(L.LightningModule):
    """A linear model whose learning rates follow a plan."""

    def __init__(self, plan: Plan, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.plan, self.optimizer = plan, optimizer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [{"params": [self.net.weight], "lr": 0.01}, {"params": [self.net.bias]}]
        optimizer = self.optimizer(groups, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": self.plan(optimizer)}


class Foretold(Callback):
    """Asks for all rates to come wherever the monitor may, and writes down those that come."""

    def __init__(self) -> None:
        self.foretold: dict[int, Any] = {}
        self.used: list[list[float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ask(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.used.append([float(g["lr"]) for g in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.ask(trainer)

    def ask(self, trainer: Any) -> None:
        before = self.state(trainer)
        left = (planned_steps(trainer) or 0) - trainer.global_step
        if left > 0:
            self.foretold[trainer.global_step] = rates_ahead(trainer, left)
        assert self.state(trainer) == before

    def state(self, trainer: Any) -> str:
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        shown = [{k: v for k, v in state.items() if k != "_schedulers"} for state in schedulers]
        return state_hash([shown, [o.state_dict() for o in trainer.optimizers]])


def data() -> DataLoader[Any]:
    x = torch.randn(4 * BATCHES, 3)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def followed(root: Path, module: L.LightningModule, **options: Any) -> Foretold:
    seen = Foretold()
    trainer(root, [seen], max_epochs=EPOCHS, **options).fit(module, data())
    return seen


def step(scheduler: Any, frequency: int = 1) -> dict[str, Any]:
    return {"scheduler": scheduler, "interval": "step", "frequency": frequency}


def epoch(scheduler: Any, frequency: int = 1) -> dict[str, Any]:
    return {"scheduler": scheduler, "interval": "epoch", "frequency": frequency}


def warm_then_cosine(o: torch.optim.Optimizer) -> Any:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, 12)], [5])


PLANS: dict[str, Plan] = {
    "lambda by step": lambda o: step(lrs.LambdaLR(o, lambda t: 1 / (1 + t))),
    "cosine by step": lambda o: step(lrs.CosineAnnealingLR(o, 21)),
    "cosine by epoch": lambda o: epoch(lrs.CosineAnnealingLR(o, EPOCHS)),
    "one cycle": lambda o: step(lrs.OneCycleLR(o, [0.1, 1.0], total_steps=22)),
    "warm-up, then cosine": lambda o: step(warm_then_cosine(o)),
    "every third batch": lambda o: step(lrs.ExponentialLR(o, 0.5), 3),
    "every second epoch": lambda o: epoch(lrs.StepLR(o, 1), 2),
    "two chained": lambda o: step(lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.StepLR(o, 4)])),
}


# Accumulated batches matter to plans that count batches or epochs.
COUNTING = ("cosine by epoch", "every third batch", "every second epoch")


@pytest.mark.parametrize(("name", "accumulate"), [*((n, 1) for n in PLANS), *((n, 2) for n in COUNTING)])
def test_the_rates_foretold_at_any_step_are_those_that_are_used(name: str, accumulate: int, tmp_path: Path) -> None:
    seen = followed(tmp_path, Planned(PLANS[name]), accumulate_grad_batches=accumulate)
    steps = len(seen.used)
    assert steps == EPOCHS * -(-BATCHES // accumulate)
    assert set(range(steps)) == set(seen.foretold)
    assert len({tuple(row) for row in seen.used}) > 1
    for at, rates in seen.foretold.items():
        assert rates.shape == (steps - at, 2)
        np.testing.assert_allclose(rates, seen.used[at:], rtol=1e-9, err_msg=f"at step {at}")


def test_a_rate_that_is_a_tensor_stays_what_it_is(tmp_path: Path) -> None:
    def adam(groups: Any, lr: float) -> torch.optim.Optimizer:
        groups = [{**group, "lr": torch.tensor(group.get("lr", lr))} for group in groups]
        return torch.optim.Adam(groups, lr=torch.tensor(lr), foreach=False)

    seen = followed(tmp_path, Planned(PLANS["cosine by step"], adam))
    for at, rates in seen.foretold.items():
        np.testing.assert_allclose(rates, seen.used[at:], rtol=1e-5, err_msg=f"at step {at}")


class Refuses(Planned):
    def factor(self, t: int) -> float:
        return 0.5**t

    def configure_optimizers(self) -> Any:
        self.plan = lambda o: step(lrs.LambdaLR(o, Factor(self)))
        return super().configure_optimizers()

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a module was copied")


class Factor:
    """A callable object, which a scheduler copies together with what it holds."""

    def __init__(self, module: Refuses) -> None:
        self.module = module

    def __call__(self, t: int) -> float:
        return self.module.factor(t)


def test_a_plan_that_holds_the_module_does_not_copy_it(tmp_path: Path) -> None:
    seen = followed(tmp_path, Refuses(PLANS["one cycle"]))
    np.testing.assert_allclose(seen.foretold[3], seen.used[3:])


def test_a_plateau_is_constant_and_no_scheduler_too(tmp_path: Path) -> None:
    def plateau(o: torch.optim.Optimizer) -> dict[str, Any]:
        return {"scheduler": lrs.ReduceLROnPlateau(o, patience=0), "monitor": "train_loss"}

    seen = followed(tmp_path, Planned(plateau))
    assert np.array_equal(seen.foretold[0], np.tile([0.01, 0.1], (BATCHES * EPOCHS, 1)))


def test_nobody_knows_what_users_step_themselves(tmp_path: Path) -> None:
    class Steps(Planned):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    class Uncopyable(lrs.LambdaLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("a handle that cannot be copied")

    class Manual(Planned):
        def __init__(self, plan: Plan) -> None:
            super().__init__(plan)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
            return loss

    plan = PLANS["lambda by step"]
    for module in (Steps(plan), Manual(plan), Planned(lambda o: step(Uncopyable(o, lambda t: 1.0)))):
        assert set(followed(tmp_path, module).foretold.values()) == {None}


class Asks(Callback):
    """Calls a function of the trainer at the first batch, and of the last."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.ask, self.answers = ask, list[Any]()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.answers.append(self.ask(trainer, module, batch))


class Stops(Callback):
    """Ends a run that would never end."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def asked(root: Path, ask: Callable[..., Any], module: Any = None, loader: Any = None, **options: Any) -> Any:
    asks = Asks(ask)
    module = module or Planned(PLANS["cosine by step"])
    also = options.pop("also", [])
    trainer(root, [asks, *also], **{"max_epochs": 1, **options}).fit(module, loader or data())
    return asks.answers[0]


def test_length_batch_and_clipping_are_the_trainers(tmp_path: Path) -> None:
    def ask(run: Any, _: Any, batch: Any) -> Any:
        return planned_steps(run), effective_batch(run, batch), clipping(run), training_samples(run)

    assert asked(tmp_path, ask) == (7, 4, None, 28)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "max_epochs": 5, "gradient_clip_val": 0.5}
    assert asked(tmp_path, ask, **options) == (15, 12, 0.5, 28)
    by_value = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "max_epochs": -1, "max_steps": 4}
    assert asked(tmp_path, ask, **by_value) == (4, 4, None, 28)
    assert asked(tmp_path, ask, max_epochs=-1, max_time={"hours": 1}, limit_train_batches=2, also=[Stops()])[0] is None


def drawing(recipe: Recipe, wanted: Any) -> Callable[..., Any]:
    def ask(run: Any, module: Any, _: Any) -> Any:
        probe = drawn(run, module, wanted, recipe)
        assert probe is not None
        return probe, reference_samples(run, probe, recipe)

    return ask


@pytest.mark.parametrize(("wanted", "reference"), [(8, 512), (8, 12), (27, 512), (None, 5)])
def test_reference_samples_are_training_samples_beside_the_probe(wanted: Any, reference: int, tmp_path: Path) -> None:
    loader = data()
    x, y = loader.dataset.tensors  # type: ignore[attr-defined]
    probe, others = asked(tmp_path, drawing(Recipe(reference=reference), wanted), loader=loader)
    if wanted is None:
        assert (probe.samples, others) == (28, None)  # the probe is the whole set
        return
    assert others.samples == min(reference, 28 - wanted)
    assert not set(others.indices) & set(probe.indices)
    assert len(set(others.indices)) == others.samples
    assert torch.equal(others.inputs, x[list(others.indices)])
    assert torch.equal(others.targets, y[list(others.indices)])


def test_no_reference_where_it_would_be_wrong(tmp_path: Path) -> None:
    class Moved(Planned):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    probe = Probe(torch.randn(4, 3), torch.randn(4, 1))
    assert asked(tmp_path, drawing(Recipe(reference=0), 8))[1] is None
    assert asked(tmp_path, drawing(Recipe(), probe), Moved(PLANS["one cycle"]))[1] is None
    assert asked(tmp_path, drawing(Recipe(), probe))[1].samples == 28


def test_a_probe_from_another_set_has_no_place_in_the_training_set(tmp_path: Path) -> None:
    probe, others = asked(tmp_path, drawing(Recipe(), data().dataset))
    assert probe.indices == ()
    assert others.samples == 28
    loader = data()
    probe, others = asked(tmp_path, drawing(Recipe(), loader.dataset), loader=loader)
    assert len(probe.indices) == 28
    assert others is None


def test_samples_beside_a_probe_come_in_random_order() -> None:
    x = torch.arange(100.0)[:, None]
    labels = (torch.arange(100) >= 50).long()
    train = TensorDataset(x, labels)
    probe = Probe.of(train, 20, 0)
    found = beside(train, probe, 40, 1)
    assert found is not None
    first = found.targets[:20].double().mean()
    assert 0.2 < float(first) < 0.8  # sorted by class, the first twenty would all be of one
    tensors = beside((x, labels), Probe(x[:3], labels[:3]), 40, 1)
    assert tensors is not None
    assert (tensors.samples, tensors.indices) == (40, ())
    assert 0.2 < float(tensors.targets.double().mean()) < 0.8
    assert beside((x[:5], labels[:5]), Probe(x[:3], labels[:3]), 0, 1) is None
    assert copy.copy(found).hash == beside(train, probe, 40, 1).hash  # type: ignore[union-attr]
