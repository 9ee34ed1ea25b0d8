"""One local step of a chunk: what it reads of the item table, and each user's loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from client.facts import moments
from client.problem import Problem
from client.rows import Ints
from common.config import Experiment
from common.data.holdout import cold_count
from common.models.alike import Tap
from common.models.encoder import dropout_sites, encode
from common.models.linear import lookup
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
    events = lookup(table, problem.events[:, step])
    if problem.private is not None:
        return Vectors(events, None, lookup(table, problem.private[:, step]))
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
    model, windows, w = experiment.model, problem.windows, vectors.events.shape[1] - 1
    mask = torch.from_numpy(windows.targets[:, step])  # (C, W)
    masks = dropout_masks(experiment, windows.users, w, step, round_)
    here = None if windows.facts is None else {name: values[:, step, :-1] for name, values in windows.facts.items()}
    known = moments(here, torch.from_numpy(np.minimum(windows.lengths[:, step], w)))
    past = history(model, parameters, encode(model, parameters, vectors.events[:, :-1], masks, known))
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
        if problem.domains is not None:
            came, scored = problem.domains[0][:, step].unsqueeze(-1), problem.domains[1]
            negative = negative.masked_fill_(came != scored, -torch.inf)
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
