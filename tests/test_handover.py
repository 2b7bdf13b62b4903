"""What one probe hands to the next survives a file to the bit, and is no pickle of ours."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntk_monitor.errors import CheckpointError
from ntk_monitor.handover import load, packed, save, unpacked
from ntk_monitor.look import Place
from ntk_monitor.losses import cross_entropy
from ntk_monitor.modes import Modes
from ntk_monitor.monitor import Monitor
from ntk_monitor.recipe import Recipe
from tests import analyses


def same(one: Any, other: Any) -> bool:
    """True when two nests are equal to the bit, in types as well."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return bool(one == other or (one != one and other != other))


NESTS: dict[str, Any] = {
    "plain": {"a": 1, "b": -0.5, "c": "x", "d": None, "e": True},
    "not finite": [float("nan"), float("inf"), np.array([np.nan, -np.inf])],
    "keys": {1: "one", ("a", 2): (), "record": "array", "tuple": {}},
    "nested": ((1, [2, (3,)]), {"x": {"y": [np.zeros((0, 3)), torch.arange(3, dtype=torch.int8)]}}),
    "dtypes": [
        np.arange(3, dtype=np.int32),
        np.array([1.5], dtype=np.float32),
        torch.tensor([1e-40], dtype=torch.float64),
    ],
}


@pytest.mark.parametrize("name", NESTS)
def test_nests_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    save(NESTS[name], tmp_path / "state")
    assert same(load(tmp_path / "state"), NESTS[name])


def test_numbers_of_numpy_become_plain_and_arrays_are_copies() -> None:
    assert packed(np.float64(2.5)) == 2.5
    array = np.zeros(3)
    held = unpacked(packed({"a": array}))["a"]
    array[0] = 1
    assert held[0] == 0


def test_a_monitor_goes_on_in_another_process(tmp_path: Path) -> None:
    net = analyses.network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    data = analyses.data()

    def monitor() -> Monitor:
        made = Monitor(net, optimizer, data, cross_entropy(), reference=data, recipe=Recipe(verify=False, reference=8))
        made.batch_size, made.total_steps = 8, 10
        return made

    def measured(who: Monitor, i: int) -> Any:
        who.place = Place(i, 2)
        return who.finish(who.measure(2 * i))

    def moved() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(data.tensors[0]), data.tensors[1]).backward()
            optimizer.step()

    first = monitor()
    measured(first, 0)
    handed = first.handed()
    assert {"previous", "kept", "first", "made", "values", "first_values"} <= set(handed)
    assert isinstance(handed["previous"][2], Modes)
    assert handed["made"] is not None
    save(handed, tmp_path / "state")
    # What torch itself reads without trust.
    assert isinstance(torch.load(tmp_path / "state", weights_only=True), dict)
    assert same(load(tmp_path / "state"), handed)
    second = monitor()
    second.take(load(tmp_path / "state"))
    moved()
    here, there = measured(first, 1), measured(second, 1)
    assert "forecast_error_residual" in here.facts
    assert "kernel_change" in here.metrics
    cost = {"overhead": 0, "startup_seconds": 0}
    assert {**here.metrics, **cost} == {**there.metrics, **cost}
    assert {**here.facts, **cost} == {**there.facts, **cost}
    assert analyses.bits(here) == analyses.bits(there)


def test_what_has_no_plain_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear cannot be handed on"):
        save({"a": torch.nn.Linear(1, 1)}, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="holds no handed-over state"):
        load(path)
    torch.save({"record": "Popen", "fields": {"args": "true"}}, path)
    with pytest.raises(CheckpointError, match="holds no handed-over state"):
        load(path)
