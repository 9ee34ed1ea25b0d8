"""Numbering of touched items against dictionaries."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from client.rows import localise, membership, positions_among

CATALOGUE = 12
SETS = st.lists(st.integers(0, CATALOGUE - 1), unique=True, max_size=CATALOGUE).map(sorted)


def ints(values):
    return np.array(values, dtype=np.int64)


def test_localise_by_hand():
    items = ints([[7, 2, 7, 9], [3, 5, 0, 0]])
    real = np.array([[True] * 4, [True, True, False, False]])
    found = localise(items, real, ints([2, 5]), CATALOGUE)
    assert found.rows.tolist() == [[2, 5, 7, 9], [2, 5, 3, 0]]
    assert found.counts.tolist() == [4, 3]
    assert found.local.tolist() == [[2, 0, 2, 3], [2, 1, 0, 0]]


def test_nothing_touched():
    found = localise(ints([[1, 2]]), np.zeros((1, 2), dtype=bool), ints([]), CATALOGUE)
    assert (found.rows.shape, found.counts.tolist(), found.local.tolist()) == ((1, 1), [0], [[0, 0]])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, CATALOGUE - 1), st.booleans()), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    SETS,
)
def test_localise_is_a_dictionary_per_user(pairs, negatives):
    items, real = ints([[i for i, _ in row] for row in pairs]), np.array([[r for _, r in row] for row in pairs])
    found = localise(items.reshape(-1, 2, 3), real.reshape(-1, 2, 3), ints(negatives), CATALOGUE)
    assert found.local.shape == (len(pairs), 2, 3)
    for user, row in enumerate(pairs):
        numbers = {item: place for place, item in enumerate(negatives)}
        for item in sorted({item for item, is_real in row if is_real}):
            numbers.setdefault(item, len(numbers))
        assert found.counts[user] == len(numbers)
        assert found.rows[user, : len(numbers)].tolist() == list(numbers)
        assert not found.rows[user, len(numbers) :].any()
        wanted = [numbers[i] if is_real or i in negatives else 0 for i, is_real in row]
        assert found.local[user].ravel().tolist() == wanted


@given(SETS, st.lists(st.integers(0, CATALOGUE - 1), min_size=1, max_size=9))
def test_positions_among(negatives, items):
    expected = [negatives.index(item) if item in negatives else -1 for item in items]
    assert positions_among(ints(items), ints(negatives)).tolist() == expected


@given(
    st.lists(st.lists(st.integers(0, CATALOGUE - 1), max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, CATALOGUE - 1), min_size=1, max_size=6),
)
def test_membership(histories, candidates):
    owners = ints([user for user, history in enumerate(histories) for _ in history])
    items = ints([item for history in histories for item in history])
    asked = np.tile(ints(candidates), (len(histories), 1))
    expected = [[item in history for item in candidates] for history in histories]
    assert membership(owners, items, asked, CATALOGUE).tolist() == expected


def test_membership_does_not_confuse_neighbours():
    """The last item of one user is no item of the next, whose keys follow at once."""
    assert membership(ints([0]), ints([11]), ints([[11, 0], [11, 0]]), 12).tolist() == [[True, False], [False, False]]
