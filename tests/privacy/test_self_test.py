"""Per-example gradients that are wrong are found out before anybody trains with them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from client import examples, opacus_training
from client.gradcheck import naive, self_test, stacked, stacked_is_right
from client.gradients import Tables
from client.opacus_module import TiedSASRec
from client.opacus_training import hooked, opacus_is_right
from common.errors import StateError
from tests.privacy import alone
from tests.support import world

ITEMS = alone.ITEMS
HISTORIES = world.random_histories([3, 12], ITEMS)
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Secure RNG")


@pytest.fixture(autouse=True)
def _tested_anew():
    for remembered in (stacked_is_right, opacus_is_right):
        remembered.cache_clear()
    yield
    for remembered in (stacked_is_right, opacus_is_right):
        remembered.cache_clear()


def setup(loss="softmax", **privacy):
    return alone.experiment(loss=loss, privacy=privacy, model={"dropout": 0.2, "blocks": 2})


def by_opacus(experiment):
    weights, data = world.weights(experiment.model, ITEMS), world.sequences(HISTORIES, held_out=False)
    return list(opacus_training.train(experiment, weights, data, np.arange(len(HISTORIES)), 1))


@EACH_LOSS
@pytest.mark.parametrize("segment", [2, 4, 7])
def test_both_engines_pass(loss, segment):
    experiment = setup(loss, segment=segment)
    self_test(experiment, "vectorized", stacked)
    opacus_is_right(experiment)


class Functional(TiedSASRec):
    """The output is tied by a function of the table and not by a layer."""

    def __init__(self, *given):
        super().__init__(*given)
        del self.output
        self.__dict__["output"] = lambda hidden: F.linear(hidden, self.item.weight)


class OnePosition(TiedSASRec):
    """Positions have no batch dimension."""

    def __init__(self, *given):
        super().__init__(*given)
        self.position.register_forward_pre_hook(lambda module, told: (told[0][0],))


class RootParameter(TiedSASRec):
    """The root module owns a parameter."""

    def __init__(self, *given):
        super().__init__(*given)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, *given):
        found = super().forward(*given)
        return found._replace(positive=found.positive + self.shift, negative=found.negative + self.shift)


class Undropped(TiedSASRec):
    def forward(self, events, negatives, private, masks):
        return super().forward(events, negatives, private, None)


FAULTS = [
    (Functional, "softmax", "per-example gradients differ from a loop's"),
    (RootParameter, "softmax", None),
    *((fault, loss, "differ from a loop's") for fault in (OnePosition, Undropped) for loss in world.LOSSES),
]


@pytest.mark.parametrize(("fault", "loss", "said"), FAULTS)
def test_what_opacus_gets_wrong_is_not_trained_with(fault, loss, said, monkeypatch):
    """Each time anew: a refusal is not remembered as a pass. On some faults Opacus itself gives up."""
    monkeypatch.setattr(opacus_training, "TiedSASRec", fault)
    monkeypatch.setattr(opacus_training, "one", lambda *given: pytest.fail("trained"))
    for _ in range(2):
        with pytest.raises(StateError if said else (StateError, AttributeError), match=said):
            by_opacus(setup(loss))


def test_losses_that_are_averaged_over_the_batch_are_refused(monkeypatch):
    real = opacus_training.losses
    monkeypatch.setattr(opacus_training, "losses", lambda *given: real(*given) / len(given[2].counts))
    with pytest.raises(StateError, match="opacus"):
        self_test(setup(), "opacus", hooked)


@pytest.mark.parametrize(
    ("part", "value"),
    [("table", np.nan), ("table", np.inf), ("body", np.inf), ("body", np.nan)],
)
def test_gradients_that_are_not_finite_are_refused(part, value):
    def ours(*given):
        right = naive(*given)
        getattr(right, part)[0] = value
        return right

    with pytest.raises(StateError, match=r"differ from a loop's by (nan|inf)"):
        self_test(setup(), "ours", ours)


def rolled(table, parts):
    return table.roll(1, 0), parts


def rolled_body(table, parts):
    return table, [*parts[:-1], parts[-1].roll(1, 0)]


def mean(table, parts):
    return table.mean(0, keepdim=True).expand_as(table).clone(), parts


def doubled(table, parts):
    return table, [2 * parts[0], *parts[1:]]


def short(table, parts):
    table[-1, -1] = 0
    return table, parts


def broken(table, parts):
    table[0] = torch.nan
    return table, parts


@EACH_LOSS
@pytest.mark.parametrize("fault", [rolled, rolled_body, mean, doubled, short, broken])
def test_a_fault_of_the_vectorised_engine_is_refused(fault, loss, monkeypatch):
    real = examples.own_gradients

    def wrong(*given):
        tables, parts, losses = real(*given)
        table, parts = fault(torch.cat(tables, dim=1), parts)
        return Tables.split(table, tables.shared.shape[1]), parts, losses

    alone.updates(setup(loss), HISTORIES)
    stacked_is_right.cache_clear()
    monkeypatch.setattr(examples, "own_gradients", wrong)
    for _ in range(2):
        with pytest.raises(StateError, match="vectorized: per-example gradients differ"):
            alone.updates(setup(loss), HISTORIES)
