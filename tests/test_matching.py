"""The loss is found from its values, or it is said that it was not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_monitor.losses import candidates, cross_entropy
from ntk_monitor.matching import Matching

Function = Callable[[Tensor, Tensor], Tensor]


def run(
    function: Function,
    *,
    module: nn.Module | None = None,
    scale: float = 1.0,
    batches: int = 20,
    seed: int = 0,
    kind: str = "labels",
    n: int = 16,
    c: int = 10,
    dtype: torch.dtype = torch.float32,
) -> Matching:
    """Feed batches of random outputs and targets until the matching is over, as a Trainer would."""
    generator = torch.Generator().manual_seed(seed)
    matching = Matching(candidates(module or nn.Module()))
    for _ in range(batches):
        f = (scale * torch.randn(n, c, generator=generator)).to(dtype)
        y = {
            "labels": lambda: torch.randint(c, (n,), generator=generator),
            "binary": lambda: torch.randint(2, (n, c), generator=generator).float(),
            "numbers": lambda: torch.randn(n, c, generator=generator),
        }[kind]()
        matching.add(f.float(), y, float(function(f, y.to(dtype) if y.is_floating_point() else y)))
        if matching.over:
            break
    return matching


USUAL: list[tuple[str, str, Function]] = [
    ("cross_entropy(mean)", "labels", F.cross_entropy),
    ("cross_entropy(sum)", "labels", lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    ("cross_entropy(mean, label_smoothing=0.05)", "labels", lambda f, y: F.cross_entropy(f, y, label_smoothing=0.05)),
    ("cross_entropy(mean, label_smoothing=0.1)", "labels", lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1)),
    ("cross_entropy(mean, label_smoothing=0.2)", "labels", lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2)),
    ("bce_with_logits(mean)", "binary", F.binary_cross_entropy_with_logits),
    ("bce_with_logits(sum)", "binary", lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum")),
    ("mse(mean)", "numbers", F.mse_loss),
    ("mse(sum)", "numbers", lambda f, y: F.mse_loss(f, y, reduction="sum")),
    ("huber(mean, delta=1)", "numbers", F.huber_loss),
]


@pytest.mark.parametrize(("name", "kind", "function"), USUAL, ids=[name for name, _, _ in USUAL])
@pytest.mark.parametrize("scale", [1.0, 0.1, 5.0])
def test_the_usual_losses_are_found(name: str, kind: str, function: Function, scale: float) -> None:
    for seed in range(5):
        matching = run(function, kind=kind, scale=scale, seed=seed)
        assert matching.match is not None
        assert matching.match.name == name
        assert matching.status == "matched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.1, 0.2])
def test_near_initialisation_label_smoothing_is_never_decided_wrongly(dtype: torch.dtype, smoothing: float) -> None:
    def function(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, label_smoothing=smoothing)

    for seed in range(150):
        scale = 10.0 ** (-seed / 25)  # 1 to 1e-6
        matching = run(function, scale=scale, seed=seed, batches=3, dtype=dtype)
        if matching.match is not None:
            assert matching.match.options["label_smoothing"] == smoothing
        elif matching.worst and min(matching.worst) < 1e-3:
            assert matching.status.startswith("not verified: several known losses give the Trainer's value; pass loss=")


def test_outputs_that_are_all_zero_decide_nothing_and_end_after_a_while() -> None:
    matching = run(F.cross_entropy, scale=0.0)
    assert matching.match is None
    assert matching.over
    assert matching.batches == 8
    assert "several known losses" in matching.status


def test_half_precision_is_decided_where_the_losses_differ() -> None:
    matching = run(F.cross_entropy, scale=5.0, dtype=torch.float16)
    assert matching.match is not None
    assert matching.match.name == "cross_entropy(mean)"


def test_class_weights_are_found_where_they_are_attached() -> None:
    module = nn.Module()
    module.criterion = nn.CrossEntropyLoss(torch.linspace(0.2, 3, 10))
    matching = run(module.criterion, module=module)
    assert matching.match is not None
    assert matching.match.options["weight"] is module.criterion.weight
    # Without the module nobody can know them.
    assert run(module.criterion).match is None


@pytest.mark.parametrize("used", [0, 1])
def test_two_attached_losses_of_one_name_are_told_apart(used: int) -> None:
    module = nn.Module()
    module.first = nn.CrossEntropyLoss(torch.linspace(0.2, 3, 10))
    module.second = nn.CrossEntropyLoss(torch.linspace(3, 0.2, 10))
    criterion = [module.first, module.second][used]
    matching = run(criterion, module=module)
    assert matching.match is not None
    assert matching.match.options["weight"] is criterion.weight


def test_pos_weight_is_found_where_it_is_attached() -> None:
    module = nn.Sequential(nn.BCEWithLogitsLoss(pos_weight=torch.full((10,), 3.0)))
    matching = run(module[0], module=module, kind="binary")
    assert matching.match is not None
    assert matching.match.name == "bce_with_logits(mean, pos_weight)"


def _focal(f: Tensor, y: Tensor) -> Tensor:
    p = f.softmax(1).gather(1, y[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


def _broadcast(f: Tensor, y: Tensor) -> Tensor:
    return (f - y[:, 0]).square().mean()


UNKNOWN: list[tuple[str, Function, dict[str, Any]]] = [
    ("focal loss", _focal, {}),
    ("scaled cross-entropy", lambda f, y: 1.01 * F.cross_entropy(f, y), {}),
    ("cross-entropy plus a penalty", lambda f, y: F.cross_entropy(f, y) + 0.01, {}),
    ("a column against a row", _broadcast, {"kind": "numbers", "c": 1}),
    ("infinite", lambda f, y: F.cross_entropy(f, y) * float("inf"), {}),
    ("not a number", lambda f, y: F.cross_entropy(f, y) * float("nan"), {}),
]


@pytest.mark.parametrize(("function", "options"), [u[1:] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_what_is_unknown_is_said_to_be_not_verified(function: Function, options: dict[str, Any]) -> None:
    for seed in range(5):
        matching = run(function, seed=seed, **options)
        assert matching.match is None
        assert matching.over
        assert matching.batches == 3
        assert matching.status.startswith("not verified: no known loss gives the Trainer's value (")
        assert matching.status.endswith("; pass loss=")


def test_a_coincidence_of_one_batch_is_not_a_match() -> None:
    matching = Matching([cross_entropy()])
    f, y = torch.randn(8, 3), torch.randint(3, (8,))
    matching.add(f, y, float(_focal(f, y)))
    matching.add(f, y, float(F.cross_entropy(f, y)))
    assert matching.match is None


def test_without_evidence_nothing_is_claimed() -> None:
    matching = Matching(candidates(nn.Module()))
    assert matching.match is None
    assert not matching.over
    assert matching.status == "not verified: no training loss was seen"


@pytest.mark.parametrize("penalty", [1e-4, 5e-4, 1e-3])
def test_a_penalty_inside_the_loss_is_not_taken_for_label_smoothing(penalty: float) -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        matching = Matching(candidates(net))
        with torch.no_grad():
            decay = penalty * sum(float(p.square().sum()) for p in net.parameters())
            while not matching.over:
                x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
                matching.add(net(x), y, float(F.cross_entropy(net(x), y)) + decay)
        assert matching.match is None
