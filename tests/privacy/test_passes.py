"""Users in turn: nobody takes part more often than is planned, which is what devices are charged for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import FederationConfig
from common.privacy.devices import planned_participations
from server.sampling import cohort
from tests.privacy import alone


def setup(privacy=None, federation=None):
    return alone.experiment("local", privacy=privacy, federation=federation)


def federation(size, rounds=1):
    return FederationConfig(sampling="passes", cohort=size, rounds=rounds)


def counts(size, population, rounds, seed=0):
    drawn = [cohort(federation(size), population, seed, round_) for round_ in range(1, rounds + 1)]
    assert all((np.diff(users) > 0).all() and users.dtype == np.int64 for users in drawn)
    assert all(len(users) <= min(size, population) for users in drawn)
    return np.bincount(np.concatenate(drawn), minlength=population), drawn


def test_a_pass_by_hand():
    taken, drawn = counts(3, 12, 8)
    assert taken.tolist() == [2] * 12
    for half in (drawn[:4], drawn[4:]):
        assert sorted(np.concatenate(half).tolist()) == list(range(12))
    assert [users.tolist() for users in drawn[:4]] != [users.tolist() for users in drawn[4:]]
    assert counts(3, 12, 8, seed=1)[1][0].tolist() != drawn[0].tolist()


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**32))
def test_where_rounds_fit_into_passes_all_take_part_as_often(size, parts, rounds, seed):
    taken, drawn = counts(size, size * parts, rounds, seed)
    assert {len(users) for users in drawn} == {size}
    assert taken.min() == rounds // parts
    assert taken.max() == -(-rounds // parts)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.integers(1, 9))
def test_nobody_takes_part_more_often_than_planned(population, size, rounds, seed, most):
    taken, _ = counts(size, population, rounds, seed)
    experiment = setup(federation={"sampling": "passes", "cohort": size, "rounds": rounds})
    bound = planned_participations(experiment, population)
    parts = -(-population // min(size, population))  # rounds of a pass
    assert taken.max() == bound == -(-rounds // parts)
    assert taken.min() == rounds // parts
    limited = experiment.privacy.model_copy(update={"participations": most})
    assert planned_participations(experiment.model_copy(update={"privacy": limited}), population) == min(most, bound)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200), st.integers(0, 2**32))
def test_a_round_is_a_function_of_its_number(population, size, round_, seed):
    """So a resumed run goes on as it would have."""
    first = cohort(federation(size), population, seed, round_).tolist()
    for other in (1, round_ + 1, 3 * round_):
        cohort(federation(size), population, seed + 1, other)
        cohort(federation(size, 7), population, seed, other)
    assert cohort(federation(size), population, seed, round_).tolist() == first


def test_all_take_part_as_often_where_a_pass_is_not_cut_evenly():
    taken, drawn = counts(2, 3, 300)
    assert taken.tolist() == [150] * 3
    assert {len(users) for users in drawn} == {1, 2}


@pytest.mark.parametrize(("sampling", "most"), [("fixed", 40), ("poisson", 40), ("passes", 14)])
def test_the_plan_by_hand(sampling, most):
    experiment = setup(federation={"sampling": sampling, "cohort": 4, "rounds": 40})
    assert planned_participations(experiment, 12) == most
    assert planned_participations(experiment, 3) == 40  # a cohort of all
    limited = setup(privacy={"participations": 5}, federation={"sampling": sampling, "cohort": 4, "rounds": 40})
    assert planned_participations(limited, 12) == 5
