"""What is known of events beside their items: looked up by place, and refused where it is not there."""

import dataclasses

import numpy as np
import pytest

from client.facts import assumed, facts_at, require_facts
from common.errors import DataError
from common.models.schema import ModelConfig
from tests.support import world

DATA = world.sequences([[3, 1, 4], [1, 5]])
HOUR, RATING = {"kind": "hour"}, {"kind": "rating"}
TYPES = {"kind": "behaviour", "names": ["buy", "view"]}


def model(*inputs):
    return ModelConfig(dim=8, inputs=inputs)


def with_behaviours(names=("view", "buy"), target=1):
    data = dataclasses.replace(DATA, behaviour_names=names, target=target)
    data.__dict__["behaviours"] = np.array([0, 0, 1, 0, 1], dtype=np.int8)
    return data


def test_nothing_is_looked_up_that_nobody_looks_at():
    assert facts_at(model(), DATA, np.array([[0, -1]])) is None
    assert assumed(model(), DATA, 3) is None


def test_by_place_and_in_seconds():
    data = dataclasses.replace(DATA, times=DATA.times * 10**6, per_second=10**6)
    assert facts_at(model(HOUR), data, np.array([[1, 2], [4, -1]]))["times"][0].tolist() == [1, 2]


def test_behaviours_go_by_their_places_among_the_models_names():
    found = facts_at(model(TYPES), with_behaviours(), np.array([0, 2, 4]))
    assert found["behaviours"].tolist() == [1, 0, 0]
    assert assumed(model(TYPES), with_behaviours(), 2)["behaviours"].tolist() == [[0, 0]]  # what is predicted


@pytest.mark.parametrize(
    ("inputs", "data", "timed", "said"),
    [
        ([RATING], DATA, True, "knows no ratings"),
        ([TYPES], DATA, True, "knows no behaviours"),
        ([TYPES], with_behaviours(("view", "cart")), True, "the data has 'cart', too"),
        ([HOUR], DATA, False, "knows no times"),
        ([HOUR], dataclasses.replace(DATA, times=DATA.times + 1_700_000_000_000), True, "perhaps thousandths"),
    ],
)
def test_what_is_not_known_is_refused(inputs, data, timed, said):
    with pytest.raises(DataError, match=said):
        require_facts(model(*inputs), data, timed)
