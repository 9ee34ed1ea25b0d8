"""The centralised loop against hand-made sums, and its ranks against those of the clients.

That a federated run equals it is in `test_parity.py`.
"""

import numpy as np
import pytest
import torch

from client.evaluation import rank
from common.models.weights import Weights, named
from common.seeding import generator, keep_mask, uniform_bits
from simulations import centralised
from simulations.centralised import SASRec
from tests.support import reference, world

ITEMS, LONGEST = 15, 6
HISTORIES = [[3, 1, 4], [2, 7, 1, 8, 2, 8], [5], [6, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 4, 4, 4, 12]]
TRAINED = world.sequences(HISTORIES, held_out=False)
HELD_OUT = world.sequences(HISTORIES)


def placed(loss="softmax", dropout=0.0, **sections):
    model = {"dim": 8, "heads": 2, "blocks": 2, "dropout": dropout, "max_length": LONGEST}
    return world.experiment(loss=world.LOSSES[loss], model=model, **sections)


def module(experiment, weights):
    model = SASRec(experiment.model, ITEMS)
    model.load_named({"item": weights.table, **named(experiment.model, weights.body)})
    return model


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_clients(seed):
    """Short, long and repetitive histories; of whom nothing is held out has no rank."""
    experiment = placed()
    weights = world.weights(experiment.model, ITEMS, seed)
    ranks = centralised.test_ranks(experiment, module(experiment, weights), HELD_OUT)
    wanted = rank(experiment, weights, HELD_OUT, np.arange(len(HISTORIES)), "test")
    np.testing.assert_array_equal(ranks, wanted.full)
    assert np.isnan(ranks[2]), "one event, nothing held out"
    assert len(np.unique(ranks[np.isfinite(ranks)])) > 2


def test_ties_count_as_the_clients_count_them():
    """Items without an embedding all score exactly 0: the held-out 8 of user 1, and others."""
    experiment = placed()
    table, body = world.weights(experiment.model, ITEMS)
    table[[8, 9, 10, 11]] = 0
    weights = Weights(table, body)
    ranks = centralised.test_ranks(experiment, module(experiment, weights), HELD_OUT)
    wanted = rank(experiment, weights, HELD_OUT, np.arange(len(HISTORIES)), "test").full
    np.testing.assert_array_equal(ranks, wanted)
    assert ranks[1] % 1 == 0.5, "three rivals at its score"


# --- the loss --------------------------------------------------------------------------------------------------------


def masks(experiment, user, events, step):
    """Scaled dropout masks of one user's positions, drawn alone."""
    model = experiment.model
    if not model.dropout:
        return None
    sites = 1 + 2 * model.blocks
    bits = uniform_bits(experiment.seed, "dropout-0", step, np.array([user]), events * sites * model.dim)
    return torch.from_numpy(keep_mask(bits, model.dropout)).view(events, sites, model.dim).double()


def by_hand(experiment, weights, users, step):
    """−log softmax at each position of each user, over what the loss scores there, and the mean of all."""
    table, body = (part.double() for part in weights)
    scored = range(ITEMS)
    if experiment.loss.kind != "softmax":
        drawn = generator(experiment.seed, "negatives", step)
        scored = drawn.choice(ITEMS, experiment.loss.negatives, replace=False).tolist()
    losses = []
    for user in users:
        window = HISTORIES[user][-LONGEST - 1 :]
        inputs, targets = window[:-1], window[1:]
        hidden = reference.encode(experiment.model, body, table[inputs], masks(experiment, user, len(inputs), step))
        for state, target in zip(hidden, targets, strict=True):
            rivals = scored
            if experiment.loss.kind != "softmax":
                rivals = [target, *(item for item in scored if item not in HISTORIES[user])]
            logits = torch.stack([state @ table[item] for item in rivals])
            place = list(rivals).index(target)
            losses.append(-torch.log_softmax(logits, 0)[place])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", centralised.LOSSES)
@pytest.mark.parametrize("users", [[0, 1], [1, 4], [0, 2]])
def test_loss_is_the_mean_over_all_tokens(kind, users, dropout):
    """The second pair has one user longer than the model; of the third one has no target."""
    experiment = placed(kind, dropout)
    weights = world.weights(experiment.model, ITEMS)
    found = centralised.loss(experiment, module(experiment, weights), TRAINED, np.array(users), 3)
    wanted = by_hand(experiment, weights, [user for user in users if len(HISTORIES[user]) > 1], 3)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_loss_trains_on_training_events_only():
    experiment = placed()
    model = module(experiment, world.weights(experiment.model, ITEMS))
    cut = world.sequences([history[: max(1, len(history) - 2)] for history in HISTORIES], held_out=False)
    users = np.array([0, 1, 4])
    found, wanted = (centralised.loss(experiment, model, data, users, 1).item() for data in (HELD_OUT, cut))
    assert found == wanted


# --- what it does not know -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(world.LOSSES.keys() - set(centralised.LOSSES)))
def test_another_loss_is_refused(kind):
    experiment = placed(kind)
    model = module(experiment, world.weights(experiment.model, ITEMS))
    with pytest.raises(ValueError, match=f"softmax and sampled-softmax, not {kind}"):
        centralised.loss(experiment, model, TRAINED, np.array([0, 1]), 1)


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadagrad"])
def test_another_optimizer_is_refused(kind):
    experiment = placed(federation={"optimizer": {"kind": kind}})
    model = module(experiment, world.weights(experiment.model, ITEMS))
    before = {name: value.clone() for name, value in model.named().items()}
    with pytest.raises(ValueError, match="fedadam"):
        centralised.train(experiment, model, TRAINED, [(1, np.array([0, 1]))])
    assert all(torch.equal(before[name], value) for name, value in model.named().items())


def test_adam_is_the_servers():
    experiment = placed(
        federation={"optimizer": {"kind": "fedadam", "lr": 0.1, "beta1": 0.2, "beta2": 0.3, "eps": 0.4}}
    )
    optimizer = centralised.adam(experiment, module(experiment, world.weights(experiment.model, ITEMS)))
    settings = optimizer.defaults
    assert (settings["lr"], settings["betas"], settings["eps"]) == (0.1, (0.2, 0.3), 0.4)


# --- names -----------------------------------------------------------------------------------------------------------


def test_named_gives_back_what_was_loaded():
    experiment = placed()
    weights = world.weights(experiment.model, ITEMS)
    put = {"item": weights.table, **named(experiment.model, weights.body)}
    model = SASRec(experiment.model, ITEMS)
    model.load_named(put)
    got = model.named()
    assert got.keys() == put.keys()
    assert all(torch.equal(got[name], value) for name, value in put.items())


@pytest.mark.parametrize("name", ["item", "position", "blocks.1.qkv.weight", "norm.bias"])
def test_a_missing_weight_is_no_silent_default(name):
    experiment = placed()
    weights = world.weights(experiment.model, ITEMS)
    put = {"item": weights.table, **named(experiment.model, weights.body)}
    del put[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        SASRec(experiment.model, ITEMS).load_named(put)
