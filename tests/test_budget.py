"""The share of time that probes may take, on a clock that only tests move."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.schedule import PLANNED, SECOND, Schedule, Tier


@dataclass
class Run:
    """Training that takes `work` seconds a step under a monitor that takes `full` or `light` seconds a probe."""

    share: float
    full: float = 1.0
    light: float = 0.1
    now: float = 100.0
    step: int = 0
    made: list[tuple[int, Tier]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = Schedule(None, self.share, lambda: self.now)
        self.schedule.start()

    def opened(self) -> "Run":
        """Probe at step 0, which completes start-up."""
        assert self.schedule.tier(0) == "full"
        self.probe("full")
        self.schedule.complete()
        self.schedule.close()
        return self

    def probe(self, tier: Tier, cost: float | None = None) -> None:
        cost = (self.full if tier == "full" else self.light) if cost is None else cost
        self.now += cost
        self.schedule.done(self.step, cost / 2, tier)
        self.schedule.pay(cost / 2)
        self.made.append((self.step, tier))
        self.times.append(self.now)

    def steps(self, works: Iterable[float]) -> "Run":
        for work in works:
            self.now += work
            self.step += 1
            if tier := self.schedule.tier(self.step):
                self.probe(tier)
        return self

    def count(self, tier: Tier, since: int = 1) -> int:
        return sum(made == tier and step >= since for step, made in self.made)


@given(
    st.floats(0.001, 1.0),
    st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 5.0), st.floats(0.0, 5.0)), min_size=1, max_size=80),
    st.booleans(),
)
def test_the_share_of_time_is_kept_to_within_one_probe(
    share: float, steps: list[tuple[float, float, float]], cheap: bool
) -> None:
    run = Run(share).opened()
    start, spent = run.now, run.schedule.spent
    dearest = run.full
    for work, full, light in steps:
        run.full, run.light = full, light
        run.steps([work])
        dearest = max(dearest, full, light)
        # Light probes dearer than expected may come on top of the debt that early ones are allowed.
        bound = dearest if run.light <= 0 else 1.5 * dearest
        assert run.schedule.spent - spent <= share * (run.now - start) + bound + 1e-9


@given(
    st.floats(0.001, 0.5),
    st.floats(0.01, 5.0),
    st.floats(0.0, 0.5),
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=80),
)
def test_steady_costs_keep_the_share_to_within_one_full_probe(
    share: float, full: float, ratio: float, works: list[float]
) -> None:
    run = Run(share, full, ratio * full).opened()
    start, spent = run.now, run.schedule.spent
    for work in works:
        run.steps([work])
        assert run.schedule.spent - spent <= share * (run.now - start) + full + 1e-9


@pytest.mark.parametrize(("share", "light"), [(0.02, 0.1), (0.1, 0.3), (0.1, 0.9)])
def test_a_long_run_uses_its_share_and_no_more(share: float, light: float) -> None:
    run = Run(share, 1.0, light).opened().steps([1.0] * 3000)
    assert 0.9 * share < run.schedule.overhead <= 1.02 * share


def test_light_probes_lie_evenly_between_full_ones() -> None:
    run = Run(0.1, 1.0, 0.1).opened().steps([0.1] * 1000)
    places = [i for i, (_, tier) in enumerate(run.made) if tier == "full"]
    middle = range(places[-3] + 1, places[-2])
    assert len(middle) == 5  # half the price of a full probe buys five
    gaps = [run.made[i + 1][0] - run.made[i][0] for i in range(places[-3], places[-2])]
    assert max(gaps) < 2 * min(gaps)
    assert sum(gaps) == pytest.approx(135, rel=0.05)  # 1.5 s of probes in 15 s


def test_light_probes_that_cost_as_much_as_a_full_one_are_left_out_and_tried_again() -> None:
    run = Run(0.1, 1.0, 0.8).opened().steps([1.0] * 3000)
    full, light = run.count("full"), run.count("light")
    assert 0 < light < 0.25 * full
    assert any(step > 1500 for step, tier in run.made if tier == "light")


def test_early_probes_are_spaced_by_powers_of_two() -> None:
    run = Run(0.02, 1.0, 0.1).opened().steps([0.001] * 40)
    assert run.made == [(0, "full"), *((2**k, "light") for k in range(5))]  # half a probe of debt pays for five
    assert not run.steps([0.001] * 300).made[6:]


@pytest.mark.parametrize("pause", [60.0, 3600.0, 86400.0])
def test_a_pause_is_followed_by_no_burst(pause: float) -> None:
    run = Run(0.02, 1.0, 0.1).opened().steps([0.1] * 1000)
    before = len(run.made)
    run.steps([pause])
    pace = run.steps([0.1] * 100).made[before:]  # ten seconds, in which 0.2 s are earned
    assert len(pace) <= 2
    assert [tier for _, tier in pace].count("full") <= 1


def test_a_stopped_clock_makes_no_probe() -> None:
    run = Run(0.1, 1.0, 0.1).opened().steps([0.1] * 500)
    before = len(run.made)
    assert len(run.steps([0.0] * 500).made) <= before + 1


def test_a_probe_that_took_far_longer_than_the_last_is_paid_back() -> None:
    run = Run(0.1, 1.0, 0.05).opened().steps([0.1] * 200)
    run.step += 1
    run.probe("full", 30.0)
    then, made = run.now, len(run.made)
    while len(run.made) == made:
        run.steps([1.0])
    assert 250 < run.now - then < 330  # 30 s less what was in credit or earned meanwhile, and the next price
    run.steps([1.0] * 300)
    assert run.schedule.overhead < 0.105


def test_start_up_is_the_first_complete_probe_after_the_second_step() -> None:
    run = Run(0.02)
    run.schedule.hold = True
    assert run.schedule.tier(0) == "full"
    run.probe("full")
    for _ in range(6):
        run.now, run.step = run.now + 0.1, run.step + 1
        assert run.schedule.tier(run.step) is None  # the loss is not known yet
    run.schedule.hold = False
    assert run.schedule.tier(run.step) == "full"
    early = Schedule(None, 0.02, lambda: 0.0)
    early.done(0, 1.0)
    assert [early.tier(step) for step in range(4)] == [None] * SECOND + ["full"] * 2
    run.probe("full", 5.0)
    run.schedule.complete()
    run.schedule.pay(2.0)
    assert run.schedule.tier(run.step + 1) is None
    assert (run.schedule.startup, run.schedule.overhead) == (8.0, 0.0)


def test_a_resumed_run_goes_on_after_its_last_probe() -> None:
    run = Run(0.02)
    run.schedule.last_step = run.step = 500
    assert run.schedule.tier(500) is None
    assert run.schedule.tier(501) == "full"  # as at the start: complete once, then by budget
    run.step = 501
    run.probe("full")
    run.schedule.complete()
    assert not run.steps([0.1] * 100).count("full", 502)
    assert run.steps([0.1] * 800).count("full", 502) == 1


def test_a_free_monitor_probes_at_every_step() -> None:
    assert Run(0.5, 0.0, 0.0).opened().steps([1e-9] * 5).made == [(step, "full") for step in range(6)]


def test_waiting_for_the_device_is_not_the_monitors() -> None:
    schedule = Run(0.5).opened().schedule
    before = schedule.spent
    schedule.excuse(3.0)
    assert (schedule.spent, schedule.excused) == (before, 3.0)


def test_the_next_probe_is_foreseen() -> None:
    run = Run(0.02, 1.0, 0.1)
    assert run.schedule.foreseen(0) is None
    run.opened().steps([0.05] * 100)
    run.schedule.sparse(run.step)
    run.steps([0.05] * 100)
    for _ in range(6):
        wanted = run.schedule.foreseen(run.step)
        before = len(run.made)
        while len(run.made) == before:
            run.steps([0.05])
        made = run.made[-1]
        assert wanted is not None
        early = made[0].bit_length() > run.made[-2][0].bit_length()
        assert early or (made[1] == wanted[1] and made[0] == pytest.approx(wanted[0], rel=0.02))
    assert Schedule(5, 0.02).foreseen(3) is None


def test_few_probes_are_announced_with_what_would_give_twenty() -> None:
    total = 3000
    run = Run(0.02, 1.0, 0.1).opened()
    run.schedule.total = total
    assert run.schedule.sparse(0) is None
    run.steps([0.1] * 30)
    words = run.schedule.sparse(run.step)
    assert words is not None
    assert "fit into the 2970 steps to come at max_overhead=0.02, as one takes 1 s and a step 0.1 s" in words
    share = float(words.rpartition("max_overhead=")[2].split()[0])
    promised = Run(share, 1.0, 0.1).opened().steps([0.1] * total)
    assert PLANNED <= promised.count("full") <= 1.4 * PLANNED
    for planned, said in ((10**6, ""), (None, None), (run.step + 5, "")):
        run.schedule.total = planned
        assert run.schedule.sparse(run.step) == said
    run.schedule.total = run.step + 21
    short = run.schedule.sparse(run.step)
    assert short is not None
    assert short.startswith("less than one full probe fits into the 21 steps")
    assert short.endswith(f"the run is too short for {PLANNED} of them")


def forecasting(total: int, cost: float) -> tuple[Run, list[int]]:
    """Run with a forecast whenever it can be afforded at a full probe."""
    run = Run(0.1, 1.0, 0.1).opened()
    run.schedule.total, run.schedule.saving = total, cost
    made: list[int] = []
    for _ in range(total):
        run.now, run.step = run.now + 0.1, run.step + 1
        tier = run.schedule.tier(run.step)
        if tier == "full" and run.schedule.affordable(0.5) >= cost:
            made.append(run.step)
            run.probe("full", 1.0 + cost)
            run.schedule.forecast(cost)
        elif tier:
            run.probe(tier)
        if tier == "full":
            run.schedule.saving = cost
    return run, made


def test_forecasts_are_saved_for_apart() -> None:
    run, made = forecasting(6000, 5.0)
    assert run.schedule.prices["full"] == pytest.approx(1.0, rel=0.01)
    assert run.schedule.overhead < 0.105
    # Five seconds at a third of a tenth of the time.
    assert len(made) == pytest.approx(6000 * 0.1 / 0.9 / 150, abs=1.5)
    assert run.count("full") > 3 * len(made)


def test_nothing_is_saved_for_a_forecast_that_the_run_cannot_pay() -> None:
    run, made = forecasting(3000, 500.0)
    plain = Run(0.1, 1.0, 0.1).opened().steps([0.1] * 3000)
    assert not made
    assert run.count("full") >= plain.count("full") - 2


def test_a_forecast_in_start_up_is_cheap_beside_its_probe() -> None:
    schedule = Schedule(None, 0.02, lambda: 0.0)
    assert (schedule.affordable(0.01), schedule.affordable(2.0)) == (1.0, 8.0)
    assert Schedule(7, 0.02).affordable(0.01) == math.inf
    schedule.done(0, 9.0)
    schedule.forecast(7.0)
    schedule.complete()
    schedule.close()
    assert schedule.prices == {"full": 2.0}
    assert schedule.startup == 9.0
