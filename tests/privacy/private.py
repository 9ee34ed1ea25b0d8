"""A private world: experiments with user-level privacy, curators, and replies made by hand."""

import numpy as np
import torch
from flwr.app import ConfigRecord
from scipy import stats

from common.models.weights import Weights, initialise
from server.aggregation import Explicit, Reply
from server.curator import PrivateCurator
from server.roster import Roster
from server.strategy import FederatedRanking
from tests.support import world

ITEMS = 20


def experiment(*, privacy=None, federation=None, evaluation=None, **sections):
    """Noise 1, clip 1, a mean cohort of 5, a server that adds the mean update, metrics that cost nothing."""
    price = {} if "target_epsilon" in (privacy or {}) else {"noise_multiplier": 1.0}
    return world.experiment(
        privacy={"kind": "user-level", "rng": "reproducible", **price, **(privacy or {})},
        federation={
            "sampling": "poisson",
            "weighting": "uniform",
            "cohort": 5,
            "optimizer": {"kind": "fedavg"},
            **(federation or {}),
        },
        evaluation={"privacy": "unaccounted", **(evaluation or {})},
        **sections,
    )


def zeros(experiment, items=ITEMS):
    """Weights that are nought, so that after one step of plain averaging they are the mean update, to the bit."""
    return Weights(*(torch.zeros_like(part) for part in initialise(experiment.model, items, 0)))


def curator(experiment, population=10, items=ITEMS, folder=None):
    return PrivateCurator(experiment, population, items, folder)


def strategy(experiment, population=10, items=ITEMS, folder=None, weights=None):
    """The real strategy; user 0 lives on node `world.NODE`."""
    world.identify()
    roster = Roster(range(world.NODE, world.NODE + population), items)
    start = zeros(experiment, items) if weights is None else weights
    return FederatedRanking(experiment, roster, start, curator(experiment, population, items, folder))


def released(experiment, messages, population=10, items=ITEMS, round_=1):
    """The mean update that one round of the real strategy steps along."""
    made = strategy(experiment, population, items)
    made.aggregate_train(round_, messages)
    return made.weights


def cohort_of(strategy, round_):
    """Users whom a round asks."""
    sent = strategy.configure_train(round_, strategy.arrays(), ConfigRecord(), None)
    return [message.metadata.dst_node_id - world.NODE for message in sent]


def numbers(experiment, seed, norm, rows=None, items=ITEMS):
    """An update of random direction and a given norm: table and body in single precision."""
    count = items if rows is None else len(rows)
    size = count * experiment.model.dim
    drawn = np.random.default_rng(seed).standard_normal(size + len(zeros(experiment, 1).body))
    drawn = (drawn * norm / np.linalg.norm(drawn)).astype(np.float32)
    return drawn[:size].reshape(count, experiment.model.dim), drawn[size:]


def reply(user, table, body, rows=None, below=1):
    """A checked reply with an update by its numbers."""
    rows = None if rows is None else np.asarray(rows, dtype=np.int32)
    return Reply(user, 1, 0.5, Explicit(table, body, rows), 4 * (table.size + body.size), below)


def message(user, table, body, rows=None, round_=1, **metrics):
    """The same as it comes over a network."""
    values = {"table": table, "body": body} | ({} if rows is None else {"rows": np.asarray(rows, dtype=np.int32)})
    return world.answer(user, metrics={"events": 1, "loss": 0.5, **metrics}, round_=round_, **values)


def asked(experiment, weights, users, clip, round_=1):
    """The server's messages to some users, with the bound they are told, if any."""
    return world.ask("train", experiment, weights, users, round_, **({} if clip is None else {"clip": clip}))


def flat(weights):
    """All numbers of an update in one float64 vector."""
    return torch.cat([torch.as_tensor(part).double().flatten() for part in weights]).numpy()


def norm(weights):
    return float(np.linalg.norm(flat(weights)))


def fits(values, std):
    """Whether numbers look like Gaussian noise of a scale: the p-value of Kolmogorov and Smirnov."""
    return float(stats.kstest(np.asarray(values) / std, "norm").pvalue)
