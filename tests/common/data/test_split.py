import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.split import global_time, leave_one_out, split
from common.errors import DataError
from common.sources import PairsData


def flat(histories):
    return np.concatenate([[0], np.cumsum([len(times) for times in histories])]), np.concatenate(histories)


def test_leave_one_out():
    parts = leave_one_out(np.array([0, 1, 3, 6, 10]))
    assert parts.train_end.tolist() == [1, 3, 4, 8]
    assert parts.validation.tolist() == [-1, -1, 4, 8]
    assert parts.test.tolist() == [-1, -1, 5, 9]


def test_global_time_by_hand():
    histories = [
        [0, 1, 2, 3],  # ends before both points
        [4, 5, 6, 7, 8, 9],  # an event in each part
        [2, 9],  # first event from the first point on is beyond the second: test only
        [6, 7, 8],  # no training events; the test event has earlier ones
        [8, 9],  # nothing before the second point
        [1, 6],  # validation only
        [0],
    ]
    offsets, times = flat(histories)
    # 20 times, sorted: 0 0 1 1 2 2 3 4 5 6 6 6 7 7 8 8 8 9 9 9; number 9 is 6, number 14 is 8.
    parts = global_time(offsets, times, 0.45, 0.7)
    assert (parts.train_end - offsets[:-1]).tolist() == [4, 2, 1, 0, 0, 1, 1]
    local = [np.where(places >= 0, places - offsets[:-1], -1).tolist() for places in parts[1:]]
    assert local[0] == [-1, 2, -1, -1, -1, 1, -1]
    assert local[1] == [-1, 4, 1, 2, -1, -1, -1]


def test_points_on_the_same_time():
    offsets, times = flat([[1, 1, 1], [1, 1]])
    with pytest.raises(DataError, match="same time"):
        global_time(offsets, times, 0.8, 0.9)


HISTORIES = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted), min_size=1, max_size=8)


@given(HISTORIES, st.sampled_from([(0.5, 0.8), (0.8, 0.9), (0.01, 0.02)]))
def test_global_time_leaks_nothing(histories, shares):
    offsets, times = flat(histories)
    try:
        parts = global_time(offsets, times, *shares)
    except DataError:
        return
    first, second = np.sort(times)[[int(share * len(times)) for share in shares]]
    for user, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        cut, held, tested = (int(places[user]) for places in parts)
        assert (times[start:cut] < first).all()
        assert (times[cut:end] >= first).all()
        if held >= 0:
            assert held == cut > start
            assert first <= times[held] < second
        if tested >= 0:
            assert tested > start
            assert times[tested] >= second > times[tested - 1]
        assert held < 0 or held != tested


def test_the_section_chooses():
    offsets, times = flat([[1, 2, 3, 4]])
    section = PairsData(kind="pairs", path="x")
    assert split(section, offsets, times).test.tolist() == [3]
    by_time = section.model_copy(update={"split": "global-time", "validation_from": 0.25, "test_from": 0.5})
    assert split(by_time, offsets, times).test.tolist() == [2]
