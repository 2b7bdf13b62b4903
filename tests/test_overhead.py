"""The benchmark of overhead times every hook of a real run, and reads what the product says."""

import pytest

from tests.benchmarks import overhead


@pytest.mark.filterwarnings("default::ntk_monitor.say.NTKWarning")
def test_a_short_run_under_the_stopwatch() -> None:
    watch = overhead.measured("vit", 30, 0.5, probe=8, reference=0)
    assert watch.monitor is not None
    assert watch.monitor.schedule.begun
    assert all(seconds > 0 for seconds in watch.seconds.values())
    # Everything that the product has accounted for lies inside of its hooks.
    assert 0 < watch.monitor.schedule.spent <= watch.spent
    assert 0 <= watch.said <= 1
    assert 0 < watch.outer() < 1
    line = overhead.report("vit", 0.5, watch)
    assert line.split()[:2] == ["vit", "50.0%"]
    assert "full" in line


def test_the_spread_of_ratios() -> None:
    assert overhead.spread([1.2, 1.0, 1.1]) == "1.100 (1.000 to 1.200)"
