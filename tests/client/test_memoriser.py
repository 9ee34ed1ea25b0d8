"""The memoriser: a model that learns nothing but how often it saw an item as a negative.

Under the leaky protocol, where negatives avoid everything that the user ever touched, the held-out item is the one that
it never saw, and it finds that item always. Under ours, where they avoid the user's training items only, it knows
nothing: HR@10 is chance.
"""

import numpy as np
import pytest
import torch

from client.batches import chunks, windows
from client.evaluation import held_out_ranks
from client.problem import pose
from common.data.sequences import Sequences
from common.metrics import hit_rate
from tests.support import world

ITEMS, USERS, LENGTH, ROUNDS = 60, 300, 8, 60
HISTORIES = world.random_histories([LENGTH] * USERS, ITEMS)
DATA = world.sequences(HISTORIES)
EVERYBODY = np.arange(USERS)
LOSSES = ["sampled-softmax", "gbce", "bce"]


def memorise(loss, data=DATA):
    """How often each user saw each item as a negative, ``(U, I)``, counted in the problems it is given."""
    experiment = world.experiment(loss={**world.LOSSES[loss], **({} if loss == "bce" else {"negatives": 20})})
    seen = np.zeros((USERS, ITEMS))
    for round_ in range(1, ROUNDS + 1):
        for chunk in chunks(experiment, data, EVERYBODY, lambda width, steps: 1):
            bucket = windows(experiment, data, chunk, round_)
            _, problem = pose(experiment, data, bucket, round_, ITEMS)
            for place, user in enumerate(bucket.users):
                allowed = problem.barred[place].numpy().ravel() == 0
                local = np.arange(problem.negatives)
                if problem.private is not None:
                    real = np.arange(1, bucket.events.shape[2]) < bucket.lengths[place, :, None]  # (S, W)
                    local, allowed = problem.private[place].numpy()[real], allowed[real.ravel()]
                np.add.at(seen[user], problem.rows[place][local[allowed]], 1)
    return seen


def hits(seen, sampled=None):
    """HR@10 of the ranker that prefers what it saw least often as a negative."""
    stops, targets = DATA.stops(EVERYBODY, "test")
    scored = torch.from_numpy(-seen)
    if sampled is not None:  # against so many other unseen items, drawn here
        rng = np.random.default_rng(0)
        for user, history in enumerate(HISTORIES):
            others = rng.permutation(np.setdiff1d(np.arange(ITEMS), history))
            scored[user, others[sampled:]] = -torch.inf
    return float(hit_rate(held_out_ranks(scored, DATA, EVERYBODY, stops, targets), 10).mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_it_knows_nothing_under_our_protocol(loss):
    seen = memorise(loss)
    chance = 10 / (ITEMS - LENGTH + 1)
    assert hits(seen) == pytest.approx(chance, abs=4 * (chance * (1 - chance) / USERS) ** 0.5)
    assert hits(seen, sampled=29) == pytest.approx(1 / 3, abs=4 * (2 / 9 / USERS) ** 0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_items_are_never_negatives_and_held_out_ones_are(loss):
    seen = memorise(loss)
    assert all(not seen[user, history[:-2]].any() for user, history in enumerate(HISTORIES))
    held_out = np.mean([seen[user, history[-2:]].mean() for user, history in enumerate(HISTORIES)])
    others = np.mean([np.delete(seen[user], history).mean() for user, history in enumerate(HISTORIES)])
    assert held_out == pytest.approx(others, rel=0.1)
    assert others > 3


@pytest.mark.parametrize("loss", LOSSES)
def test_it_would_find_a_leak(loss, monkeypatch):
    """The leak planted: negatives avoid the whole history. Then it scores near 1, so the test above has teeth."""
    events = Sequences.events
    monkeypatch.setattr(Sequences, "events", lambda self, users, stops: events(self, users, self.offsets[users + 1]))
    seen = memorise(loss)
    monkeypatch.undo()
    assert hits(seen) > 0.95
    assert hits(seen, sampled=29) > 0.95
