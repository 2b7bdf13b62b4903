"""The first promise: a run with the monitor ends, to the bit, where the run without it ends.

`make test` runs few cells that cover every pair of choices, `make test-all` the full matrix; pytest prints the table at
its end, `python -m tests.matrix` alone.
"""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from tests.backbones import NETWORKS
from tests.careless import DEEDS, Careless
from tests.matrix import COLUMNS, SETTINGS, Cell, changes, covering, ended, every_pair, table

# Lightning's advice on resuming in the middle of an epoch and on schedules that manual optimisation steps by hand.
pytestmark = pytest.mark.filterwarnings("ignore")
Record = Callable[[str, object], None]


def same(cell: Cell, root: Path, record: Record) -> None:
    found = ["an error"]
    try:
        found = changes(cell, root)
    finally:
        record("identity", [cell.network, sorted(cell.settings), found])
    assert found == []


@pytest.mark.parametrize("cell", covering(), ids=str)
def test_every_pair_of_choices_ends_where_it_would(cell: Cell, tmp_path: Path, record_property: Record) -> None:
    same(cell, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("cell", every_pair(), ids=str)
def test_the_full_matrix_ends_where_it_would(cell: Cell, tmp_path: Path, record_property: Record) -> None:
    same(cell, tmp_path, record_property)


def test_the_few_cells_cover_every_pair_of_choices() -> None:
    cells = covering()
    assert len(cells) <= 24
    for network in NETWORKS:
        for setting in SETTINGS:
            assert {setting in c.settings for c in cells if c.network == network} == {True, False}
    for a, b in combinations(SETTINGS, 2):
        assert len({(a in c.settings, b in c.settings) for c in cells}) == 4


# Which careless monitors change which runs (a job of its own for each column), as measured before this was written.
CHANGED = {
    "forward in train mode": (True, True, True),
    "eval and forget": (True, True, True),
    "eval, then train": (False, False, True),
    "draw a random number": (True, True, True),
    "iterate the loader": (True, True, True),
    "iterate the loader, random state restored": (False, True, False),
    "backward into .grad": (True, False, False),
    "zero_grad": (True, False, False),
}
JOBS = (
    Cell("cnn, batchnorm, dropout", frozenset({"accumulate 4"})),
    Cell("cnn, batchnorm, dropout", frozenset({"own generator"})),
    Cell("frozen batchnorm backbone"),
)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [ended(job, list, tmp_path_factory.mktemp("plain"))["weights"] for job in JOBS]


@pytest.mark.parametrize("deed", DEEDS)
def test_the_harness_can_fail(deed: str, tmp_path: Path, untouched: list[str]) -> None:
    found = [ended(job, lambda: [Careless(deed)], tmp_path)["weights"] for job in JOBS]
    assert tuple(a != b for a, b in zip(found, untouched, strict=True)) == CHANGED[deed]


def test_a_careless_monitor_shows_in_the_table() -> None:
    cells = [Cell("mlp"), Cell("mlp", frozenset({"resume", "compiled"})), Cell("vit", frozenset({"resume"}))]
    text = table(zip(cells, ([], [], ["weights", "torch"]), strict=True))
    head, *rows = text.splitlines()
    assert all(column in head for column in COLUMNS)
    assert [row.split()[0] for row in rows[:1]] == ["mlp"]
    assert rows[0].count("same") == 3
    assert "CHANGED weights, torch" in next(row for row in rows if row.startswith("vit"))
    assert text.count("CHANGED") == 1
