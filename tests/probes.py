"""Probes with every field set, and hypothesis strategies for arbitrary ones."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ntk_monitor.snapshot import Snapshot

F32 = float(np.finfo(np.float32).eps)
"""Stored arrays are rounded to float32: relative error below half of this."""


def probe(step: int, modes: int = 4, **changes: Any) -> Snapshot:
    """Return a measured probe in which no two fields hold the same value by accident."""
    generator = np.random.default_rng(step)
    values: dict[str, Any] = {
        "step": step,
        "wall_time": 1_700_000_000.125 + step,
        "epoch": step // 10,
        "kernel": "full",
        "mode": "train",
        "engine": "rows",
        "engine_reason": "because",
        "precision": "float32 Jacobian, float64 Gram",
        "samples": 3,
        "outputs": 2,
        "parameters": 17,
        "probe": "abc",
        "probe_source": "first 3 of train",
        "noise_floor": 1e-12,
        "rank": 3,
        "condition_number": 123.5,
        "condition_is_lower_bound": True,
        "negative": 1,
        "loss": "mse",
        "loss_status": "matched",
        "loss_value": 0.25 + step,
        "modes_reason": "π ≠ 3",
        "rates_floor": 1e-11,
        "previous_step": step - 1,
        "metrics": {"trace": 1.5 * step, "alignment": -0.5},
        "seconds": {"jacobian": 0.125},
        "facts": {"lr": 0.01, "total_steps": 2.0 + step},
        "texts": {"optimizer": "AdamW"},
        "layers": ("body.0", "head"),
        "directions": ("class 0", "class 1", "rest"),
        "eigenvalues": np.sort(generator.random(modes))[::-1],
        "rates": np.sort(generator.random(modes))[::-1],
        "coordinates": generator.normal(size=modes),
        "carried": generator.normal(size=modes),
        "time_to_learn": generator.random(modes) * 100,
        "forecast_steps": np.array([step, step + 9], dtype=np.int64),
        "forecast_loss": generator.random(2),
        **{f"layer_{name}": generator.random(2) for name in ("trace", "share", "update", "useful", "moved", "norm")},
        **{f"direction_{name}": generator.random(3) for name in ("residual", "rate", "eta")},
        "sample_texts": ("red, white", "", "π\nor so"),
        "interference": generator.normal(size=(3, 3)),
        "forecast_bands": generator.random((2, 4)),
        "forecast_directions": generator.normal(size=(2, 3)),
        "launched_bands": generator.random(4),
        "sample_residual": generator.random(3),
        "predictions": generator.normal(size=(3, 2)),
        "labels": np.array([0, 1, 1], dtype=np.int32),
        "lr_steps": np.array([step], dtype=np.int64),
        "lr_values": np.array([[0.1, 0.01]]),
        "gram": generator.normal(size=(3, 3)),
        "mode_samples": generator.normal(size=(2, 3)),
        "mode_outputs": generator.normal(size=(2, 2)),
        "thumbnails": generator.integers(0, 256, size=(3, 5, 4, 1)).astype(np.uint8),
    }
    return Snapshot(**(values | changes))


def skipped(step: int) -> Snapshot:
    return Snapshot(step=step, wall_time=float(step), status="skipped", reason="out of memory")


def assert_same(got: Snapshot, wanted: Snapshot) -> None:
    """Assert equality of every field: arrays within float32 rounding, all else exactly, NaN equal to NaN."""
    for name in Snapshot.__dataclass_fields__:
        a, b = getattr(got, name), getattr(wanted, name)
        if isinstance(b, np.ndarray):
            assert a.shape == b.shape, name
            np.testing.assert_allclose(a, b, rtol=F32, atol=0, equal_nan=True, err_msg=name)
        else:
            np.testing.assert_equal(a, b, err_msg=name)


def _array(shape: Any, dtype: Any = np.float64) -> st.SearchStrategy[Any]:
    nothing = st.just(np.empty(0))
    return nothing | npst.arrays(dtype, shape)


_lengths = st.integers(1, 5)
_numbers = st.floats()
_names = st.dictionaries(st.text(max_size=8), _numbers, max_size=4)

snapshots: st.SearchStrategy[Snapshot] = st.builds(
    Snapshot,
    step=st.integers(0, 2**62),
    wall_time=st.floats(0, 4e9),
    status=st.sampled_from(["measured", "skipped"]),
    reason=st.text(),
    epoch=st.none() | st.integers(0, 10**6),
    modes_reason=st.text(),
    rank=st.integers(0, 10**6),
    noise_floor=_numbers,
    condition_number=_numbers,
    condition_is_lower_bound=st.booleans(),
    loss_value=_numbers,
    previous_step=st.none() | st.integers(0, 2**62),
    metrics=_names,
    seconds=_names,
    facts=_names,
    texts=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    layers=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    directions=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    sample_texts=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    thumbnails=_array(st.tuples(_lengths, _lengths, _lengths, _lengths), np.uint8),
    mode_samples=_array(st.tuples(_lengths, _lengths)),
    time_to_learn=_array(_lengths),
    layer_share=_array(_lengths),
    interference=_array(st.tuples(_lengths, _lengths)),
    eigenvalues=_array(_lengths),
    rates=_array(_lengths),
    coordinates=_array(_lengths),
    carried=_array(_lengths),
    predictions=_array(st.tuples(_lengths, _lengths)),
    labels=_array(_lengths, np.int32),
    lr_steps=_array(_lengths, np.int64),
    lr_values=_array(st.tuples(_lengths, _lengths)),
    gram=_array(st.tuples(_lengths, _lengths)),
)
