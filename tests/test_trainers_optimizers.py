"""Several optimizers: which one drives what is foretold, whose steps are counted; and what clipping does to a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ntk_monitor as ntk
from ntk_monitor.callbacks import NTKMonitor
from ntk_monitor.errors import InputError
from ntk_monitor.optimizers import picked, read
from ntk_monitor.say import NTKWarning
from tests.fitting import fit, history, tensorboard
from tests.modules import Classifier, digits, loader, mlp
from tests.training import outcome, seeded, trainer


class Players(Classifier):
    """Manual optimization: SGD moves the first layer at every batch, AdamW the last one at every second."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, last = self.optimizers()  # type: ignore[attr-defined]
        for optimizer in (first, last) if batch_idx % 2 else (first,):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        weights = list(self.net.parameters())
        return torch.optim.SGD(weights[:2], lr=0.1), torch.optim.AdamW(weights[2:], lr=0.01)


def watched(optimizer: Any = None, **options: Any) -> NTKMonitor:
    fixed: dict[str, Any] = {"probe": 8, "every_n_steps": 4, "loss": "cross_entropy", "verify": False, "gram_every": 0}
    return NTKMonitor(optimizer=optimizer, **{**fixed, **options})


def test_an_optimizer_is_picked_by_place_or_by_class() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    three = [torch.optim.SGD([parameter], lr=0.1) for _ in range(2)] + [torch.optim.AdamW([parameter])]
    assert picked(three, None) == three
    assert picked(three, 1) == picked(three, "1") == [three[1]]
    assert picked(three, "AdamW") == [three[2]]
    for wrong in ("SGD", "Adam", 3, -1, "generator"):
        with pytest.raises(InputError, match=r"0 \(SGD\), 1 \(SGD\), 2 \(AdamW\)"):
            picked(three, wrong)


def test_parameters_of_the_other_optimizers_are_not_uncovered() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = list(model.parameters())
    first, rest = torch.optim.SGD(weights[:2], lr=0.1), torch.optim.SGD(weights[2:3], lr=0.1)
    assert read(model, first).uncovered == ("1.weight", "1.bias")
    assert read(model, first, others=[rest]).uncovered == ("1.bias",)
    assert read(model, first, others=[rest]).names == ("0.weight", "0.bias")


@pytest.mark.parametrize(("wanted", "steps"), [(0, [0, 4, 8, 10]), ("AdamW", [0, 4, 5])])
def test_the_chosen_optimizer_counts_its_steps_and_drives_the_forecast(
    wanted: Any, steps: list[int], tmp_path: Path
) -> None:
    fit(tmp_path, watched(wanted), Players, logger=tensorboard(tmp_path), max_epochs=1)
    found = history(tmp_path)
    # Ten batches: ten steps of the first, five of the second, fifteen of the Trainer.
    assert list(found.steps) == steps
    name, rate, layers = ("SGD", 0.1, "first") if wanted == 0 else ("AdamW", 0.01, "last")
    assert found[0].texts["optimizer"] == name
    assert np.allclose(found.learning_rates[1], [[rate]])
    assert found[0].facts["uncovered"] == 0
    moved = dict(zip(found[-1].layers, found[-1].layer_share, strict=True))
    assert [moved["net.1"] > 0, moved["net.3"] > 0] == [layers == "first", layers == "last"]
    assert "total_steps" not in found[0].facts
    if wanted == 0:  # Adam has no stable second moment after five steps, and says so
        assert "320 training samples and SGD" in found[0].texts["forecast"]
        # What SGD will do to its layer is foretold; what AdamW does to the other one is not.
        assert found[1].facts["forecast_error_residual"] < found[1].facts["motion"]
        assert found[-1].metrics["sharpness"] > 0
        assert found[-1].facts["lr"] == 0.1


def test_without_a_choice_every_step_of_each_counts(tmp_path: Path) -> None:
    fit(tmp_path, watched(), Players, logger=tensorboard(tmp_path), max_epochs=1)
    found = history(tmp_path)
    assert list(found.steps) == [0, 4, 9, 12, 15]  # a batch may bring two of them
    assert found[0].texts["optimizer"] == "SGD + AdamW"


def test_an_optimizer_that_is_not_there_is_refused_once_and_the_run_goes_on(tmp_path: Path) -> None:
    monitor = watched("Lion")
    with pytest.warns(NTKWarning, match=r"'Lion'; there are: 0 \(SGD\), 1 \(AdamW\)"):
        run = fit(tmp_path, monitor, Players)
    assert run.global_step >= 12
    assert monitor.monitor is None


class Game(Players):
    """A generator and a critic that take turns: three steps of the critic to one of the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"generator": nn.Linear(4, 8), "critic": nn.Linear(8, 1)})

    def forward(self, z: Tensor) -> Tensor:
        made: Tensor = self.net["critic"](torch.tanh(self.net["generator"](z)))  # type: ignore[index]
        return made

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        generator, critic = self.optimizers()  # type: ignore[attr-defined]
        turn = generator if batch_idx % 4 == 3 else critic
        made = self(torch.randn(16, 4)).squeeze(1)
        wanted = torch.full_like(made, float(turn is generator))
        turn.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(made, wanted))
        turn.step()

    def configure_optimizers(self) -> Any:
        players = (self.net["generator"], self.net["critic"])  # type: ignore[index]
        return tuple(torch.optim.SGD(player.parameters(), lr=0.1) for player in players)


def test_one_player_of_a_game_is_watched_and_the_game_is_the_same(tmp_path: Path) -> None:
    seeded()
    probe = (torch.randn(6, 4), torch.ones(6, 1))
    options: dict[str, Any] = {"probe": probe, "loss": "bce_with_logits", "every_n_steps": 1, "params": "generator"}
    alone = fit(tmp_path / "a", [], Game, max_epochs=2)
    played = fit(tmp_path / "b", watched("0", **options), Game, logger=tensorboard(tmp_path / "b"), max_epochs=2)
    assert outcome(played.lightning_module, played) == outcome(alone.lightning_module, alone)
    found = history(tmp_path / "b")
    assert list(found.steps) == [0, 1, 2, 3, 4]  # twenty batches; batches 3 and 7 of each epoch are the generator's
    assert all(s.status == "measured" and s.parameters == 40 for s in found)
    changes = np.diff([s.eigenvalues[0] for s in found])
    assert np.all(changes != 0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_counts_on_with_the_rates_it_uses(tmp_path: Path) -> None:
    def resumed(module: Any, monitor: Any, stop: int, more: int) -> ntk.History:
        run = fit(tmp_path, monitor(), module, logger=tensorboard(tmp_path), max_steps=stop, max_epochs=-1)
        run.save_checkpoint(tmp_path / "half.ckpt")
        again = trainer(tmp_path, [monitor()], max_steps=more, max_epochs=-1, logger=tensorboard(tmp_path))
        again.fit(module(), loader(digits()), ckpt_path=tmp_path / "half.ckpt")
        return ntk.load_history(*sorted((tmp_path / "lightning_logs").iterdir())[-2:])

    both = resumed(Players, lambda: watched(1, every_n_steps=2), 9, 21)
    assert list(both.steps) == [0, 2, 3, 4, 6, 7]  # 9 and 21 steps of both are 3 and 7 of the second

    class Halving(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            halve = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step"}}

    both = resumed(lambda: Halving(mlp()), watched, 5, 8)
    used = {int(k): float(rate) for s in both for k, (rate,) in zip(s.lr_steps, s.lr_values, strict=True)}
    # The second part of the run starts at step 5, with the rate it goes on with.
    assert used == pytest.approx({0: 0.1, 2: 0.05, 4: 0.025, 5: 0.025, 6: 0.0125})


@pytest.mark.slow
def test_the_clipping_of_every_step_is_recorded(tmp_path: Path) -> None:
    applied: list[float] = []

    class Clipped(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norm = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in self.parameters()]))  # type: ignore[union-attr]
            applied.append(min(1.0, 0.3 / (float(norm) + 1e-6)))

    options: dict[str, Any] = {"logger": tensorboard(tmp_path), "max_steps": 8, "max_epochs": -1}
    fit(tmp_path, watched(), lambda: Clipped(mlp(), lr=0.01), gradient_clip_val=0.3, **options)
    found = history(tmp_path)
    assert [s.facts.get("clip_coefficient") for s in found] == [
        None,
        pytest.approx(np.mean(applied[:4]), rel=1e-5),
        pytest.approx(np.mean(applied[4:]), rel=1e-5),
    ]
    assert 0 < min(applied) < 1

    class Own(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)

    last = watched()
    fit(tmp_path, last, lambda: Own(mlp()), gradient_clip_val=0.3)
    assert last.last is not None
    assert "clip_coefficient" not in last.last.facts  # a rule of the user's own, of which nothing is known
