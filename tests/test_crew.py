"""Blocks, shards and votes, without processes: each rank's part in turn, against the whole."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_monitor.crew import Alone, CrewError, Garbled, Hand, joint
from ntk_monitor.errors import NetworkError
from ntk_monitor.kernel import measured
from ntk_monitor.losses import cross_entropy
from ntk_monitor.parts import Part, Shared, assembled, predictions, window, with_buffers
from ntk_monitor.probe import Probe
from ntk_monitor.shadow import Shadow
from ntk_monitor.sharded import joined, sharded
from ntk_monitor.silence import Silence
from tests import reference


class Rank(Alone):
    """One rank of several, of which the others are played elsewhere."""

    def __init__(self, rank: int, size: int, complaints: str = "") -> None:
        self.rank, self.size, self.complaints = rank, size, complaints
        self.heard: list[str] = []

    def objection(self, mine: str = "") -> str:
        self.heard.append(mine)
        return mine or self.complaints


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    inner: list[nn.Module] = [nn.BatchNorm1d(6, track_running_stats=norm)]
    return nn.Sequential(nn.Linear(4, 6), *inner, nn.Tanh(), nn.Linear(6, 3)).double()


def probe(samples: int) -> Probe:
    torch.manual_seed(1)
    return Probe(torch.randn(samples, 4).double(), torch.randint(0, 3, (samples,)))


@given(st.integers(1, 40), st.integers(1, 9))
def test_every_pair_of_samples_meets_on_some_process(samples: int, ranks: int) -> None:
    met, widest = torch.zeros(samples, samples), 0
    for rank in range(ranks):
        rows, columns = window(samples, rank, ranks)
        assert columns[: len(rows)] == rows
        assert len(set(columns)) == len(columns)
        widest = max(widest, len(columns))
        met[torch.tensor(rows, dtype=torch.long)[:, None], torch.tensor(columns, dtype=torch.long)] += 1
    assert bool((met + met.T > 0).all())
    assert widest <= samples // 2 + 2 * (samples // ranks + 1)


@pytest.mark.parametrize(("ranks", "layout"), [(1, "full"), (2, "loss"), (3, "trace"), (4, "full")])
def test_blocks_of_all_processes_are_the_kernel_of_one(ranks: int, layout: str) -> None:
    net, seen = network(), probe(11)
    net(torch.randn(20, 4).double())  # running statistics of some data
    net.train()
    loss = cross_entropy() if layout == "loss" else None
    options: dict[str, Any] = {"seed": 0, "engine": "auto"}
    outputs = predictions(net, seen.inputs, options)
    part = Part(layout, "" if loss is None else loss.name, seen, {}, outputs)
    blocks = [part.block(Rank(rank, ranks), net, seen, loss, options).values for rank in range(ranks)]
    found = assembled(blocks, seen.samples)
    extra: dict[str, Any] = {} if loss is None else {"loss": loss, "targets": seen.targets}
    wanted = measured(net, seen.inputs, outputs=layout, **extra).values  # type: ignore[arg-type]
    assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())
    turned = found.permute(2, 3, 0, 1) if layout == "full" else found.T
    assert torch.equal(found, turned)


def test_the_kernel_in_parts_is_that_of_plain_rows() -> None:
    net, seen = network().eval(), probe(7)
    part = Part("full", "", seen, {}, predictions(net, seen.inputs, {}))
    found = assembled([part.block(Rank(r, 3), net, seen, None, {}).values for r in range(3)], 7)
    wanted = reference.ntk(reference.rows(net, net(seen.inputs)))
    assert float((found - wanted.reshape(found.shape)).abs().max()) < 1e-12 * float(wanted.abs().max())


def test_samples_that_see_each_other_are_not_shared_out() -> None:
    net, seen = network(norm=False), probe(12)
    shared = Shared(Rank(0, 2))
    with pytest.warns(UserWarning, match="depend on its companions"):
        found = shared(net, seen.inputs, probe=seen, outputs="full", targets=None, loss=None)
    assert shared.apart
    assert torch.equal(found.values, measured(net, seen.inputs).values)


def test_rank_0_measures_by_itself_where_another_objects() -> None:
    net, seen = network(), probe(12)
    crew = Rank(0, 2, complaints="process 1: MemoryError: none left")
    shared = Shared(crew)
    with pytest.warns(UserWarning, match="process 1: MemoryError"):
        found = shared(net, seen.inputs, probe=seen, outputs="full", targets=None, loss=None)
    assert torch.equal(found.values, measured(net, seen.inputs).values)
    voted = len(crew.heard)
    shared(net, seen.inputs, probe=seen, outputs="full", targets=None, loss=None)
    assert len(crew.heard) == voted == 1  # it does not ask again


def test_few_samples_are_not_shared_out() -> None:
    crew = Rank(0, 4)
    Shared(crew)(network(), probe(7).inputs, probe=probe(7), outputs="full")
    assert crew.heard == []


def test_buffers_of_rank_0_go_into_a_shadow_and_nowhere_else() -> None:
    net = network()
    before = {name: b.clone() for name, b in net.named_buffers()}
    told = {name: b + 1 for name, b in before.items()}
    shadow = with_buffers(net, told)
    assert all(torch.equal(b, told[name]) for name, b in shadow.named_buffers())
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert [p.data_ptr() for p in shadow.parameters()] == [p.data_ptr() for p in net.parameters()]
    with pytest.raises(NetworkError, match="other buffers"):
        with_buffers(net, {})


def test_who_fails_says_so_before_anything_is_sent() -> None:
    crew = Rank(1, 2)

    def work() -> list[Tensor]:
        raise MemoryError("none left")

    with pytest.raises(MemoryError):
        joint(crew, work)
    assert crew.heard == ["MemoryError: none left"]
    with pytest.raises(CrewError, match="process 0"):
        joint(Rank(1, 2, "process 0: no"), list)

    def interrupted() -> list[Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        joint(crew, interrupted)
    assert crew.heard[-1].startswith("KeyboardInterrupt")
    with pytest.raises(CrewError, match="could not be read"):
        Garbled("AttributeError").serve(Hand(crew))
    assert len(crew.heard) == 3


def test_a_hand_that_failed_before_says_why() -> None:
    with pytest.raises(CrewError, match="no module"):
        Hand(Alone()).fit()
    with pytest.raises(CrewError, match="disk"):
        Hand(Alone(), module=nn.Linear(1, 1), unfit="disk full").fit()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_shards_and_replicas_make_the_whole(rows: int, ranks: int, columns: int) -> None:
    whole = torch.randn(rows, columns)
    bounds = [rows * r // ranks for r in range(ranks + 1)]
    pieces = [(torch.tensor([a, 0]), whole[a:b]) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(joined(whole, pieces + pieces[:1]), whole)
    if whole.numel() > 1 and rows > 1:
        kept = [piece for piece in pieces if piece[1].numel()]
        with pytest.raises(NetworkError, match="cannot be put together"):
            joined(whole, kept[1:])


def test_a_plain_module_is_not_sharded() -> None:
    assert not sharded(network())
    with Silence():  # type: ignore[no-untyped-call]
        network()(torch.randn(3, 4).double()).sum().backward()


def test_the_shadow_of_synchronised_batchnorm_asks_nobody() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    plain = network()
    shadow: Any = Shadow(net).module.train()
    x = torch.randn(9, 4).double()
    assert torch.equal(shadow(x), plain(x))
    assert type(net[1]) is nn.SyncBatchNorm
    assert type(shadow[1]) is not nn.SyncBatchNorm
