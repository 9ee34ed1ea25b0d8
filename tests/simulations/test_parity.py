"""Parity is an identity: one local step of lr 1, weighted by events, is centralised training with batch = cohort.

The other side is `simulations.centralised`: modules, one padded batch, the mean loss over all its tokens, torch.optim.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from client import cohort as local_training
from common.models.weights import Weights, initialise, named
from server import curator as curators
from server import strategy as strategies
from server.rounds import serve
from server.sampling import cohort
from simulations import centralised
from simulations.centralised import SASRec
from simulations.grid import InProcessGrid
from tests.support import world

ITEMS, ROUNDS, LONGEST = 25, 10, 11
HISTORIES = world.random_histories([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20], ITEMS)  # 1 … 18 of them for training
DATA = world.sequences(HISTORIES)  # windows of two widths, 8 and 11
OPTIMIZERS = {"fedadam": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}, "fedavg": {"lr": 0.5}}
LOSSES = ["softmax", "sampled-softmax"]


def setup(optimizer, dropout=0.0, loss="softmax", rounds=ROUNDS, **changed):
    kind = {"kind": optimizer, **OPTIMIZERS[optimizer], **changed}
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dim": 8, "heads": 2, "blocks": 2, "dropout": dropout, "max_length": LONGEST},
        federation={"rounds": rounds, "cohort": 5, "optimizer": kind},
        evaluation={"every": ROUNDS},
    )


def module(experiment, weights):
    model = SASRec(experiment.model, ITEMS)
    model.load_named({"item": weights.table, **named(experiment.model, weights.body)})
    return model


def weights_of(experiment, model):
    theirs = model.named()
    return Weights(theirs["item"], torch.cat([theirs[name].flatten() for name in _names(experiment)]))


def _names(experiment):
    return list(named(experiment.model, initialise(experiment.model, ITEMS, 0).body))


def alone(experiment):
    """Weights after all rounds of centralised training."""
    model = module(experiment, initialise(experiment.model, ITEMS, experiment.seed))
    rounds = range(1, experiment.federation.rounds + 1)
    batches = [(n, cohort(experiment.federation, len(HISTORIES), experiment.seed, n)) for n in rounds]
    if experiment.federation.optimizer.kind == "fedadam":
        centralised.train(experiment, model, DATA, batches)
    else:  # plain SGD, which the reference does not offer
        optimizer = torch.optim.SGD(model.parameters(), experiment.federation.optimizer.lr)
        for step, users in batches:
            optimizer.zero_grad()
            centralised.loss(experiment, model, DATA, users, step).backward()
            optimizer.step()
    return weights_of(experiment, model)


def federated(experiment):
    """Weights after all rounds; no validation figure is better than another, so the last round's model is chosen."""
    grid = InProcessGrid(world.device(experiment, DATA, ITEMS), "vectorized")
    return serve(grid, experiment, None, lambda line: None).weights


CASES = pytest.mark.parametrize(
    ("optimizer", "dropout", "loss"), [(o, d, loss) for o in OPTIMIZERS for d in (0.0, 0.3) for loss in LOSSES]
)


@CASES
def test_federated_is_centralised(optimizer, dropout, loss):
    experiment = setup(optimizer, dropout, loss)
    start, expected = initialise(experiment.model, ITEMS, 0), alone(experiment)
    assert world.gap(expected, start) > 5e-3
    assert world.gap(federated(experiment), expected) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_adam_of_the_smallest_eps_does_not_drift(loss):
    """No parameter's gradient is rounding noise alone, as that of a key's bias would be, which Adam makes steps of."""
    experiment = setup("fedadam", loss=loss, eps=1e-8)
    assert world.gap(federated(experiment), alone(experiment)) < 1e-5


# --- the test has teeth ----------------------------------------------------------------------------------------------


def uniform(monkeypatch):
    monkeypatch.setattr(curators, "weigh", lambda replies, config: np.ones(len(replies), dtype=np.float32))


def undivided(monkeypatch):
    monkeypatch.setattr(curators, "mean_of", lambda total, weight: total)


def stale(monkeypatch):
    first = {}
    send = strategies.FederatedRanking.arrays
    monkeypatch.setattr(
        strategies.FederatedRanking, "arrays", lambda self: first.setdefault("model", ArrayRecord(dict(send(self))))
    )


def forgetful(monkeypatch):
    """A moment-less server: the optimiser is made anew each round."""
    aggregate = strategies.FederatedRanking.aggregate_train

    def anew(self, *arguments):
        self.optimizer = strategies.ServerOptimizer(self.experiment.federation.optimizer, self.weights)
        return aggregate(self, *arguments)

    monkeypatch.setattr(strategies.FederatedRanking, "aggregate_train", anew)


def unlucky(monkeypatch):
    """One user of each cohort is lost."""
    monkeypatch.setattr(curators, "cohort", lambda *arguments: cohort(*arguments)[1:])


def narrow(monkeypatch):
    """A bucket is dropped: only the windows of the smaller width are trained on."""
    plan = local_training.plan
    monkeypatch.setattr(local_training, "plan", lambda *arguments: plan(*arguments)[:1])


def backwards(monkeypatch):
    monkeypatch.setattr(curators, "mean_of", lambda total, weight: Weights(*(-part / weight for part in total)))


BUGS = [uniform, undivided, stale, unlucky, narrow, backwards]
TEETH = [(bug, optimizer) for bug in BUGS for optimizer in OPTIMIZERS] + [(forgetful, "fedadam")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("bug", "optimizer"), TEETH)
def test_a_bug_would_break_parity(bug, optimizer, loss, monkeypatch):
    experiment = setup(optimizer, loss=loss)
    expected = alone(experiment)
    bug(monkeypatch)
    assert world.gap(federated(experiment), expected) > 1e-4


# --- the other side --------------------------------------------------------------------------------------------------


def test_the_other_side_knows_nothing_of_ours():
    """What it may share are the schema, the data and the keyed draws."""
    tree = ast.parse(Path(centralised.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in {"client", "common", "server", "simulations"}}
    schema = {"common.config", "common.models.schema"}
    data = {"common.data.sequences", "common.data.holdout"}
    assert ours == schema | data | {"common.seeding", "simulations.reference"}


def test_weights_go_in_and_out_by_name():
    experiment = setup("fedadam")
    weights = world.weights(experiment.model, ITEMS)
    model = module(experiment, weights)
    assert world.same(weights_of(experiment, model), weights)
    with torch.no_grad():
        model.item.weight.add_(1)
    assert not world.same(weights_of(experiment, model), weights)  # a copy of what was put in


def test_another_optimizer_is_refused():
    experiment = setup("fedavg")
    with pytest.raises(ValueError, match="fedadam"):
        centralised.train(experiment, SASRec(experiment.model, ITEMS), DATA, [])


def test_steps_without_a_target_move_nothing():
    """User 1 has one training event; a batch of nobody else is no step, as the server makes none."""
    experiment = setup("fedadam", rounds=3)
    start = initialise(experiment.model, ITEMS, 0)
    for batch in ([1], []):
        model, straight = module(experiment, start), module(experiment, start)
        idle = np.array(batch, dtype=np.int64)
        centralised.train(experiment, model, DATA, [(1, np.array([4, 9])), (2, idle), (3, np.array([1, 5]))])
        centralised.train(experiment, straight, DATA, [(1, np.array([4, 9])), (3, np.array([1, 5]))])
        assert world.same(weights_of(experiment, model), weights_of(experiment, straight))
