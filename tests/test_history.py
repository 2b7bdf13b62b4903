"""load_history returns what was written, says what was lost, and never trusts damaged bytes."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event

from ntk_monitor.errors import HistoryError, InputError
from ntk_monitor.events import summary
from ntk_monitor.history import History, load_history
from ntk_monitor.recorder import Recorder
from ntk_monitor.records import records
from ntk_monitor.snapshot import SCHEMA, Snapshot
from tests.probes import assert_same, probe, skipped


def _write(directory: Path, snapshots: Iterable[Snapshot], prefix: str = "ntk", start: int | None = None) -> Path:
    """Return the event file written, as if writing had begun at `start` seconds."""
    with Recorder(directory) as recorder:
        for snapshot in snapshots:
            recorder.write(snapshot, prefix, stock=False)
    if start is None:
        return recorder.path
    seconds = recorder.path.name.split(".")[3]
    return recorder.path.rename(recorder.path.with_name(recorder.path.name.replace(seconds, f"{start:010d}")))


def _probes(steps: Iterable[int], **changes: Any) -> list[Snapshot]:
    return [probe(step, **changes) for step in steps]


def _boundaries(path: Path) -> list[int]:
    """Byte offsets at which records end."""
    read = records(path)
    return [read.position for _ in read]


def test_round_trip_in_order(tmp_path: Path) -> None:
    written = [probe(1), skipped(2), probe(3, modes=6)]
    _write(tmp_path, written)
    history = load_history(tmp_path)
    for got, wanted in zip(history, written, strict=True):
        assert_same(got, wanted)
    assert (len(history), history[-1].step, history.notes, history.prefix) == (3, 3, (), "ntk")
    assert [snapshot.step for snapshot in history.measured] == [1, 3]


@pytest.mark.parametrize("make", [str, Path])
def test_a_directory_a_file_and_a_list_read_the_same(tmp_path: Path, make: type) -> None:
    file = _write(tmp_path, _probes([1, 2]))
    for runs in ([make(tmp_path)], [make(file)], [[make(tmp_path)]], [make(tmp_path), make(file)]):
        history = load_history(*runs)
        assert history.steps.tolist() == [1, 2]
        assert history.notes == ()


def test_arrays_run_over_measured_steps_and_are_padded(tmp_path: Path) -> None:
    written = [probe(1, modes=2), skipped(2), probe(3, modes=4, coordinates=np.empty(0), carried=np.empty(0))]
    _write(tmp_path, written)
    history = load_history(tmp_path)
    assert history.steps.tolist() == [1, 3]
    assert history.eigenvalues.shape == history.rates.shape == (2, 4)
    np.testing.assert_array_equal(np.isnan(history.eigenvalues), [[False, False, True, True], [False] * 4])
    np.testing.assert_allclose(history.rates[1], written[2].rates, rtol=1e-6)
    assert history.coordinates.shape == history.carried.shape == (2, 2)
    np.testing.assert_allclose(history.carried[0], written[0].carried, rtol=1e-6)
    assert np.isnan(history.coordinates[1]).all()
    share = written[0].coordinates ** 2 / (written[0].coordinates ** 2).sum()
    np.testing.assert_allclose(history.residual_energy, [share, [np.nan, np.nan]], rtol=1e-6)


def test_scalars_come_from_metrics_or_fields_and_are_nan_where_missing() -> None:
    history = History((probe(1), skipped(2), replace(probe(3), metrics={"new": 2.0}, previous_step=None)))
    np.testing.assert_array_equal(history.scalar("trace"), [1.5, np.nan])
    np.testing.assert_array_equal(history.scalar("new"), [np.nan, 2.0])
    np.testing.assert_array_equal(history.scalar("loss_value"), [1.25, 3.25])
    np.testing.assert_array_equal(history.scalar("previous_step"), [0, np.nan])
    np.testing.assert_array_equal(history.scalar("overhead"), [np.nan, np.nan])
    with pytest.raises(InputError, match="no scalar is called 'tracee'; choose one of lr_headroom_low, "):
        history.scalar("tracee")


def test_learning_rate_changes_are_stitched_over_probes() -> None:
    def at(step: int, steps: list[int], rates: list[list[float]]) -> Snapshot:
        return replace(probe(step), lr_steps=np.array(steps, dtype=np.int64), lr_values=np.array(rates))

    history = History(
        (
            at(10, [0, 4], [[0.1, 1.0], [0.2, 1.0]]),
            replace(probe(20), lr_steps=np.empty(0), lr_values=np.empty(0)),
            at(30, [20, 25], [[0.2, 1.0], [0.3, 1.0]]),
            at(40, [25], [[0.3, 1.0]]),
        )
    )
    steps, rates = history.learning_rates
    assert steps.tolist() == [0, 4, 25]
    assert rates.tolist() == [[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]]
    none = History((skipped(1),)).learning_rates
    assert none[0].size == none[1].size == 0


def test_learning_rates_of_any_steps_and_groups_against_a_walk_over_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        snapshots = [
            replace(
                probe(10 * k),
                lr_steps=np.sort(generator.choice(40, count, replace=False)),
                lr_values=generator.choice([0.1, 0.2, np.nan], size=(count, generator.integers(1, 4))),
            )
            for k in range(generator.integers(1, 6))
            for count in [generator.integers(0, 5)]
        ]
        told: dict[int, list[float]] = {}
        for snapshot in snapshots:
            told |= dict(zip(snapshot.lr_steps.tolist(), snapshot.lr_values.tolist(), strict=True))
        groups = max(map(len, told.values()), default=0)
        rows = [(step, told[step] + [np.nan] * (groups - len(told[step]))) for step in sorted(told)]
        kept = [row for i, row in enumerate(rows) if not i or str(row[1]) != str(rows[i - 1][1])]
        steps, rates = History(tuple(snapshots)).learning_rates
        assert steps.tolist() == [step for step, _ in kept]
        np.testing.assert_array_equal(rates, np.array([rate for _, rate in kept]).reshape(len(kept), groups))


def test_a_tail_torn_anywhere_loses_only_the_last_probe(tmp_path: Path) -> None:
    file = _write(tmp_path, _probes([1, 2, 3]))
    content, ends = file.read_bytes(), _boundaries(file)
    assert ends[-1] == len(content)
    # Every byte at either end, where lengths and checksums are; in between a stride coprime to the sizes of numbers.
    first, last = ends[-2], ends[-1]
    for size in (*range(first, first + 40), *range(first + 40, last - 40, 23), *range(last - 40, last)):
        file.write_bytes(content[:size])
        history = load_history(file)
        assert history.steps.tolist() == [1, 2]
        if size == ends[-2]:
            assert history.notes == ()
        else:
            assert len(history.notes) == 1
            assert f"read 2 probes up to byte {ends[-2]} of {size}" in history.notes[0]


def test_a_flipped_byte_never_changes_a_value_unnoticed(tmp_path: Path) -> None:
    written = _probes([1, 2, 3], modes=2)
    file = _write(tmp_path, written)
    content, ends = file.read_bytes(), _boundaries(file)
    lost = 0
    for position in range(ends[1], ends[2], 29):
        changed = bytearray(content)
        changed[position] ^= 0x04
        file.write_bytes(changed)
        history = load_history(file, prefix="ntk")
        by_step = {snapshot.step: snapshot for snapshot in history}
        assert set(by_step) <= {1, 2, 3}
        for wanted in written:
            if wanted.step in by_step:
                assert_same(by_step[wanted.step], wanted)
            else:
                assert len(history.notes) == 1
        lost += 2 not in by_step
    # Most bytes are values, their tags and shapes; units, meanings and the second checksum are not read back.
    assert lost > (ends[2] - ends[1]) / 87


def test_damage_that_leaves_the_length_sound_costs_one_probe(tmp_path: Path) -> None:
    file = _write(tmp_path, _probes([1, 2, 3]))
    content, ends = bytearray(file.read_bytes()), _boundaries(file)
    content[ends[1] + 12] = 0xFF
    file.write_bytes(content)
    history = load_history(file)
    assert history.steps.tolist() == [1, 3]
    assert "1 damaged records were passed over" in history.notes[0]


def test_garbage_after_the_last_record_is_no_length(tmp_path: Path) -> None:
    file = _write(tmp_path, _probes([1, 2]))
    with file.open("ab") as end:
        end.write(b"\0" * 100)
    history = load_history(file)
    assert history.steps.tolist() == [1, 2]
    assert "does not match its checksum" in history.notes[0]


def test_a_resumed_run_in_one_directory_replaces_later_steps(tmp_path: Path) -> None:
    _write(tmp_path, _probes([0, 10, 20, 30], loss_value=1.0), start=1000)
    _write(tmp_path, _probes([20, 40], loss_value=2.0), start=2000)
    history = load_history(tmp_path)
    assert history.steps.tolist() == [0, 10, 20, 40]
    assert history.scalar("loss_value").tolist() == [1.0, 1.0, 2.0, 2.0]
    (note,) = history.notes
    assert "2 probes at steps 20 to 30 were replaced by later records from step 20 on" in note


def test_files_of_one_second_are_read_in_the_order_of_writing(tmp_path: Path) -> None:
    for step in range(12):
        _write(tmp_path, _probes([step]), start=1000)
    history = load_history(tmp_path)
    assert history.steps.tolist() == list(range(12))
    assert history.notes == ()


def test_resuming_within_one_file(tmp_path: Path) -> None:
    _write(tmp_path, _probes([0, 10, 20, 10]))
    assert load_history(tmp_path).steps.tolist() == [0, 10]


def test_a_run_resumed_in_another_directory_is_stitched_whatever_the_order_given(tmp_path: Path) -> None:
    old, new = tmp_path / "version_0", tmp_path / "version_1"
    _write(old, _probes([0, 10, 20]))
    _write(new, _probes([20, 30]))
    for runs in ((old, new), (new, old)):
        history = load_history(*runs)
        assert history.steps.tolist() == [0, 10, 20, 30]
        assert "version_0" in history.notes[0]
        assert "version_1" in history.notes[0]


def test_independent_runs_read_together_say_so(tmp_path: Path) -> None:
    _write(tmp_path / "a", _probes([0, 10]))
    _write(tmp_path / "b", _probes([0, 10]))
    history = load_history(tmp_path / "a", tmp_path / "b")
    assert history.steps.tolist() == [0, 10]
    assert "load independent runs one at a time" in history.notes[-1]


def test_a_changed_probe_batch_is_noted(tmp_path: Path) -> None:
    _write(tmp_path, [probe(1, probe="abc"), skipped(2), probe(3, probe="def"), probe(4, probe="def")])
    (note,) = load_history(tmp_path).notes
    assert "between steps 1 and 3 (abc to def)" in note


def test_the_only_run_below_a_directory_is_used(tmp_path: Path) -> None:
    _write(tmp_path / "lightning_logs" / "version_0", _probes([1]))
    assert load_history(tmp_path).steps.tolist() == [1]
    _write(tmp_path / "lightning_logs" / "version_1", _probes([2]))
    with pytest.raises(HistoryError, match=r"wanted one run in .*, got 2: .*version_0, .*version_1; pass one of them"):
        load_history(tmp_path)


def test_several_prefixes_need_a_choice(tmp_path: Path) -> None:
    _write(tmp_path, _probes([1]), "ntk", start=1000)
    _write(tmp_path, _probes([2]), "head/ntk", start=2000)
    with pytest.raises(HistoryError, match=r"wanted one prefix in .*, got 'head/ntk', 'ntk'; pass prefix="):
        load_history(tmp_path)
    assert load_history(tmp_path, prefix="head/ntk").steps.tolist() == [2]
    assert load_history(tmp_path, prefix="ntk").steps.tolist() == [1]
    with pytest.raises(HistoryError, match=r"got none; pass one of the prefixes found: 'head/ntk', 'ntk'"):
        load_history(tmp_path, prefix="other")


def test_the_only_prefix_is_found(tmp_path: Path) -> None:
    _write(tmp_path, _probes([1]), "my/monitor")
    assert load_history(tmp_path).prefix == "my/monitor"


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="got nothing"):
        load_history()
    with pytest.raises(HistoryError, match="check the path"):
        load_history(tmp_path / "nowhere")
    with pytest.raises(HistoryError, match="got none there or below"):
        load_history(tmp_path)
    _write(tmp_path, [])
    with pytest.raises(HistoryError, match=r"got none; train with NTKMonitor\(\)"):
        load_history(tmp_path)
    (tmp_path / "events.out.tfevents.5.empty").touch()
    with pytest.raises(HistoryError, match=r"got none; train with NTKMonitor\(\)"):
        load_history(tmp_path)


def test_a_newer_schema_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntk_monitor.events.SCHEMA", SCHEMA + 1)
    file = _write(tmp_path, _probes([1]))
    monkeypatch.undo()
    with pytest.raises(HistoryError, match=rf"{file.name}: this version .* got schema {SCHEMA + 1}; upgrade"):
        load_history(tmp_path)


def test_events_of_others_are_passed_over(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("loss", 1.0, 5)
        writer.file_writer.add_summary(summary(probe(5)), 5, 17.0)
        writer.add_scalar("loss", 0.5, 6)
    history = load_history(tmp_path)
    assert len(history) == 1
    assert_same(history[0], probe(5))


def test_a_file_that_grows_while_it_is_read_ends_at_its_first_size(tmp_path: Path) -> None:
    file = _write(tmp_path, _probes([1, 2]))
    content = file.read_bytes()
    reading = records(file)
    steps = []
    for event in reading:
        steps.append(event.step)
        with file.open("ab") as end:
            end.write(content)
    assert steps == [0, 1, 2]
    assert (reading.stopped, reading.position) == ("", len(content))


def test_an_event_file_may_lack_its_version(tmp_path: Path) -> None:
    file = _write(tmp_path, _probes([1]))
    file.write_bytes(file.read_bytes()[_boundaries(file)[0] :])
    assert [type(event) for event in records(file)] == [Event]
    assert load_history(tmp_path).steps.tolist() == [1]


def test_pandas_has_one_row_per_probe() -> None:
    pytest.importorskip("pandas")
    table = History((probe(1), skipped(2), replace(probe(3), metrics={"trace": 4.0}))).to_pandas()
    assert table["step"].tolist() == [1, 2, 3]
    assert table["status"].tolist() == ["measured", "skipped", "measured"]
    assert table["reason"][1] == "out of memory"
    np.testing.assert_array_equal(table["trace"], [1.5, np.nan, 4.0])
    assert {"epoch", "wall_time", "rank", "noise_floor", "loss_value", "alignment", "seconds_jacobian"} <= set(table)
    assert not {"metrics", "seconds", "eigenvalues"} & set(table)


def test_xarray_has_dims_units_and_meanings() -> None:
    pytest.importorskip("xarray")
    without = replace(probe(20), gram=np.empty(0))
    history = History((probe(10), skipped(15), without, replace(probe(30), labels=np.empty(0))), ("a", "b"))
    dataset = history.to_xarray()
    assert dataset["step"].values.tolist() == [10, 20, 30]
    sizes = {"mode": 4, "sample": 3, "output": 2, "gram_step": 2, "gram_sample": 3, "change": 1, "group": 2}
    assert {dim: dataset.sizes[dim] for dim in sizes} == sizes
    assert dataset["gram_step"].values.tolist() == [10, 30]
    assert dataset["predictions"].dims == ("step", "sample", "output")
    np.testing.assert_array_equal(dataset["rates"], history.rates)
    np.testing.assert_array_equal(dataset["gram"][1], history[3].gram)
    np.testing.assert_array_equal(dataset["residual_energy"].sum("mode"), history.residual_energy.sum(axis=1))
    np.testing.assert_array_equal(dataset["trace"], history.scalar("trace"))
    np.testing.assert_array_equal(dataset["labels"], [[0, 1, 1], [0, 1, 1], [np.nan] * 3])
    assert dataset["eigenvalues"].attrs["units"] == "squared output units"
    assert dataset["alignment"].attrs["units"] == "cosine, -1 to 1"
    assert dataset.attrs["notes"] == "a\nb"
    assert dataset.attrs["kernel"] == "full"


def test_xarray_pads_a_dimension_to_its_longest_array() -> None:
    pytest.importorskip("xarray")
    fewer, more = replace(probe(1), rates=np.array([3.0])), probe(2, labels=np.arange(5))
    dataset = History((replace(fewer, coordinates=np.empty(0)), replace(more, rates=np.empty(0)))).to_xarray()
    assert (dataset.sizes["mode"], dataset.sizes["sample"]) == (4, 5)
    np.testing.assert_array_equal(dataset["rates"], [[3.0, np.nan, np.nan, np.nan], [np.nan] * 4])
    np.testing.assert_array_equal(dataset["predictions"][0, :3], fewer.predictions)
    assert dataset["predictions"][:, 3:].isnull().all()


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("to_xarray", "xarray")])
def test_a_missing_package_says_how_to_get_it(method: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}, .* pip install ntk-monitor\[export\]"):
        getattr(History((probe(1),)), method)()


def test_reading_needs_no_heavy_package(tmp_path: Path) -> None:
    _write(tmp_path, _probes([1, 2]))
    program = (
        "import sys\n"
        "for name in 'torch lightning pytorch_lightning scipy plotly pandas xarray matplotlib'.split():\n"
        "    sys.modules[name] = None\n"
        "import ntk_monitor.recorder, ntk_monitor.stock\n"
        "from ntk_monitor.history import load_history\n"
        "print(load_history(sys.argv[1]).steps.tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (run.returncode, run.stdout.strip()) == (0, "[1, 2]"), run.stderr
