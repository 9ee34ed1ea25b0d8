"""Updates of a cohort told apart by user, whatever the chunks they came in."""

from typing import NamedTuple

import numpy as np
import torch

from client.cohort import train
from common.models.weights import Weights


class Record(NamedTuple):
    """All that training says of one user."""

    user: int
    rows: np.ndarray | None
    weights: Weights
    events: int
    loss: float
    sound: bool


def trained(experiment, weights, sequences, users, round_):
    """One record per user of a cohort, in the order of the chunks."""
    for updates in train(experiment, weights, sequences, users, round_):
        for i, user in enumerate(updates.users.tolist()):
            rows = None if updates.whole else updates.rows(i)
            facts = int(updates.events[i]), float(updates.losses[i]), bool(updates.sound[i])
            yield Record(user, rows, updates.one(i), *facts)


def dense(rows, weights, items):
    """Change of the whole table, in double precision; a row that comes more than once counts as often."""
    if rows is None:
        return Weights(*(part.double() for part in weights))
    table = torch.zeros(items, weights.table.shape[1], dtype=torch.float64)
    table.index_add_(0, torch.from_numpy(np.asarray(rows, dtype=np.int64)), weights.table.double())
    return Weights(table, weights.body.double())


def added(updates, importance, items):
    """Σ importance · update over the users of a chunk, one by one in double precision."""
    total = None
    for i, scale in enumerate(importance.tolist()):
        if scale:
            part = dense(None if updates.whole else updates.rows(i), updates.one(i), items)
            part = [scale * each for each in part]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
    return Weights(*total)
