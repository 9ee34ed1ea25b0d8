"""Cohorts: pure functions of (seed, round), of the right size and law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import FederationConfig
from server.sampling import cohort, some_users, without_replacement

FIXED, POISSON = (FederationConfig(cohort=20, sampling=kind) for kind in ("fixed", "poisson"))


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 2**32), st.integers(1, 10**6))
def test_a_fixed_cohort(size, population, seed, round_):
    users = cohort(FederationConfig(cohort=size), population, seed, round_)
    assert users.dtype == np.int64
    assert len(users) == min(size, population)
    assert (np.diff(users) > 0).all()  # sorted and distinct
    assert users[0] >= 0
    assert users[-1] < population
    np.testing.assert_array_equal(users, cohort(FederationConfig(cohort=size), population, seed, round_))


@pytest.mark.parametrize("config", [FIXED, POISSON])
def test_seed_and_round_decide_and_nothing_else(config):
    first = cohort(config, 1000, 3, 7).tolist()
    np.random.default_rng(0).random(5)  # other draws do not matter
    assert first == cohort(config, 1000, 3, 7).tolist()
    assert first != cohort(config, 1000, 3, 8).tolist()
    assert first != cohort(config, 1000, 4, 7).tolist()


def test_a_small_population_takes_part_as_a_whole():
    assert cohort(FIXED, 7, 0, 1).tolist() == list(range(7))
    assert cohort(POISSON, 7, 0, 1).tolist() == list(range(7))


def test_everybody_is_as_likely():
    counts = np.bincount(np.concatenate([cohort(FIXED, 100, 0, r) for r in range(3000)]), minlength=100)
    assert (abs(counts - 600) < 110).all()  # standard deviation 22


def test_poisson_sizes_are_binomial():
    sizes = np.array([len(cohort(POISSON, 100, 0, round_)) for round_ in range(4000)])
    assert sizes.mean() == pytest.approx(20, abs=4 * 4 / 4000**0.5)
    assert sizes.var() == pytest.approx(16, rel=4 * (2 / 4000) ** 0.5)
    pairs = [np.isin([3, 50], cohort(POISSON, 100, 1, round_)) for round_ in range(4000)]
    assert np.cov(np.array(pairs).T)[0, 1] == pytest.approx(0, abs=4 * 0.16 / 4000**0.5)  # each on its own


def test_poisson_rounds_may_be_empty():
    sizes = [len(cohort(FederationConfig(cohort=1, sampling="poisson"), 3, 0, round_)) for round_ in range(50)]
    assert 0 in sizes
    assert max(sizes) > 1


def test_validation_users():
    assert some_users(None, 5, 0, "validation-users", 1).tolist() == list(range(5))
    assert some_users(9, 5, 0, "validation-users", 1).tolist() == list(range(5))
    some = some_users(10, 100, 0, "validation-users", 1)
    assert len(set(some.tolist())) == 10
    assert some.tolist() == sorted(some.tolist()) == some_users(10, 100, 0, "validation-users", 1).tolist()
    assert some.tolist() != some_users(10, 100, 0, "validation-users", 2).tolist()
    assert some.tolist() != cohort(FederationConfig(cohort=10), 100, 0, 1).tolist()


def test_a_small_part_of_many_is_quick_to_draw():
    rng = np.random.default_rng(0)
    users = without_replacement(rng, 10**12, 50)  # a list of all would not fit into memory
    assert len(set(users.tolist())) == 50
