"""Batches: any nest of tensors, one sample axis."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntk_monitor.batch import Flat, digest, joined, mapped, moved, owned, size, take, tensored, tensors
from ntk_monitor.errors import InputError

Named = namedtuple("Named", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    note: str = "kept"
    derived: int = field(default=0, init=False)


def nest(n: int = 3) -> dict[str, Any]:
    x = torch.arange(2.0 * n).reshape(n, 2)
    return {
        "x": x,
        "pair": (x + 1, [x + 2]),
        "named": Named(x + 3, "text"),
        "record": Record(x + 4),
        "scale": torch.tensor(5.0),
        "mask": None,
        "ids": torch.arange(n),
    }


def test_mapping_reaches_every_tensor_and_keeps_the_nest() -> None:
    got = mapped(nest(), lambda t: t * 2)
    assert torch.equal(got["pair"][1][0], 2 * (nest()["x"] + 2))
    assert isinstance(got["named"], Named)
    assert got["named"].y == "text"
    assert got["record"].note == "kept"
    assert torch.equal(got["record"].x, 2 * (nest()["x"] + 4))
    assert got["mask"] is None
    assert len(tensors(nest())) == 7


def test_mappings_of_any_kind_become_plain_dicts() -> None:
    assert type(mapped(OrderedDict(a=torch.ones(1)), lambda t: t)) is dict


def test_size_is_the_shared_leading_axis() -> None:
    assert size(nest(4)) == 4
    assert size(torch.ones(2, 0)) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(0, 3), r"at least one sample, got 0; pass a non-empty probe"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"share their leading \(sample\) axis, got lengths \[2, 3\]"),
        (torch.tensor(1.0), r"at least one tensor with a leading sample axis, got Tensor"),
        (["text"], r"at least one tensor with a leading sample axis, got list"),
        (None, r"got NoneType"),
    ],
)
def test_unusable_batches_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        size(batch)


@given(st.integers(1, 5), st.data())
def test_taking_rows(n: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    got = take(nest(n), rows)
    assert size(got) == len(rows)
    assert torch.equal(got["ids"], torch.tensor(rows))
    assert torch.equal(got["scale"], torch.tensor(5.0))
    assert torch.equal(got["x"], nest(n)["x"][rows])


def test_moving_promotes_floats_only() -> None:
    got = moved({"h": torch.ones(2, dtype=torch.float16), "i": torch.arange(2)}, torch.device("cpu"), torch.float32)
    assert got["h"].dtype == torch.float32
    assert got["i"].dtype == torch.int64
    assert moved(torch.ones(1, dtype=torch.float64), torch.device("cpu")).dtype == torch.float64


def test_the_meta_device_holds_no_data() -> None:
    with pytest.raises(InputError, match=r"must hold data, got a tensor on the meta device; pass a materialised"):
        moved(torch.ones(1, device="meta"), torch.device("cpu"))


def test_owned_batches_share_nothing() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    got = owned({"x": x})
    assert not got["x"].is_inference()
    y = torch.ones(2, requires_grad=True)
    copied = owned(y)
    assert not copied.requires_grad
    with torch.no_grad():
        y.zero_()
    assert torch.equal(copied, torch.ones(2))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
)
def test_digests_tell_contents_apart(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert digest(x) == digest(x.clone()) == digest({"any": x.T.contiguous().T})
    assert digest(x) != digest(x.flip(1))
    assert digest(x) != digest(x.reshape(4))
    assert digest(x, None) == digest(x)
    assert len(digest(x)) == 16


def test_digests_tell_dtypes_apart_and_are_stable() -> None:
    assert digest(torch.zeros(2, dtype=torch.float32)) != digest(torch.zeros(2, dtype=torch.int32))
    # A change of this value makes every resumed run say that its probe was lost.
    assert digest(torch.arange(3)) == "bbfdfa1ecf21e208"
    assert digest(torch.empty(0, 2)) != digest(torch.empty(0, 3))


def test_digests_look_through_views() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for view in (x.T, x[:, ::2], x[:1, :1].expand(4, 4), x[0, ::2][:1], torch.tensor([1 + 2j]).conj(), x[:0]):
        assert digest(view) == digest(view.resolve_conj().clone(memory_format=torch.contiguous_format))


def test_arrays_become_tensors() -> None:
    batch: dict[str, Any] = {
        "x": np.arange(6.0)[::-1],
        "pair": (np.ones(2, dtype=np.int16), [np.array(["a"])]),
        "t": torch.ones(1),
    }
    got = tensored(batch)
    assert torch.equal(got["x"], torch.arange(5.0, -1, -1, dtype=torch.float64))
    assert got["pair"][0].dtype == torch.int16
    assert isinstance(got["pair"][1][0], np.ndarray)
    assert got["t"] is batch["t"]
    batch["x"][:] = 0
    assert got["x"].any()


def test_taken_apart_and_put_together() -> None:
    batch = nest()
    flat = Flat.of(batch)
    assert len(flat.leaves) == 6
    again = flat.rebuild([leaf + 1 for leaf in flat.leaves])
    assert torch.equal(again["pair"][0], batch["pair"][0] + 1)
    assert torch.equal(again["scale"], batch["scale"])
    assert digest(flat.rebuild(flat.leaves)) == digest(batch)


def test_two_batches_become_one() -> None:
    one, two = nest(3), nest(2)
    both = joined(one, two)
    assert size(both) == 5
    assert type(both["pair"]) is tuple
    for whole, a, b in zip(tensors(both), tensors(one), tensors(two), strict=True):
        assert torch.equal(whole, torch.cat([a, b]) if a.dim() else a)
    assert digest(take(both, slice(3, 5))) == digest(two)
    alone = joined(one, None)
    alone["x"].zero_()
    assert one["x"].any()
    assert joined(None, None) is None
    assert joined(torch.zeros(1, 2), torch.ones(1, 2).double()).dtype == torch.float32


def test_batches_that_are_not_alike_are_refused() -> None:
    for other in (torch.zeros(2, 4), (torch.zeros(2, 3), torch.zeros(2)), "no tensor"):
        with pytest.raises(InputError, match="samples must be alike"):
            joined(torch.zeros(2, 3), other)
