"""Deletion and insertion: by hand, and an oracle beats chance."""

import pytest
import torch

from client import faithfulness
from client.explaining import ends
from client.faithfulness import faithfulness as measured
from client.past import Past
from common.errors import UsageError
from tests.support import world

ITEMS = 24
GOALS = torch.tensor([1, 0])


def past(histories):
    width = max(map(len, histories))
    items = torch.tensor([history + [19] * (width - len(history)) for history in histories])
    return Past(items, torch.tensor([*map(len, histories)]))


def setup():
    config = world.experiment(model={"max_length": 16, "blocks": 2}).model
    return config, world.weights(config, ITEMS)


def test_curves_by_hand(monkeypatch):
    """A log-probability that is a sum over events: curves are running sums."""

    def summed(model, weights, past, targets):
        return (past.items * past.real).sum(1).float()

    monkeypatch.setattr(faithfulness, "log_probability", summed)
    config, weights = setup()
    here = past([[3, 1, 2], [7]])
    found = measured(
        config, weights, here, GOALS, {"right": here.items.float(), "wrong": -here.items.float()}, 0, grid=2, most=3
    )
    assert found["users"] == 1, "a history of one event has nothing to lose"
    assert found["deletion"] == pytest.approx({"right": -2.75, "wrong": -1.75, "random": -2.25}, abs=0.5)
    assert (found["deletion"]["right"], found["deletion"]["wrong"]) == ((0 - 3) / 4 + (-3 - 5) / 4, -1 / 4 - 4 / 4)
    assert (found["insertion"]["right"], found["insertion"]["wrong"]) == ((-3 - 1) / 4 - 1 / 4, (-5 - 3) / 4 - 3 / 4)
    assert found["drop"]["right"] == [3, 5, None]
    assert found["drop"]["wrong"] == [1, 3, None]
    assert found["best"] == {"deletion": "right", "insertion": "right", "drop": "right"}
    assert found["beats_random"] == ["right"]


def test_an_oracle_beats_chance_and_chance_does_not():
    config, weights = setup()
    rows = world.random_histories([8] * 60, ITEMS)
    here, goals = past(rows), torch.arange(60) % ITEMS
    oracle = ends(config, weights, here, goals)
    lots = torch.rand(60, 8, generator=torch.Generator().manual_seed(1))
    importances = {"oracle": oracle, "reversed": -oracle, "lots": lots}
    found = measured(config, weights, here, goals, importances, 3, draws=10)
    assert found["beats_random"][:1] == ["oracle"]
    assert "reversed" not in found["beats_random"]
    assert found["best"] == {"deletion": "oracle", "insertion": "oracle", "drop": "oracle"}
    for area, sign in (("deletion", -1), ("insertion", 1)):
        won = {name: sign * (found[area][name] - found[area]["random"]) for name in importances}
        assert abs(won["lots"]) < 0.25 * won["oracle"]
        assert won["reversed"] < 0
    assert found == measured(config, weights, here, goals, importances, 3, draws=10)
    assert found["deletion"]["random"] != measured(config, weights, here, goals, {}, 4, draws=10)["deletion"]["random"]


def test_nothing_to_measure():
    config, weights = setup()
    with pytest.raises(UsageError, match="two events"):
        measured(config, weights, past([[1], [2]]), GOALS, {}, 0)
