"""DP-SGD on devices (Abadi et al., CCS 2016), for a whole chunk of users at once.

An example is a segment of a user's history; segments are disjoint, so each event lies in exactly one. A step takes each
segment with a fixed probability, clips each segment's own gradient, adds them up per user, adds noise to **every**
coordinate, and divides by a fixed number. `client.opacus_training` does the same with Opacus, one user at a time, and
tests hold the two against each other.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from client.batches import Windows
from client.gradients import as_tensor, own_gradients, weighted
from client.noised import Noised, add_own_noise
from client.problem import Problem, pose
from client.rows import Ints
from client.step import Vectors
from common.config import Experiment
from common.data.sequences import Sequences
from common.errors import UsageError
from common.models.weights import Weights
from common.privacy.devices import settle
from common.privacy.mechanism import clip_factors, norms
from common.privacy.noise import NoiseSource, noise_source
from common.privacy.schema import ExampleLevel, on_device
from common.seeding import uniform_integers

_SEGMENTS = 2**20
"""More segments than any user has."""


class Examples(NamedTuple):
    """The segments that one step of C users trains on."""

    owner: Ints
    """Position of each segment's user, ascending, ``(E,)``."""
    problem: Problem
    """What to solve, stacked: one row per segment, which is what `Problem` calls a user."""


def draw(experiment: Experiment, sequences: Sequences, users: Ints, catalogue: int, round_: int, step: int) -> Examples:
    """Take each user's segments, each with its own coin.

    Nothing of a segment's problem hangs on other segments: negatives leave out the items of the segment, not those of
    the whole history.

    Parameters
    ----------
    experiment : Experiment
        Privacy mode, loss, seed.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64.
    catalogue : int
        Number of items.
    round_, step : int
        With the seed and each user, the key of all draws.
    """
    privacy, source = mode(experiment)
    starts, stops = sequences.starts(users), sequences.stops(users, "train")[0]
    length, counts = privacy.segment, -(-(stops - starts) // privacy.segment)
    most = int(counts.max(initial=0))
    if source.reproducible:
        coins = uniform_integers(experiment.seed, f"segments-{step}", round_, users, most, 2**31) / 2**31
    else:
        coins = source.choices("segments").random((len(users), most))
    owner, place = np.nonzero((coins < privacy.sampling_rate) & (np.arange(most) < counts[:, None]))
    begin = starts[owner] + place * length
    lengths = np.minimum(stops[owner] - begin, length)  # (E,)
    inside = np.arange(length) < lengths[:, None]  # (E, W + 1)
    events = np.where(inside, sequences.items[np.where(inside, begin[:, None] + np.arange(length), 0)], 0)
    steps = experiment.federation.local.steps or 1
    names = (users[owner] * _SEGMENTS + place) * steps + step  # what a segment's own draws are keyed by
    windows = Windows(names, events.astype(np.int64)[:, None], lengths[:, None])
    known = np.nonzero(inside)[0], events[inside].astype(np.int64)
    return Examples(owner, pose(experiment, sequences, windows, round_, catalogue, known)[1])


def mode(experiment: Experiment) -> tuple[ExampleLevel, NoiseSource]:
    """What the devices do, and where their coins and noise come from.

    Raises
    ------
    UsageError
        Where they do something else.
    """
    privacy = on_device(experiment.privacy)
    if not isinstance(privacy, ExampleLevel):
        raise UsageError(f"privacy.kind {experiment.privacy.kind} has no examples")
    return privacy, noise_source(privacy.rng, experiment.seed)


def train_examples(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    round_: int,
    clip: float | None = None,
) -> Noised:
    """Train one chunk of users; arguments as in `client.cohort.train`, the clip being the server's, after the noise."""
    privacy, source = mode(experiment)
    std = settle(experiment).noise_multiplier * privacy.clipping_norm
    items, dim = weights.table.shape
    change = Weights(torch.zeros(len(users), items, dim), torch.zeros(len(users), len(weights.body)))
    rate = -experiment.federation.local.lr / privacy.examples
    for step in range(experiment.federation.local.steps or 1):
        taken = draw(experiment, sequences, users, items, round_, step)
        if len(taken.owner):
            add_clipped(experiment, weights, change, taken, privacy.clipping_norm, rate, round_)
        add_own_noise(*change, users, rate * std, source, round_, step)
    return Noised(users, *change, clip)


def add_clipped(
    experiment: Experiment, weights: Weights, change: Weights, taken: Examples, bound: float, rate: float, round_: int
) -> None:
    """Add rate · Σ clipped gradients of each user's segments to what has changed so far, in place.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, seed.
    weights : Weights
        The global weights.
    change : Weights
        ``(C, I, D)`` and ``(C, P)``; gradients are taken at weights + change.
    taken : Examples
        At least one.
    bound : float
        C, on each segment's whole gradient.
    rate : float
        Minus the learning rate over the fixed denominator.
    round_ : int
        With the seed and each segment, the key of the draws.
    """
    owner, problem = torch.from_numpy(taken.owner), taken.problem
    read, body = _standing(weights, change, owner, problem)
    tables, factored, _ = own_gradients(experiment, read, body, problem, round_)
    parts = [as_tensor(part) for part in factored]
    measured = norms(*tables, *parts)
    factors = (clip_factors(measured, bound) * rate).float()
    if not torch.isfinite(measured).all():  # nought times what is not finite is not nought
        for part in (*tables, *parts):
            part[~torch.isfinite(measured)] = 0.0
    mine = torch.zeros(len(change.body), len(owner))  # (C, E), what of which segment is whose
    mine[owner, torch.arange(len(owner))] = factors
    if problem.rows is None:
        change.table.add_(weighted(mine, tables.shared))
    else:
        n, dim = problem.shared, tables.own.shape[2]
        change.table.index_add_(1, torch.from_numpy(problem.rows[0, :n]), weighted(mine, tables.shared))
        used = np.arange(n, problem.rows.shape[1]) < problem.counts[:, None]  # (E, R − N), rows of the segment's own
        of = np.nonzero(used)[0]
        place = taken.owner[of] * change.table.shape[1] + problem.rows[:, n:][used]
        values = tables.own[torch.from_numpy(used)] * factors[torch.from_numpy(of)].unsqueeze(-1)
        change.table.view(-1, dim).index_add_(0, torch.from_numpy(place), values)
    begin = 0
    for part in parts:
        size = part[0].numel()
        change.body[:, begin : begin + size].add_(weighted(mine, part).flatten(1))
        begin += size


def _standing(weights: Weights, change: Weights, owner: Tensor, problem: Problem) -> tuple[Vectors, Tensor]:
    """What each segment reads where its user stands: item vectors, and the body, ``(P,)`` or ``(E, P)``."""
    moved = bool(change.body.any())  # else all stand at the global weights, and nothing need be copied

    def gathered(index: Tensor) -> Tensor:
        """Vectors of items that differ by segment, ``(E, W) → (E, W, D)``."""
        vectors = F.embedding(index, weights.table)
        return vectors + change.table[owner.unsqueeze(-1), index] if moved else vectors

    scored, private = None, None
    if problem.private is not None and problem.rows is not None:
        items = np.take_along_axis(problem.rows, problem.private[:, 0].numpy(), axis=1)
        private = gathered(torch.from_numpy(items))
    else:  # the same items for all segments, in a table that may be the user's own
        every = slice(None) if problem.rows is None else torch.from_numpy(problem.rows[0, : problem.negatives])
        scored = (weights.table[every] + change.table[:, every])[owner] if moved else weights.table[every]
    events = gathered(torch.from_numpy(problem.windows.events[:, 0]))
    body = weights.body + change.body[owner] if moved else weights.body
    return Vectors(events, scored, private), body
