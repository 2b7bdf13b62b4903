"""Probe files: the probe beside the run, so that whoever analyses it later measures the same samples in the same way.

    ntk_probe.json           what was measured, on which samples, with which versions, and the nest of the batch
    ntk_probe.safetensors    its tensors

Both are plain data (no pickle): reading them runs no code. Two monitors of one run differ in their prefix.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors.torch
import torch
from torch import Tensor

import ntk_monitor
from ntk_monitor.atomic import whole
from ntk_monitor.errors import InputError, said
from ntk_monitor.nests import flattened, rebuilt
from ntk_monitor.probe import Probe, redrawn

LIMIT = 256 * 2**20
"""Bytes of samples that are stored; a larger probe is described only, and drawn again from its data set."""

_FORMAT, _VERSION = "ntk_monitor probe", 1
_KEYS = {"version", "hash", "source", "indices", "stored", "reason", "data_sha256", "nest", "nest_sha256", "manifest"}
_KNOWN = ("numpy", "torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "peft")


def _versions() -> dict[str, str]:
    """Return the versions of what computed the kernel, of the trainers as well, of which none is imported for this."""
    found = {name: getattr(sys.modules.get(name), "__version__", None) for name in _KNOWN}
    ours = {"ntk_monitor": ntk_monitor.__version__, "python": platform.python_version()}
    return ours | {name: str(version) for name, version in found.items() if version is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How a probe was measured: what a later analysis has to repeat to get the same kernel.

    Attributes:
        parameters: names of the measured parameters, in the order of the Jacobian's columns; shared ones once.
        model: class of the module that was measured.
        forward: name of the function that called it, or "".
        mode: "eval" or "train".
        precision: dtype of the Jacobian and of the Gram matrix, in words.
        layout: "full", "trace", "sum" or "loss".
        outputs: C, outputs of one sample.
        engine: which route computed the first kernel.
        loss: the loss that drove the modes, or "".
        seed: of the draw, and of random numbers inside the network.
        prefix: of the run's tags.
        versions: of Python, of this package and of what it rests on.
    """

    parameters: tuple[str, ...] = ()
    model: str = ""
    forward: str = ""
    mode: str = "eval"
    precision: str = ""
    layout: str = ""
    outputs: int = 0
    engine: str = ""
    loss: str = ""
    seed: int = 0
    prefix: str = "ntk"
    versions: dict[str, str] = field(default_factory=_versions)


def save(
    probe: Probe,
    directory: str | os.PathLike[str],
    prefix: str = "ntk",
    *,
    manifest: Manifest | None = None,
    limit: int = LIMIT,
) -> Path:
    """Write a probe into a directory and return the path of its JSON file.

    Each file appears whole or not at all. A probe that is there already is left as it is; another one of the same
    prefix is kept under its hash (`ntk_probe-HASH.json`). Samples that are too large, or have no exact form without
    pickle, are not stored: the JSON file says why, and `load` draws them again.

    Args:
        probe: what was measured.
        directory: of the run; made if it is not there.
        prefix: tells the monitors of one run apart.
        manifest: how it was measured.
        limit: bytes of samples that may be stored. Writing takes them twice in memory.

    Raises:
        OSError: the disk is full, or the directory cannot be written. Nothing is left behind then.
    """
    folder, stem = Path(directory), _stem(prefix)
    path = folder / f"{stem}.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = _known_hash(path)
    if known == probe.hash:
        return path
    text, tensors = _described(probe, manifest or Manifest(prefix=prefix), limit)
    if known is not None:
        _set_aside(folder, stem, known)
    if tensors is not None:
        _written(folder / f"{stem}.safetensors", tensors)
    _written(path, text)
    return path


def load(path: str | os.PathLike[str], *, classes: Iterable[type] = (), data: Any = None) -> Probe:
    """Return the probe of a run, checked against its hash.

    Tensors are on the CPU. Subclasses of tensors, tuples, lists and dicts come back as plain ones.

    Args:
        path: a JSON file, or a directory that holds one probe.
        classes: namedtuples and dataclasses that the batch is made of; others come back as stand-ins of the same name
            and fields.
        data: the Dataset or DataLoader that the probe was drawn from, for one whose samples are not stored.

    Raises:
        InputError: no probe, samples that are not stored, or files that were changed or cut short.
    """
    path = _json_of(Path(path))
    record = _record(path)
    with torch.inference_mode(False):
        if not record["stored"]:
            probe = _drawn_again(path, record, data)
        else:
            store = _tensors(path, record)
            inputs, targets = (rebuilt(record["nest"][part], store, classes) for part in ("inputs", "targets"))
            probe = Probe(inputs, targets, record["source"], tuple(record["indices"]))
    if probe.hash != record["hash"]:
        raise InputError(
            f"the samples of {path} must have the hash {record['hash']}, got {probe.hash}; "
            + ("pass the data set of that run" if not record["stored"] else "restore the files from a copy")
        )
    return probe


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Return how the probe of a run was measured.

    Raises:
        InputError: no probe there, or a file that was changed or cut short.
    """
    values = _record(_json_of(Path(path)))["manifest"]
    names = {f.name for f in dataclasses.fields(Manifest)}
    # A later version may have written more than this one knows.
    values = {name: value for name, value in values.items() if name in names}
    return Manifest(**(values | {"parameters": tuple(values.get("parameters", ()))}))


def _stem(prefix: str) -> str:
    # A prefix may hold slashes ("a/b"), and must not name the same file as another one ("a.b").
    return f"{quote(prefix, safe='')}_probe"


def _described(probe: Probe, manifest: Manifest, limit: int) -> tuple[bytes, bytes | None]:
    """Return the JSON file, and the file of tensors where they are stored."""
    store: dict[str, Tensor] = {}
    nest, reason = None, _too_large(probe, limit)
    if not reason:
        try:
            nest = {part: flattened(getattr(probe, part), part, store) for part in ("inputs", "targets")}
        except InputError as error:
            reason = said(error)
    tensors = None if reason else safetensors.torch.save(store)
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "hash": probe.hash,
        "samples": probe.samples,
        "source": probe.source,
        "indices": list(probe.indices),
        "stored": tensors is not None,
        "reason": reason,
        "data_sha256": None if tensors is None else hashlib.sha256(tensors).hexdigest(),
        "nest": None if reason else nest,
        "nest_sha256": None if reason else _checksum(nest),
        "manifest": asdict(manifest),
    }
    return json.dumps(record, indent=1, allow_nan=False).encode(), tensors


def _too_large(probe: Probe, limit: int) -> str:
    taken = probe.bytes
    if taken <= limit:
        return ""
    return f"its samples take {taken / 2**20:.0f} MiB, more than the {limit / 2**20:.0f} MiB that are stored"


def _written(path: Path, content: bytes) -> None:
    with whole(path) as partial:
        partial.write_bytes(content)


def _set_aside(folder: Path, stem: str, known: str) -> None:
    """Keep another probe of the same prefix under its hash, which the records made with it name."""
    for ending in ("safetensors", "json"):
        path = folder / f"{stem}.{ending}"
        if path.exists():
            path.replace(folder / f"{stem}-{known}.{ending}")


def _known_hash(path: Path) -> str | None:
    """Return the hash of the probe in this file, or None when there is none that could be used."""
    try:
        record = _record(path)
        if record["stored"]:
            _tensors(path, record)
    except InputError:
        return None
    known = record["hash"]
    return known if isinstance(known, str) and re.fullmatch("[0-9a-f]+", known) else None


def _json_of(path: Path) -> Path:
    if not path.is_dir():
        return path.with_suffix(".json") if path.suffix == ".safetensors" else path
    found = sorted(path.glob("*_probe.json"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{path} must hold one probe (*_probe.json), got {names}; name the file")
    return found[0]


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be the JSON file of a probe, got {said(error, kind=True)}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not record.keys() >= _KEYS:
        raise InputError(f'{path} must be the JSON file of a probe (format "{_FORMAT}"), got another one')
    if record.get("version") != _VERSION:
        raise InputError(
            f"{path} must have version {_VERSION}, got {record.get('version')}; read it with the release that wrote it"
        )
    if record["stored"] and record["nest_sha256"] != _checksum(record["nest"]):
        raise InputError(f"the nest in {path} was changed after it was written; restore the file from a copy")
    return record


def _tensors(path: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    # The name is looked for beside the JSON file only, whatever that file says, and follows it when it is renamed.
    file = path.with_suffix(".safetensors")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{path} needs {file.name} beside it, got {said(error, kind=True)}") from error
    if hashlib.sha256(content).hexdigest() != record["data_sha256"]:
        raise InputError(f"{file} holds other bytes than {path.name} says; restore both from a copy")
    return safetensors.torch.load(content)


def _drawn_again(path: Path, record: dict[str, Any], data: Any) -> Probe:
    if data is None or not record["indices"]:
        how = "pass data= the data set it was drawn from" if record["indices"] else "only who made it has its samples"
        raise InputError(f"the samples of {path} are not stored: {record['reason']}; {how} ({record['source']})")
    return redrawn(data, record["indices"], record["manifest"]["seed"], record["source"])


def _checksum(nest: Any) -> str:
    return hashlib.sha256(json.dumps(nest, sort_keys=True).encode()).hexdigest()
