"""When to probe, by counting steps that may jump; learning rates and losses in between. By time: `test_budget`."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_monitor.running import LearningRates, Mean
from ntk_monitor.schedule import Schedule


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_step_is_always_due() -> None:
    assert Schedule(10, 0.02).due(0)
    assert Schedule(10, 0.02).due(7)
    assert Schedule(None, 0.02).due(3)


@given(st.integers(1, 7), st.lists(st.integers(1, 12), max_size=40))
def test_every_multiple_that_is_passed_is_probed_once(every: int, jumps: list[int]) -> None:
    schedule, step, probed = Schedule(every, 0.02), 0, [0]
    assert schedule.due(0)
    schedule.done(0, 1.0)
    for jump in jumps:
        before, step = step, step + jump
        passed = any(n % every == 0 for n in range(before + 1, step + 1))
        assert schedule.due(step) == (passed or step // every > probed[-1] // every)
        if schedule.due(step):
            assert passed
            schedule.done(step, 1.0)
            probed.append(step)
        assert not schedule.due(step)
    assert len({n // every for n in probed}) == len(probed)


def test_a_step_is_not_probed_twice_nor_after_going_back() -> None:
    schedule = Schedule(1, 0.02)
    schedule.done(5, 0.0)
    assert not schedule.due(5)
    assert not schedule.due(4)
    schedule.done(3, 0.0)
    assert schedule.last_step == 5
    assert schedule.due(6)


def test_the_clock_starts_once() -> None:
    clock = Clock()
    schedule = Schedule(5, 0.5, clock)
    assert schedule.elapsed == 0
    schedule.start()
    clock.now += 2
    schedule.start()
    assert schedule.elapsed == 2


def test_overhead_counts_from_the_end_of_start_up() -> None:
    clock = Clock()
    schedule = Schedule(5, 0.5, clock)
    schedule.start()
    clock.now += 4
    schedule.done(0, 3.0)
    assert (schedule.startup, schedule.overhead) == (3.0, 0.0)
    schedule.complete()
    schedule.pay(0.5)  # writing it
    schedule.close()
    assert (schedule.startup, schedule.overhead) == (3.5, 0.0)
    clock.now += 8
    schedule.pay(1.0)
    assert schedule.overhead == 0.125
    schedule.pay(99.0)
    assert schedule.overhead == 1.0
    assert (schedule.startup, schedule.spent) == (3.5, 103.5)


def test_learning_rates_are_kept_where_they_change() -> None:
    rates = LearningRates()
    assert rates.taken() == ([], [])
    for step, rate in enumerate([0.1, 0.1, 0.1, 0.05, 0.05]):
        rates.record(step, (rate, 1.0))
    assert rates.taken() == ([0, 3], [(0.1, 1.0), (0.05, 1.0)])
    # The rate in force opens the next stretch.
    assert rates.taken() == ([3], [(0.05, 1.0)])
    rates.record(9, (0.1, 1.0))
    assert rates.taken() == ([3, 9], [(0.05, 1.0), (0.1, 1.0)])


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=30), st.integers(1, 10))
def test_the_rate_of_every_step_can_be_read_back(values: list[float], every: int) -> None:
    rates, seen = LearningRates(), dict[int, float]()
    for step, value in enumerate(values):
        rates.record(step, (value,))
        if (step + 1) % every == 0 or step + 1 == len(values):
            changes = dict(zip(*rates.taken(), strict=True))
            for past in range(step + 1 - min(every, step + 1), step + 1):
                known = [at for at in changes if at <= past]
                if known:
                    seen[past] = changes[max(known)][0]
    assert seen == dict(enumerate(values))


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(0, 25),
    st.integers(0, 25),
)
def test_rates_between_two_steps_are_those_recorded_or_none(
    values: list[float], start: int, first: int, count: int
) -> None:
    rates = LearningRates()
    assert rates.between(first, first + count) == []
    for step, value in enumerate(values, start):
        rates.record(step, (value,))
    known = start <= first and first + count <= start + len(values)
    wanted = [(value,) for value in values[first - start :][:count]]
    assert rates.between(first, first + count) == (wanted if known else [])


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=30), st.integers(1, 7))
def test_rates_between_probes_are_known_whatever_was_taken(values: list[float], every: int) -> None:
    rates, previous = LearningRates(), 0
    for step, value in enumerate(values):
        rates.record(step, (value,))
        if (step + 1) % every == 0:
            assert rates.between(previous, step + 1) == [(v,) for v in values[previous : step + 1]]
            rates.taken()
            previous = step + 1


def test_a_mean_starts_again_when_it_is_taken() -> None:
    mean = Mean()
    assert math.isnan(mean.taken())
    for value in (1.0, 2.0, 6.0):
        mean.add(value)
    assert mean.count == 3
    assert mean.taken() == 3
    assert mean.count == 0
    assert math.isnan(mean.taken())


def test_a_mean_reads_no_value_before_it_is_asked_for() -> None:
    class OnDevice:
        def __radd__(self, other: float) -> "OnDevice":
            return self

        def __add__(self, other: "OnDevice") -> "OnDevice":
            return self

        def __float__(self) -> float:
            raise RuntimeError("read")

    mean = Mean()
    for _ in range(250):
        mean.add(OnDevice())
    with pytest.raises(RuntimeError, match="read"):
        mean.taken()


def test_a_mean_keeps_few_values_and_no_other_mean() -> None:
    mean, values = Mean(), [0.5 * n for n in range(1234)]
    for value in values:
        mean.add(value)
        assert len(mean._waiting) < 100
    assert mean.taken() == pytest.approx(sum(values) / len(values))
