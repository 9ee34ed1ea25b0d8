"""Phases: each is charged with its own time only."""

import pytest

from common import timing
from common.timing import drain, each, phase


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    drain()

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_phase_inside_another_stops_itsclock(clock):
    clock(7)
    with phase("outer"):
        clock(1)
        with phase("inner"):
            clock(10)
        clock(2)
        with phase("inner"):
            clock(20)
    clock(50)  # nobody's
    assert drain() == {"outer": 3, "inner": 30}
    assert drain() == {}


def test_a_phase_that_breaks_off_is_closed(clock):
    with pytest.raises(ValueError), phase("outer"), phase("inner"):  # noqa: PT011
        clock(1)
        raise ValueError
    clock(5)
    assert drain() == {"outer": 0, "inner": 1}


def test_making_items_is_charged_and_using_them_is_not(clock):
    def slow():
        for item in "ab":
            clock(3)
            yield item
        clock(1)

    got = []
    with phase("around"):
        for item in each("making", slow()):
            got.append(item)
            clock(10)
    assert got == ["a", "b"]
    assert drain() == {"around": 20, "making": 7}


def test_a_drain_inside_a_phase_loses_nothing(clock):
    with phase("long"):
        clock(1)
        drain()
        clock(2)
    assert sum(drain().values()) == 3
