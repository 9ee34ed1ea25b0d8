"""Items that training has never seen: one of them at a place at the latest, and a shelf of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.evaluation import rank, scores, shelf_ranks
from client.newcomers import lifted, new_items
from tests.support import world

ITEMS = 20
HISTORIES = world.random_histories([4, 5, 6, 7, 8, 9], ITEMS)
DATA, USERS = world.sequences(HISTORIES), np.arange(len(HISTORIES))


def case(place=4, cold=0.2, **sections):
    data = {"kind": "synthetic", "users": 12, "items": 20, "interests": 4, "mean_length": 6, "cold": cold}
    return world.experiment(data=data, evaluation={"new_place": place} if place else {}, **sections)


NEW = new_items(case(), ITEMS).tolist()
OLD = [item for item in range(ITEMS) if item not in NEW]


def scored(of_new, of_old):
    made = torch.full((1, ITEMS), -10.0)
    made[0, NEW[: len(of_new)]], made[0, OLD[: len(of_old)]] = torch.tensor(of_new), torch.tensor(of_old)
    return made


def order(values):
    return values[0].argsort(descending=True).tolist()


def test_all_are_lifted_so_that_the_best_stands_where_it_should():
    before = scored([-3.0, -2.0, -5.0], [9.0, 8.0, 7.0, 6.0, 5.0])
    after = lifted(case(4), before.clone())
    assert order(after)[:5] == [OLD[0], OLD[1], OLD[2], NEW[1], OLD[3]]
    assert (after[0, NEW] - before[0, NEW]).unique().tolist() == [8.5]  # to 6.5, half way
    assert torch.equal(after[0, OLD], before[0, OLD])


def test_who_stands_there_or_higher_stays():
    before = scored([8.5, -2.0], [9.0, 8.0, 7.0, 6.0, 5.0])
    assert torch.equal(lifted(case(4), before.clone()), before)


@pytest.mark.parametrize(
    ("experiment", "barred"),
    [(case(None), []), (case(17), []), (case(4), NEW), (case(4), OLD)],
    ids=["no place", "too few others", "all new ones are seen", "all others are seen"],
)
def test_where_there_is_nothing_to_lift_nothing_moves(experiment, barred):
    before = scored([-3.0], [9.0, 8.0, 7.0, 6.0, 5.0])
    before[0, barred] = -torch.inf
    assert torch.equal(lifted(experiment, before.clone()), before)


@given(st.integers(0, 2**30), st.integers(2, 16))
def test_the_others_lose_one_place_at_most_for_each_new_one_before_them(seed, place):
    before = torch.randn(3, ITEMS, generator=torch.Generator().manual_seed(seed))
    after = lifted(case(place), before.clone())
    for one, other in zip(before, after, strict=True):
        first, then = one.argsort(descending=True).tolist(), other.argsort(descending=True).tolist()
        assert [item for item in first if item in OLD] == [item for item in then if item in OLD]
        assert [item for item in first if item in NEW] == [item for item in then if item in NEW]
        assert min(then.index(item) for item in NEW) < place


def test_in_tests_and_not_in_validation():
    plain, with_place = case(None), case(3)
    weights = world.weights(plain.model, ITEMS)
    for split in ("validation", "test"):
        one, other = (rank(each, weights, DATA, USERS, split).full for each in (plain, with_place))
        assert (one == other).all() == (split == "validation")


def test_on_the_shelf_only_new_ones_stand():
    experiment = case(None)
    weights = world.weights(experiment.model, ITEMS)
    found = shelf_ranks(experiment, weights, DATA, USERS)
    stops, targets = DATA.stops(USERS, "test")
    for where, values in scores(experiment, weights, DATA, USERS, stops):
        for user, row in zip(where, values, strict=True):
            if targets[user] in NEW:
                assert found[user] == 1 + (row[NEW] > row[targets[user]]).sum()
            else:
                assert np.isnan(found[user])
    assert np.isfinite(found).any()


def test_a_place_needs_something_new():
    with pytest.raises(ValueError, match=r"evaluation\.new_place .* data\.cold"):
        world.experiment(evaluation={"new_place": 10})
