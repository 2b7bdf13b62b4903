"""Nests survive JSON to the bit."""

import dataclasses
import json
import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntk_monitor.errors import InputError
from ntk_monitor.nests import flattened, rebuilt

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Sample:
    x: Tensor
    note: str = "kept"
    derived: int = dataclasses.field(default=7, init=False)


class Colour(Enum):
    RED = 1


def again(value: Any, *classes: type) -> Any:
    """Return the value after a journey through both kinds of file."""
    store: dict[str, Tensor] = {}
    node = json.loads(json.dumps(flattened(value, "x", store), allow_nan=False))
    return rebuilt(node, safetensors.torch.load(safetensors.torch.save(store)), classes)


def same(a: Any, b: Any) -> bool:
    """Compare two nests by type, shape and bits: the slow, obvious way."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def _bits(t: Tensor) -> bytes:
    """Return the bits of each element in turn; the clone gives single elements the stride that a view needs."""
    plain = t.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


DTYPES = [
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"),
        *("float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 2), (2, 0)], ids=str)
def test_tensors_of_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = torch.randint(2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=generator)
    value = raw.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)
    assert same(again(value), value)


def test_odd_numbers_keep_their_bits() -> None:
    value = torch.tensor([float("nan"), -0.0, float("inf"), 5e-324, 1 / 3], dtype=torch.float64)
    assert same(again(value), value)
    assert same(again(value.to(torch.bfloat16)), value.to(torch.bfloat16))
    for number in (math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308, 2**80, complex(0.1, -math.inf)):
        assert same(again(number), number)


def test_views_become_memory_of_their_own() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    odd = [base.T, base[:, ::2], base[1].expand(5, 4), torch.tensor([1 + 2j]).conj(), torch.tensor([2j]).conj().imag]
    got = again([*odd, base, base])
    assert all(same(a, b) for a, b in zip(got, [*odd, base, base], strict=True))
    assert len({t.untyped_storage().data_ptr() for t in got}) == len(got)
    got[-1].zero_()
    assert bool(got[-2].any())
    assert not again(torch.ones(2, requires_grad=True)).requires_grad


def test_containers_and_plain_values() -> None:
    value = {
        "pair": (torch.ones(2), [torch.zeros(1), None]),
        "named": Pair(torch.ones(1), "text"),
        "empty": [(), [], {}, "", b"", torch.empty(0)],
        "flags": [True, False, 1, 0, 1.0, "1", b"\x00\xff"],
        3: {(1, "a"): 2, None: True, 0.5: "ü \ud83d\ude00".encode("utf-16", "surrogatepass")},
        "list": [1],  # a key that is a word of the format
        "tensor": {"tensor": "inputs"},
    }
    got = again(value, Pair)
    assert same(got, value)
    assert type(got["flags"][0]) is bool
    assert type(got["flags"][2]) is int


def test_keys_that_give_the_same_name_are_kept_apart() -> None:
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a.b#2": torch.full((1,), 2.0)}
    assert same(again(value), value)


def test_classes_come_back_where_they_are_given_and_as_stand_ins_elsewhere() -> None:
    x = torch.arange(3)
    value = [Pair(x, 1), Sample(x, "note")]
    pair, sample = again(value)
    assert type(pair) is not Pair
    assert (pair.left.tolist(), pair.right, type(pair).__name__) == ([0, 1, 2], 1, "Pair")
    assert (sample.x.tolist(), sample.note, type(sample).__name__) == ([0, 1, 2], "note", "Sample")
    pair, sample = again(value, Pair, Sample)
    assert type(pair) is Pair
    assert type(sample) is Sample
    assert sample.derived == 7


def test_mappings_and_subclasses_become_plain() -> None:
    class Listed(list[int]):
        pass

    assert same(again(OrderedDict(a=1)), {"a": 1})
    assert same(again(UserDict({"a": torch.ones(1)})), {"a": torch.ones(1)})
    assert same(again(Listed([1, 2])), [1, 2])
    assert same(again(torch.Size([1, 2])), (1, 2))
    assert type(again(torch.nn.Parameter(torch.ones(1)))) is Tensor


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.array(3.5),
        np.float64(0.1),
        np.float32("nan"),
        np.int16(-3),
        np.str_("ä"),
        np.str_(""),
        np.empty((0, 2), dtype=np.int8),
        np.array(["a", "bcd"]),
        np.array(["2020-01-01", "NaT"], dtype="datetime64[s]"),
        np.array([1, 2], dtype=">i4"),
    ],
    ids=repr,
)
def test_numpy_values(value: Any) -> None:
    assert same(again(value), value)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.integers(0, 200), max_size=4),
    st.sampled_from([d for d in DTYPES if not str(d).startswith("torch.float8")]),
)
NESTS = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(NESTS)
def test_any_nest(value: Any) -> None:
    assert same(again(value, Pair), value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"got x of type object; leave it out of the probe"),
        ({"a": [Colour.RED]}, r"got x\.a\.0 of type Colour"),
        ({"f": len}, r"got x\.f of type builtin_function_or_method"),
        ({1, 2}, r"of type set"),
        (torch.eye(2).to_sparse(), r"must be dense and hold data, got x of layout torch\.sparse_coo on cpu"),
        (torch.ones(2, device="meta"), r"got x of layout torch\.strided on meta"),
        (np.array([{}], dtype=object), r"must hold numbers or text, got x of dtype object"),
    ],
    ids=["object", "member of an enumeration", "function", "set", "sparse", "meta", "array of objects"],
)
def test_what_has_no_exact_form_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flattened(value, "x", {})


@pytest.mark.parametrize(
    "node",
    [
        {"pickle": "x"},
        {"tensor": "missing"},
        {"tensor": "x", "dtype": "nn", "shape": [1]},
        {"tensor": "x", "dtype": "float32", "shape": [3]},
        {"array": "x", "dtype": "O", "shape": [1]},
        {"named": ["Pair", ["class"], [1]]},
        {"named": ["Pair", ["__import__('os')"], [1]]},
        {"record": ["Sample", [["x = print()", 1]]]},
        {"dict": [[{"list": []}, 1]]},
        {"tuple": 3},
    ],
    ids=str,
)
def test_trees_of_another_make_are_refused(node: Any) -> None:
    with pytest.raises(InputError, match=r"a nest must be written as flattened\(\) does, got "):
        rebuilt(node, {"x": torch.zeros(4, dtype=torch.uint8)})
