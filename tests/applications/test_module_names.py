"""Names below an axis: what all share is left out, and what is left stays apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_monitor.applications.module_names import axis_names


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["blocks.0", "blocks.1"], ["0", "1"]),
        (["transformer.h.0 #1", "transformer.h.0 #2"], ["0 #1", "0 #2"]),
        (["net.first.norm", "net.second.norm"], ["first", "second"]),
        (
            [f"stages.{k}.layers.{j}.layer.{j}" for k in range(6) for j in range(2)],
            [f"{k}.lay.{j}<br>lay.{j}" for k in range(6) for j in range(2)],
        ),
        (["network.1"], ["network.1"]),
        (["batch_norm"] * 12, ["bat_nor"] * 12),
        (["batch_norm"], ["batch_norm"]),
        (["a", "a"], ["a", "a"]),
        ([], []),
    ],
)
def test_names(names: list[str], shown: list[str]) -> None:
    assert axis_names(names) == shown


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["0", "1", "2", "ab", "cd"]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_short_words_stay_apart(parts: list[list[str]]) -> None:
    names = [".".join(part) for part in parts]
    assert len(set(axis_names(names))) == len(set(names))
