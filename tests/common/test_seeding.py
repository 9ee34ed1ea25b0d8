"""Streams differ where their keys differ, agree where these agree, and look uniform."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.seeding import generator, keep_mask, uniform_bits, uniform_integers

USERS = np.arange(256)
N = 4096
GENERATOR = [306, 605, 296, 351]
BITS = [[16095, 45783, 57536], [22796, 20704, 26257]]
INTEGERS = [[299, 607, 574], [483, 276, 640]]
KEYS = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0), (0, "a", 1, 23), (0, "a", 12, 3)]


@pytest.fixture(scope="module")
def bits() -> np.ndarray:
    return uniform_bits(7, "dropout", 3, USERS, N)


def test_equal_keys_equal_streams_and_other_keys_other_streams():
    draws = [generator(*key).integers(1 << 62) for key in KEYS]
    assert len(set(draws)) == len(KEYS)
    assert draws == [generator(*key).integers(1 << 62) for key in KEYS]


def test_streams_stay_what_they_are():
    # Recorded once: results of old runs must stay reproducible.
    assert generator(0, "cohort", 1).integers(1000, size=4).tolist() == GENERATOR
    assert uniform_bits(0, "dropout", 1, [0, 5], 3).tolist() == BITS
    assert uniform_integers(0, "negatives", 1, [0, 5], 3, 1000).tolist() == INTEGERS


def test_numpy_integers_are_the_same_keys():
    left, right = generator(np.int64(3), "a", np.int32(4)), generator(3, "a", 4)
    assert left.integers(1 << 62) == right.integers(1 << 62)
    np.testing.assert_array_equal(
        uniform_bits(np.int64(3), "a", np.int64(4), USERS.astype(np.int32), 9), uniform_bits(3, "a", 4, USERS, 9)
    )


@given(
    users=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), n=st.integers(0, 40), longer=st.integers(0, 40_000)
)
def test_a_row_depends_on_its_own_user_only_and_a_longer_row_begins_with_the_shorter(users, n, longer):
    together = uniform_bits(1, "a", 2, users, n + longer)
    assert together.shape == (len(users), n + longer)
    assert together.dtype == np.uint16
    for row, user in zip(together, users, strict=True):
        np.testing.assert_array_equal(row[:n], uniform_bits(1, "a", 2, [user], n)[0])


def test_every_part_of_the_key_counts(bits):
    for other in (
        uniform_bits(8, "dropout", 3, USERS, N),
        uniform_bits(7, "noise", 3, USERS, N),
        uniform_bits(7, "dropout", 4, USERS, N),
        uniform_bits(7, "dropout", 3, USERS + 1, N),
    ):
        assert abs((other == bits).mean() - 2**-16) < 1e-5


def test_neither_users_nor_draws_are_fine():
    assert uniform_bits(0, "a", 0, [], 5).shape == (0, 5)
    assert uniform_bits(0, "a", 0, [1, 2], 0).shape == (2, 0)
    assert uniform_integers(0, "a", 0, np.array([], np.int64), 5, 10).shape == (0, 5)


def test_the_stream_is_splitmix64_of_the_users_key():
    # Steele et al., OOPSLA 2014, written for one word at a time.
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    assert mix(golden) == 0xE220A8397B1DCDAF  # first output of the published generator with seed 0
    words = uniform_integers(0, "a", 0, [5], 8, 1 << 63)[0]
    bits = uniform_bits(0, "a", 0, [5], 32)[0].reshape(8, 4).astype(object)
    assert [int(low + (a << 16) + (b << 32) + (high << 48)) & (mask >> 1) for low, a, b, high in bits] == words.tolist()


def test_bits_are_uniform(bits):
    counts = np.bincount(bits.ravel(), minlength=1 << 16)
    assert stats.chisquare(counts).pvalue > 1e-4
    # Buckets of each of the four places within a word.
    for place in range(4):
        assert stats.chisquare(np.bincount(bits[:, place::4].ravel() >> 8, minlength=256)).pvalue > 1e-4
    sd = 0.5 / np.sqrt(bits.size)
    for bit in range(16):
        assert abs((bits >> bit & 1).mean() - 0.5) < 5 * sd


def test_neighbours_are_not_correlated(bits):
    centred = bits.astype(np.float64) - 32767.5
    unit = centred / (65536 / np.sqrt(12))
    bound = 5 / np.sqrt(unit.size)
    later = (uniform_bits(7, "dropout", 4, USERS, N).astype(np.float64) - 32767.5) / (65536 / np.sqrt(12))
    assert abs((unit[:-1] * unit[1:]).mean()) < bound  # neighbouring users
    assert abs((unit * later).mean()) < bound  # neighbouring rounds
    assert all(abs((unit[:, :-lag] * unit[:, lag:]).mean()) < bound for lag in (1, 2, 3, 4, 8))  # along a row
    # The means of the rows spread as those of independent rows do.
    assert stats.kstest(unit.mean(1) * np.sqrt(N), "norm").pvalue > 1e-4


@given(drop=st.floats(0, 1, exclude_max=True))
def test_a_mask_over_all_16_bit_values_has_mean_one(drop):
    mask = keep_mask(np.arange(1 << 16, dtype=np.uint16), drop)
    assert mask.dtype == np.float32
    assert mask.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert abs((mask == 0).mean() - drop) <= 2**-16
    assert len(np.unique(mask[mask > 0])) == 1


def test_masks_made_by_hand():
    bits = np.array([[0, 16383, 16384, 65535]], np.uint16)
    np.testing.assert_array_equal(keep_mask(bits, 0.25), np.float32([[0, 0, 4 / 3, 4 / 3]]))
    np.testing.assert_array_equal(keep_mask(bits, 0), np.ones((1, 4), np.float32))


@pytest.mark.parametrize("drop", [-0.1, 1, float("nan")])
def test_an_impossible_rate_is_refused(drop):
    with pytest.raises(ValueError, match="drop"):
        keep_mask(np.zeros(1, np.uint16), drop)


@given(high=st.integers(1, 1 << 63), users=st.lists(st.integers(0, 1000), max_size=4), n=st.integers(0, 30))
def test_integers_stay_in_their_range(high, users, n):
    draws = uniform_integers(0, "negatives", 1, users, n, high)
    assert draws.dtype == np.int64
    assert draws.shape == (len(users), n)
    assert ((draws >= 0) & (draws < high)).all()


def test_integers_are_uniform():
    draws = uniform_integers(0, "negatives", 1, USERS, 1000, 1682)
    assert stats.chisquare(np.bincount(draws.ravel(), minlength=1682)).pvalue > 1e-4
    np.testing.assert_array_equal(draws[9:10, :7], uniform_integers(0, "negatives", 1, [9], 7, 1682))


@pytest.mark.parametrize("high", [0, -1, (1 << 63) + 1])
def test_an_impossible_range_is_refused(high):
    with pytest.raises(ValueError, match="high"):
        uniform_integers(0, "a", 0, [1], 1, high)


def test_torch_is_not_imported():
    code = "import sys, common.seeding, common.metrics, common.files; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
