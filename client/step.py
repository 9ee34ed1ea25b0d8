"""One local step of a chunk: what it reads of the item table, and each user's loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from client.problem import Problem
from client.rows import Ints
from common.config import Experiment
from common.data.holdout import cold_count
from common.models.alike import Tap
from common.models.encoder import Moments, dropout_sites, encode
from common.models.losses import Candidates, build_loss
from common.models.scoring import history, score_all, score_each
from common.seeding import keep_mask, uniform_bits


class Vectors(NamedTuple):
    """Item vectors that one local step reads."""

    events: Tensor
    """Of the windows, ``(C, W + 1, D)``."""
    scored: Tensor | Tap | None
    """Of the items that every position is scored against, shared ``(N, D)`` or stacked ``(C, N, D)``."""
    private: Tensor | None
    """Of one negative per position, ``(C, W, D)``, for `bce`."""


def read_vectors(table: Tensor, problem: Problem, step: int) -> Vectors:
    """What a step reads from a table, shared ``(R, D)`` or each user's own ``(C, R, D)``."""
    if problem.mixture is not None:
        table = problem.mixture.vectors(table)
    events = _gather(table, problem.events[:, step])
    if problem.private is not None:
        return Vectors(events, None, _gather(table, problem.private[:, step]))
    if problem.scored is not None:
        return Vectors(events, table[..., problem.scored, :], None)
    return Vectors(events, table if problem.rows is None else table[..., : problem.negatives, :], None)


def step_loss(
    experiment: Experiment,
    vectors: Vectors,
    parameters: Mapping[str, Any],
    problem: Problem,
    step: int,
    round_: int,
) -> Tensor:
    """Loss of each user in one local step, ``(C,)``; weights shared or stacked."""
    model, (users, _, lengths, times) = experiment.model, problem.windows
    w = vectors.events.shape[1] - 1
    mask = torch.from_numpy(np.arange(1, w + 1) < lengths[:, step, None])  # (C, W)
    masks = dropout_masks(experiment, users, w, step, round_)
    moments = None
    if times is not None:
        moments = Moments(torch.from_numpy(times[:, step, :-1]), torch.from_numpy(np.minimum(lengths[:, step], w)))
    past = history(model, parameters, encode(model, parameters, vectors.events[:, :-1], masks, moments))
    positive = score_each(past, vectors.events[:, 1:])  # (C, W)
    if vectors.private is not None:
        negative = score_each(past, vectors.private).unsqueeze(-1)  # (C, W, 1)
        negative = negative if problem.barred is None else negative + problem.barred[:, step]
    elif vectors.scored is None:
        raise ValueError("nothing to score against")
    else:
        negative = score_all(past, vectors.scored)  # (C, W, N), or I for the whole catalogue
        if problem.barred is not None:
            negative = negative.add_(problem.barred)
    loss = build_loss(experiment.loss, problem.catalogue - cold_count(problem.catalogue, experiment.data.cold))
    return loss(Candidates(positive, negative), problem.events[:, step, 1:], mask)


def dropout_masks(experiment: Experiment, users: Ints, width: int, step: int, round_: int) -> Tensor | None:
    """Scaled masks of one local step, each user's keyed by its own number, ``(C, W, sites, D)``; none without."""
    model = experiment.model
    if not model.dropout:
        return None
    shape = (len(users), width, dropout_sites(model), model.dim)
    bits = uniform_bits(experiment.seed, f"dropout-{step}", round_, users, shape[1] * shape[2] * shape[3])
    return torch.from_numpy(keep_mask(bits, model.dropout)).view(shape)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, shared ``(R, D)`` or each user's own ``(C, R, D)``, at ``(C, L)`` → ``(C, L, D)``."""
    if table.dim() == 2:
        return F.embedding(index, table)
    c, r, d = table.shape
    return F.embedding(index + torch.arange(c).unsqueeze(-1) * r, table.view(c * r, d))
