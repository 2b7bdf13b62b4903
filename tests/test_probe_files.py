"""The probe beside the run: whole or not there, the same to the bit, and never code."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ntk_monitor import probe_files
from ntk_monitor.batch import tensors
from ntk_monitor.errors import InputError
from ntk_monitor.probe import Probe
from ntk_monitor.probe_files import Manifest, load, load_manifest, save
from tests.test_nests import same

Text = namedtuple("Text", ["ids", "mask"])


@dataclass
class Pixels:
    values: Tensor
    note: str = ""


def probe(seed: int = 0, n: int = 4) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    inputs = {
        "x": x,
        "half": (x.bfloat16(), [x.to(torch.complex64), None, "text", 3, 0.1, True]),
        "named": Text(torch.arange(n), x > 0),
        "record": Pixels(x.double(), "kept"),
        "scale": torch.tensor(0.5),
    }
    return Probe(inputs, torch.arange(n) % 2, "drawn for a test", tuple(range(n)))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_probe_comes_back_to_the_bit(tmp_path: Path) -> None:
    mine = probe()
    path = save(mine, tmp_path / "run" / "deep")
    assert path == tmp_path / "run" / "deep" / "ntk_probe.json"
    assert files(path.parent) == ["ntk_probe.json", "ntk_probe.safetensors"]
    for place in (path, path.parent, path.with_suffix(".safetensors"), str(path)):
        got = load(place, classes=[Text, Pixels])
        assert (got.hash, got.source, got.indices) == (mine.hash, mine.source, mine.indices)
        assert same(got.targets, mine.targets)
        plain = {key: value for key, value in got.inputs.items() if key != "record"}
        assert same(plain, {key: value for key, value in mine.inputs.items() if key != "record"})
        assert same(got.inputs["record"].values, mine.inputs["record"].values)
        assert type(got.inputs["record"]) is Pixels
    stand_in = load(path).inputs
    assert stand_in["named"].mask.dtype == torch.bool
    assert stand_in["record"].note == "kept"


def test_the_tensors_are_readable_by_anybody(tmp_path: Path) -> None:
    save(probe(), tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "ntk_probe.safetensors")
    assert set(stored) == {
        *("inputs.x", "inputs.half.0", "inputs.half.1.0", "inputs.named.ids", "inputs.named.mask"),
        *("inputs.record.values", "inputs.scale", "targets"),
    }
    assert torch.equal(stored["inputs.x"], probe().inputs["x"])
    assert stored["inputs.half.0"].dtype == torch.bfloat16


def test_a_probe_without_targets_and_loaded_in_inference_mode(tmp_path: Path) -> None:
    path = save(Probe(torch.ones(2, 3)), tmp_path)
    with torch.inference_mode():
        got = load(path)
    assert got.targets is None
    assert not got.inputs.is_inference()
    got.inputs.zero_()
    assert load(path).inputs.all()


def test_how_it_was_measured_is_kept(tmp_path: Path) -> None:
    mine = Manifest(
        parameters=("0.weight", "0.bias"),
        model="Net",
        mode="train",
        precision="float32 Jacobian, float64 Gram",
        layout="trace",
        outputs=10,
        engine="structured",
        loss="cross_entropy(mean)",
        seed=3,
        prefix="a",
    )
    path = save(probe(), tmp_path, "a", manifest=mine)
    got = load_manifest(path)
    assert got == mine
    assert got.versions["torch"] == torch.__version__
    assert {"ntk_monitor", "python", "numpy"} <= set(got.versions)
    written = json.loads(path.read_text())
    assert (written["samples"], written["hash"], written["format"]) == (4, probe().hash, "ntk_monitor probe")
    # A later version may know more.
    written["manifest"]["colour"] = "red"
    path.write_text(json.dumps(written))
    assert load_manifest(path) == mine


def test_monitors_of_one_run_do_not_share_a_file(tmp_path: Path) -> None:
    for number, prefix in enumerate(["ntk", "a/b", "a.b", "a%2Fb", "..", "Ä b"]):
        path = save(probe(number), tmp_path, prefix)
        assert path.parent == tmp_path
        assert load(path).hash == probe(number).hash
    assert len(files(tmp_path)) == 12
    with pytest.raises(InputError, match=r"must hold one probe \(\*_probe.json\), got .*; name the file"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"must hold one probe .*, got none"):
        load(tmp_path.parent / tmp_path.name / "..")


def test_the_same_probe_is_left_and_another_one_set_aside(tmp_path: Path) -> None:
    path = save(probe(), tmp_path, manifest=Manifest(engine="rows"))
    before = path.stat().st_mtime_ns
    assert save(probe(), tmp_path, manifest=Manifest(engine="reference")) == path
    assert path.stat().st_mtime_ns == before
    assert load_manifest(path).engine == "rows"

    save(probe(1), tmp_path)
    assert load(path).hash == probe(1).hash
    old = tmp_path / f"ntk_probe-{probe().hash}.json"
    assert load(old).hash == probe().hash
    assert load_manifest(old).engine == "rows"
    assert load(tmp_path).hash == probe(1).hash
    assert len(files(tmp_path)) == 4


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    path = save(probe(), tmp_path)
    data = path.with_suffix(".safetensors")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"holds other bytes than ntk_probe.json says; restore both"):
        load(path)
    save(probe(), tmp_path)
    assert load(path).hash == probe().hash
    assert len(files(tmp_path)) == 2


def test_what_was_changed_or_is_missing_is_refused(tmp_path: Path) -> None:
    path = save(probe(), tmp_path)
    good = json.loads(path.read_text())

    def refused(message: str, **changes: Any) -> None:
        path.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=message):
            load(path)

    nest = json.dumps(good["nest"]).replace('"text"', '"test"')
    refused(r"the nest in .* was changed after it was written; restore the file", nest=json.loads(nest))
    refused(r"must have version 1, got 2; read it with the release that wrote it", version=2)
    refused(r'must be the JSON file of a probe \(format "ntk_monitor probe"\), got another one', format="other")
    refused(r"must have the hash 0000, got [0-9a-f]{16}; restore the files", hash="0000")
    path.write_text(json.dumps({"format": "ntk_monitor probe"}))
    with pytest.raises(InputError, match=r"got another one"):
        load(path)
    path.write_text(json.dumps(good)[:100])
    with pytest.raises(InputError, match=r"must be the JSON file of a probe, got JSONDecodeError"):
        load_manifest(path)
    with pytest.raises(InputError, match=r"must be the JSON file of a probe, got FileNotFoundError"):
        load(tmp_path / "other.json")
    path.write_text(json.dumps(good))
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(InputError, match=r"needs ntk_probe.safetensors beside it, got FileNotFoundError"):
        load(path)


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)) + torch.rand(3) / 4, index % 3


def test_a_large_probe_is_described_and_drawn_again(tmp_path: Path) -> None:
    data = Noisy()
    mine = Probe.of(data, 9, seed=4)
    assert mine.source.endswith("seed 4, augmentation frozen at this draw")
    path = save(mine, tmp_path, manifest=Manifest(seed=4), limit=100)
    assert files(tmp_path) == ["ntk_probe.json"]
    with pytest.raises(
        InputError,
        match=r"are not stored: its samples take 0 MiB, more than the 0 MiB that are stored; pass data= the data set",
    ):
        load(path)
    torch.rand(3)
    for again in (data, DataLoader(data, 2)):
        got = load(path, data=again)
        assert torch.equal(got.inputs, mine.inputs)
        assert (got.hash, got.indices, got.source) == (mine.hash, mine.indices, mine.source)
    with pytest.raises(InputError, match=r"must have the hash .*; pass the data set of that run"):
        load(path, data=TensorDataset(torch.ones(30, 3), torch.ones(30)))
    # Nothing but the limit: the same probe is stored under the default one.
    assert files(save(mine, tmp_path / "b").parent) == ["ntk_probe.json", "ntk_probe.safetensors"]


def test_what_json_cannot_say_is_described(tmp_path: Path) -> None:
    odd = Probe((torch.ones(2, 1), object()))
    path = save(odd, tmp_path)
    with pytest.raises(
        InputError, match=r"not stored: .* got inputs.1 of type object; .* only who made it has its sam"
    ):
        load(path)
    assert load_manifest(path).prefix == "ntk"
    assert save(odd, tmp_path) == path


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    save(probe(), tmp_path, "other")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(probe(), tmp_path)
    assert files(tmp_path) == ["other_probe.json", "other_probe.safetensors"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from ntk_monitor import probe_files
from ntk_monitor.probe import Probe

calls, limit = 0, int(sys.argv[2])
real = os.fsync
def fsync(number):
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    real(number)
probe_files.os.fsync = fsync
probe_files.save(Probe(torch.zeros(3, 2)), sys.argv[1])
probe_files.save(Probe(torch.ones(3, 2)), sys.argv[1])
"""


@pytest.mark.slow  # a process with torch for each moment
@pytest.mark.parametrize(("moment", "whole"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_a_killed_process_leaves_whole_probes_or_none(moment: int, whole: int, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], check=False, timeout=120)
    found = [path for path in tmp_path.glob("*.json") if load(path).samples == 3]
    assert len(found) == whole
    # A later run is not held up by what lies there.
    later = Probe(torch.full((3, 2), 7.0))
    assert load(save(later, tmp_path)).hash == later.hash


def test_reading_runs_no_code(tmp_path: Path) -> None:
    """A nest that names a callable gives a stand-in, and never looks for it."""
    path = save(probe(), tmp_path)
    record = json.loads(path.read_text())
    record["nest"]["inputs"] = {"dict": [["x", {"tensor": "inputs.x"}], ["f", {"record": ["system", [["x", "ls"]]]}]]}
    record["nest_sha256"] = probe_files._checksum(record["nest"])
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="must have the hash"):  # the tensors are fewer now
        load(path)
    record["nest"]["inputs"] = {"pickle": "gASVGgAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU"}
    record["nest_sha256"] = probe_files._checksum(record["nest"])
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"unknown kind 'pickle'"):
        load(path)


def test_what_a_probe_takes(tmp_path: Path) -> None:
    assert probe().bytes == sum(t.numel() * t.element_size() for t in tensors((probe().inputs, probe().targets)))
    assert replace(probe(), targets=None).bytes == probe().bytes - 32
