"""Parity is an identity: one local step of lr 1, weighted by events, is centralised training with batch = cohort.

The other side is what anybody would write with torch: modules, one padded batch, the mean loss over all its tokens,
torch.optim. Only names, shapes, the cohort and the keyed dropout masks are shared with our code.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord
from torch import nn

from common.models.weights import Weights, initialise, named
from common.seeding import keep_mask, uniform_bits
from server import strategy as strategies
from server.rounds import serve
from server.sampling import cohort
from simulations.grid import InProcessGrid
from tests.support import world

ITEMS, ROUNDS, WIDTH = 25, 10, 8
HISTORIES = world.random_histories([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20], ITEMS)  # 1 … 18 of them for training
OPTIMIZERS = {
    "fedadam": (
        {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6},
        lambda p: torch.optim.Adam(p, 1e-3, (0.9, 0.98), 1e-6),
    ),
    "fedavg": ({"lr": 0.5}, lambda p: torch.optim.SGD(p, 0.5)),
}


def setup(optimizer, dropout, engine="vectorized"):
    return world.experiment(
        model={"dim": 8, "heads": 2, "blocks": 2, "dropout": dropout, "max_length": WIDTH},
        federation={"rounds": ROUNDS, "cohort": 5, "optimizer": {"kind": optimizer, **OPTIMIZERS[optimizer][0]}},
        evaluation={"every": ROUNDS},
        runtime={"engine": engine},
    )


# --- centralised training --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(model.dim), nn.LayerNorm(model.dim)
        self.attention = nn.MultiheadAttention(model.dim, model.heads, batch_first=True)
        self.up, self.down = nn.Linear(model.dim, model.dim), nn.Linear(model.dim, model.dim)

    def forward(self, x, first, second):
        h = self.norm1(x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + first * self.attention(h, h, h, attn_mask=future, need_weights=False)[0]
        return x + second * self.down(F.gelu(self.up(self.norm2(x))))


class SASRec(nn.Module):
    def __init__(self, model, start):
        super().__init__()
        self.item, self.position = nn.Embedding(ITEMS, model.dim), nn.Embedding(model.max_length, model.dim)
        self.blocks = nn.ModuleList([Block(model) for _ in range(model.blocks)])
        self.norm = nn.LayerNorm(model.dim)
        self.load_state_dict({OURS.get(name, name): value.clone() for name, value in renamed(model, start).items()})

    def forward(self, items, masks):
        x = self.item(items) * self.item.embedding_dim**0.5 + self.position.weight[: items.shape[1]]
        x = x * masks[:, 0]
        for i, block in enumerate(self.blocks):
            x = block(x, masks[:, 2 * i + 1], masks[:, 2 * i + 2])
        return self.norm(x) @ self.item.weight.T


OURS = {"item": "item.weight", "position": "position.weight"}
for b in range(2):
    OURS |= {f"blocks.{b}.qkv.{kind}": f"blocks.{b}.attention.in_proj_{kind}" for kind in ("weight", "bias")}
    OURS |= {f"blocks.{b}.out.{kind}": f"blocks.{b}.attention.out_proj.{kind}" for kind in ("weight", "bias")}


def renamed(model, weights):
    return {"item": weights.table, **named(model, weights.body)}


def masks_of(experiment, users, round_):
    """The dropout masks that the users' devices draw, whatever the width of the batch here."""
    model = experiment.model
    if not model.dropout:
        return torch.ones(len(users), 1 + 2 * model.blocks, 1, 1)
    bits = uniform_bits(experiment.seed, "dropout-0", round_, users, (1 + 2 * model.blocks) * WIDTH * model.dim)
    return torch.from_numpy(keep_mask(bits, model.dropout)).view(len(users), -1, WIDTH, model.dim)


def centralised(experiment):
    """Weights after all rounds."""
    start = initialise(experiment.model, ITEMS, experiment.seed)
    model = SASRec(experiment.model, start)
    optimizer = OPTIMIZERS[experiment.federation.optimizer.kind][1](model.parameters())
    for round_ in range(1, ROUNDS + 1):
        users = cohort(experiment.federation, len(HISTORIES), experiment.seed, round_)
        items, targets = torch.zeros(len(users), WIDTH, dtype=torch.int64), torch.full((len(users), WIDTH), -100)
        for row, user in enumerate(users):
            history = HISTORIES[user] if len(HISTORIES[user]) < 3 else HISTORIES[user][:-2]
            window = history[-WIDTH - 1 :]
            items[row, : len(window) - 1] = torch.tensor(window[:-1])
            targets[row, : len(window) - 1] = torch.tensor(window[1:])
        if (targets < 0).all():
            continue
        logits = model(items, masks_of(experiment, users, round_))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)  # mean over tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = model.state_dict()
    body = [theirs[OURS.get(name, name)].flatten() for name in named(experiment.model, start.body)]
    return Weights(theirs["item.weight"], torch.cat(body))


# --- federated training ----------------------------------------------------------------------------------------------


def federated(experiment):
    """Weights after all rounds; no validation figure is better than another, so the last round's model is chosen."""
    grid = InProcessGrid(world.device(experiment, world.sequences(HISTORIES), ITEMS), experiment.runtime.engine)
    return serve(grid, experiment, None, lambda line: None).weights


CASES = pytest.mark.parametrize(("optimizer", "dropout"), [(o, d) for o in OPTIMIZERS for d in (0.0, 0.3)])


@CASES
def test_federated_is_centralised(optimizer, dropout):
    experiment = setup(optimizer, dropout)
    start, expected = initialise(experiment.model, ITEMS, 0), centralised(experiment)
    assert world.gap(expected, start) > 5e-3
    assert world.gap(federated(experiment), expected) < 1e-5


# --- the test has teeth ----------------------------------------------------------------------------------------------


def uniform(monkeypatch):
    monkeypatch.setattr(strategies, "weigh", lambda replies, config: np.ones(len(replies), dtype=np.float32))


def undivided(monkeypatch):
    monkeypatch.setattr(strategies, "mean_of", lambda total, weight: total)


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
    monkeypatch.setattr(strategies, "cohort", lambda *arguments: cohort(*arguments)[1:])


def backwards(monkeypatch):
    monkeypatch.setattr(strategies, "mean_of", lambda total, weight: Weights(*(-part / weight for part in total)))


BUGS = [uniform, undivided, stale, unlucky, backwards]
TEETH = [(bug, optimizer) for bug in BUGS for optimizer in OPTIMIZERS] + [(forgetful, "fedadam")]


@pytest.mark.parametrize(("bug", "optimizer"), TEETH)
def test_a_bug_would_break_parity(bug, optimizer, monkeypatch):
    experiment = setup(optimizer, 0.0)
    expected = centralised(experiment)
    bug(monkeypatch)
    assert world.gap(federated(experiment), expected) > 1e-4
