import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.holdout import cold_items, concerning


def test_by_hand():
    items, cold = np.array([3, 1, 3, 0, 2, 1], np.int32), np.array([1, 3])
    assert concerning(items, cold).tolist() == [True, True, True, False, False, True]


def test_the_draw_is_keyed():
    assert cold_items(1000, 0.1, 3).tolist() == cold_items(1000, 0.1, 3).tolist() != cold_items(1000, 0.1, 4).tolist()


@pytest.mark.parametrize(
    ("size", "share", "number"), [(10, 0.25, 3), (10, 0.2, 2), (3, 0.1, 0), (0, 0.5, 0), (7, 0, 0)]
)
def test_how_many(size, share, number):
    cold = cold_items(size, share, 0)
    assert len(cold) == number
    assert cold.dtype == np.int64


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match="share must be in"):
        cold_items(10, share, 0)


@given(st.integers(0, 300), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 2**40))
def test_ascending_distinct_in_range_and_nested(size, one, other, seed):
    less, more = (cold_items(size, share, seed) for share in sorted((one, other)))
    assert (np.diff(more) > 0).all()
    assert ((more >= 0) & (more < size)).all()
    assert set(less) <= set(more)
