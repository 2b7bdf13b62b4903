"""Nests in JSON: a nest of tensors, containers and plain values as a JSON tree plus named tensors, and back to the bit.

No pickle: reading such a tree runs no code of whoever wrote it. A value is written as

    null, true, 3, "text", 0.5                       itself
    {"float": "nan"}  {"complex": [re, im]}  {"bytes": base64}
    {"list": [...]}  {"tuple": [...]}  {"dict": [[key, value], ...]}
    {"named": [class name, [field, ...], [value, ...]]}       a namedtuple
    {"record": [class name, [[field, value], ...]]}           a dataclass
    {"tensor": name}  {"tensor": name, "dtype": "complex64", "shape": [...]}    the second kind is stored as bytes
    {"array": name, "dtype": "<f8", "shape": [...]}           a numpy array, or scalar (shape null), stored as bytes
"""

import base64
import dataclasses
import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ntk_monitor.batch import raw_bytes
from ntk_monitor.errors import InputError

Node: TypeAlias = Any
"""A JSON value as described above."""

# What every version of safetensors that we allow can hold; all else is stored as its bytes.
_PLAIN = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


def flattened(value: Any, name: str, store: dict[str, Tensor]) -> Node:
    """Return the nest as a JSON tree; its tensors go into `store` under names that say where they belong.

    Stored tensors are contiguous, on the CPU, and share no memory with each other. Subclasses of tensors, tuples and
    lists become plain ones, and mappings dicts.

    Args:
        value: the nest.
        name: prefix of the names of its tensors.
        store: receives the tensors.

    Raises:
        InputError: a value that has no exact form in JSON.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Tensor):
        return _tensor(value, name, store)
    if isinstance(value, (np.ndarray, np.generic)):
        return _array(value, name, store)
    if type(value) in (float, complex, bytes):
        return _number(value)
    return _container(value, name, store)


def rebuilt(node: Node, store: Mapping[str, Tensor], classes: Iterable[type] = ()) -> Any:
    """Return the nest of a JSON tree.

    Args:
        node: as `flattened` returns it.
        store: the tensors by name.
        classes: namedtuples and dataclasses to build again, found by their name. Those that are not given come back as
            stand-ins with the same name and fields.

    Raises:
        InputError: a tree that `flattened` does not write, or a tensor that is missing or too short.
    """
    try:
        return _rebuilt(node, store, {kind.__name__: kind for kind in classes})
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"a nest must be written as flattened() does, got {str(node)[:80]}: {error}") from error


def _tensor(value: Tensor, name: str, store: dict[str, Tensor]) -> Node:
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        raise InputError(
            f"a stored tensor must be dense and hold data, got {name} of layout {value.layout} on {value.device}; "
            "make it dense (to_dense(), dequantize())"
        )
    name = _free(name, store)
    raw = raw_bytes(value.detach().as_subclass(Tensor)).clone()
    if value.dtype in _PLAIN:
        store[name] = _viewed(raw, value.dtype, value.shape)
        return {"tensor": name}
    store[name] = raw
    return {"tensor": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _array(value: Any, name: str, store: dict[str, Tensor]) -> Node:
    array = np.asarray(value)
    if array.dtype.hasobject or array.dtype.names is not None:
        raise InputError(f"a stored array must hold numbers or text, got {name} of dtype {array.dtype}; leave it out")
    name = _free(name, store)
    store[name] = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else _no_bytes()
    shape = list(array.shape) if isinstance(value, np.ndarray) else None
    return {"array": name, "dtype": array.dtype.str, "shape": shape}


def _number(value: float | complex | bytes) -> Node:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"complex": [_number(value.real), _number(value.imag)]}
    return value if math.isfinite(value) else {"float": str(value)}


def _container(value: Any, name: str, store: dict[str, Tensor]) -> Node:
    def inside(key: Any, item: Any) -> Node:
        return flattened(item, f"{name}.{key}", store)

    if isinstance(value, Mapping):
        return {"dict": [[flattened(key, f"{name}.key", store), inside(key, item)] for key, item in value.items()]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = list(value._fields)
        return {"named": [type(value).__name__, fields, [inside(*pair) for pair in zip(fields, value, strict=True)]]}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [inside(place, item) for place, item in enumerate(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {"record": [type(value).__name__, [[field, inside(field, getattr(value, field))] for field in fields]]}
    raise InputError(
        f"a stored value must be a tensor, array, number, text, or a container of such, got {name} of type "
        f"{type(value).__name__}; leave it out of the probe"
    )


def _rebuilt(node: Node, store: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    if not isinstance(node, dict):
        return node
    kind, content = next(iter(node.items()))
    if kind in _LEAVES:
        return _LEAVES[kind](node, store)

    def inside(items: Iterable[Any]) -> list[Any]:
        return [_rebuilt(item, store, classes) for item in items]

    match kind:
        case "complex":
            return complex(*inside(content))
        case "list":
            return inside(content)
        case "tuple":
            return tuple(inside(content))
        case "dict":
            return dict(map(inside, content))
        case "named":
            name, fields, values = content
            return (classes.get(name) or namedtuple(name, fields))(*inside(values))
        case "record":
            name, pairs = content
            fields, values = [field for field, _ in pairs], inside(value for _, value in pairs)
            known = classes.get(name) or dataclasses.make_dataclass(name, fields)
            return known(**dict(zip(fields, values, strict=True)))
    raise ValueError(f"unknown kind {kind!r}")


def _tensor_of(node: Node, store: Mapping[str, Tensor]) -> Tensor:
    data = store[node["tensor"]].clone()
    if "dtype" not in node:
        return data
    dtype = getattr(torch, node["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"unknown dtype {node['dtype']!r}")
    return _viewed(data, dtype, node["shape"])


def _viewed(raw: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    # No bytes at all cannot be viewed as wider elements.
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


def _array_of(node: Node, store: Mapping[str, Tensor]) -> Any:
    dtype, shape = np.dtype(node["dtype"]), node["shape"]
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype} is not stored as bytes")
    data = store[node["array"]].numpy().tobytes()
    array = np.frombuffer(data, dtype=dtype).reshape(shape or ()).copy() if data else np.zeros(shape or (), dtype)
    return array[()] if shape is None else array


_LEAVES: dict[str, Callable[[Node, Mapping[str, Tensor]], Any]] = {
    "tensor": _tensor_of,
    "array": _array_of,
    "float": lambda node, _: float(node["float"]),
    "bytes": lambda node, _: base64.b64decode(node["bytes"]),
}


def _free(name: str, store: Mapping[str, Tensor]) -> str:
    """Return the name, numbered where it is taken: the keys "a.b" and "a" → "b" give the same one."""
    if name not in store:
        return name
    return next(numbered for i in range(2, len(store) + 3) if (numbered := f"{name}#{i}") not in store)


def _no_bytes() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
