"""Two processes: training is what it is without the monitor, kernels are those of one process, nobody is left waiting.

Bit for bit where weights are compared; kernels to 1e-10 of their largest entry in float64, against `measured` on one
process at the same weights, and at the end against a plain network that torch itself gathered.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest

from ntk_monitor.callbacks.ranks import refusal
from tests.launch import together
from tests.ranks import SCENARIOS, TIMEOUT

FAULTS = [name for name in SCENARIOS if " fails on " in name]
KEPT = ("weights", "buffers", "random")


def trained_alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) == 2 and all(a[k] == b[k] for a, b in zip(one, other, strict=True) for k in KEPT)


def exact(seen: list[dict[str, Any]], kernels: int) -> bool:
    return bool(seen[0]["compared"] == kernels and seen[0]["error"] < 1e-10)


def test_replicas_share_the_rows_of_a_kernel_and_train_as_without_it(tmp_path: Path) -> None:
    seen = together(tmp_path, "plain", "watched", "kernel fails on 1")
    watched, failed = seen["watched"], seen["kernel fails on 1"]
    assert trained_alike(seen["plain"], watched)
    assert watched[0]["buffers"] != watched[1]["buffers"]  # BatchNorm differs, so that rank 0's must have been used
    assert watched[0]["steps"] == [0, 2, 4, 6]
    assert watched[1]["steps"] == []
    assert all(reason.endswith("rows shared by 2 processes") for reason in watched[0]["reasons"])
    assert exact(watched, 5)
    # What checkpoints and early stopping look at is the same on both.
    assert watched[0]["published"] == watched[1]["published"] != {}
    assert failed[0]["status"] == ["measured"] * 4
    assert exact(failed, 5)
    assert "shared" in failed[0]["reasons"][0]
    assert "shared" not in failed[0]["reasons"][1]


@pytest.mark.slow
def test_shards_are_put_together_before_every_probe(tmp_path: Path) -> None:
    lost = ("shards fail on 0", "shards fail on 1")
    seen = together(tmp_path, "plain sharded", "sharded", "sharded sgd", "replicated", *lost, seconds=300)
    assert trained_alike(seen["plain sharded"], seen["sharded"])
    for name in ("sharded", "sharded sgd"):
        assert seen[name][0]["status"] == ["measured"] * 4, seen[name]
        assert exact(seen[name], 5), seen[name]
    # Momentum and learning rate reach the copy: the gauge is that of replicas with the same weights.
    assert seen["sharded sgd"][0]["sharpness"] == pytest.approx(seen["replicated"][0]["sharpness"], rel=1e-8)
    for name in lost:
        assert trained_alike(seen["sharded sgd"], seen[name])
        assert seen[name][0]["status"] == ["skipped"] * 3
        assert "planted" in seen[name][0]["resting"]
    assert "AdamW, got 6" in seen["sharded"][0]["stability"][-1]


@pytest.mark.slow
def test_lightning_trains_replicas_and_shards_as_without_it(tmp_path: Path) -> None:
    names = ("plain", "watched", "budget", "plain sharded", "sharded")
    seen = together(tmp_path, *names, program="tests.lightning_ranks", seconds=550)
    for name, plain in (("watched", "plain"), ("budget", "plain"), ("sharded", "plain sharded")):
        assert trained_alike(seen[plain], seen[name]), name
        first, second = seen[name]
        assert first["files"] == 1, name
        assert first["steps"][0] == 0
        assert first["steps"][-1] == 8
        assert first["loss"] == "matched"
        assert first["stability"].startswith("Lanczos")
        # float32 Jacobians of other batches than the whole: equal to rounding
        assert first["eigenvalues"] == pytest.approx(first["wanted"], rel=1e-4, abs=1e-5 * first["wanted"][0])
        # The share of time is told once more at the very end, where nothing is decided any more.
        assert {k: v for k, v in first["metrics"].items() if k != "ntk/overhead"} == {
            k: v for k, v in second["metrics"].items() if k != "ntk/overhead"
        }
    assert seen["watched"][0]["steps"] == [0, 4, 8]
    assert "shared by 2" in seen["watched"][0]["reasons"][-1]


@pytest.mark.slow
def test_a_probe_from_the_first_batch_is_that_of_rank_0(tmp_path: Path) -> None:
    first, _ = together(tmp_path, "stream", program="tests.lightning_ranks", seconds=300)["stream"]
    assert first["status"] == ["measured"] * 3
    assert "first training batch" in first["source"]
    assert "shared by 2" in first["reasons"][-1]
    assert first["eigenvalues"] == pytest.approx(first["wanted"], rel=1e-4, abs=1e-5 * first["wanted"][0])


@pytest.mark.parametrize(("kind", "said"), [("FSDPStrategy", "FSDP1"), ("DeepSpeedStrategy", "engine of its own")])
def test_strategies_that_hide_their_parameters_are_refused_by_name(kind: str, said: str) -> None:
    trainer: Any = SimpleNamespace(strategy=type("Mine", (type(kind, (), {}),), {})())
    assert kind in refusal(trainer, L.LightningModule())
    assert said in refusal(trainer, L.LightningModule())
    assert refusal(SimpleNamespace(strategy=type("DDPStrategy", (), {})()), L.LightningModule()) == ""  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_layout_and_cadence_is_shared(tmp_path: Path) -> None:
    seen = together(tmp_path, "plain", "budget", "trace", "loss", "replicated", seconds=300)
    assert trained_alike(seen["plain"], seen["budget"])
    for name in ("trace", "loss"):
        assert trained_alike(seen["replicated"], seen[name])
    assert seen["budget"][0]["steps"][0] == 0
    assert seen["budget"][0]["steps"][-1] == 6
    assert seen["budget"][0]["published"] == seen["budget"][1]["published"]
    for name in ("budget", "trace", "loss"):
        assert seen[name][0]["error"] < 1e-10
        assert "shared by 2" in seen[name][0]["reasons"][-1]


@pytest.mark.slow
def test_a_fault_on_one_rank_leaves_nobody_waiting(tmp_path: Path) -> None:
    seen = together(tmp_path, "replicated", *FAULTS, "unfit hand", "tired conductor", "divergent", seconds=600)
    for name in [*FAULTS, "unfit hand", "tired conductor"]:
        assert trained_alike(seen["replicated"], seen[name]), name
        assert max(s["seconds"] for s in seen[name]) < 20 * TIMEOUT
        assert seen[name][0]["status"][0] == "measured", seen[name]
    for name in FAULTS:
        whole = not name.startswith(("kernel fails on 0", "finish", "measure"))
        assert seen[name][0]["status"][1:] == ["measured" if whole else "skipped"] * 3, name
        assert bool(seen[name][0]["resting"]) != whole
    assert seen["unfit hand"][0]["steps"] == [0, 2, 4, 6]
    assert seen["tired conductor"][1]["resting"] == "a step of its own failed"
    # Replicas of different functions: the kernel is rank 0's own.
    assert not any("shared" in reason for reason in seen["divergent"][0]["reasons"])
    assert seen["divergent"][0]["status"] == ["measured"] * 4


@pytest.mark.slow
def test_a_network_that_talks_to_other_processes_is_refused(tmp_path: Path) -> None:
    seen = together(tmp_path, "speaking")["speaking"]
    assert len(seen) == 2
    assert seen[0]["status"] == ["skipped"]
    assert all("talks to other processes" in s["resting"] for s in seen)


@pytest.mark.slow
def test_a_process_that_stays_away_costs_the_monitor_and_not_the_run(tmp_path: Path) -> None:
    seen = together(tmp_path, "replicated", "absent")
    assert trained_alike(seen["replicated"], seen["absent"])
    assert seen["absent"][0]["steps"] == [0, 2]
    assert all(s["resting"] for s in seen["absent"])


@pytest.mark.slow
def test_a_killed_process_is_the_trainers_problem(tmp_path: Path) -> None:
    (survivor,) = together(tmp_path, "killed", seconds=90)["killed"]
    # Not our exchange raised, but the backward pass of training, whose processes are gone, too.
    assert survivor["rank"] == 0
    assert "raised" in survivor
