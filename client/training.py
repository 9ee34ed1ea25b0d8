"""Local training of a whole cohort at once; a device calls it with its one user.

Each user of the cohort has its own copy of the weights, stacked along C. Nothing mixes users, so the gradient of the
summed loss holds every user's own gradient, and one user's broken numbers stay its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.batches import Windows, windows
from client.rows import Ints, localise, membership
from common.config import Experiment, LossConfig
from common.data.sequences import Sequences
from common.models.encoder import dropout_sites, encode
from common.models.losses import Candidates, Loss, build_loss
from common.models.weights import Weights, named
from common.seeding import generator, keep_mask, uniform_bits, uniform_integers


class Update(NamedTuple):
    """What one user's training changed: local − global."""

    user: int
    """Index of the user."""
    rows: NDArray[np.int32] | None
    """Catalogue indices of the rows in `weights.table`, ``(R,)``; `None` means the whole table."""
    weights: Weights
    """Change of the table's rows ``(R, D)`` and of the body ``(P,)``."""
    events: int
    """Targets that one pass trained on."""
    loss: float
    """Mean loss over the local steps, each before its step."""
    finite: bool
    """Whether all numbers are; an update that isn't is worth nothing."""


class _Problem(NamedTuple):
    """One bucket's windows, renumbered to each user's local table."""

    windows: Windows
    rows: Ints | None  # (C, R) catalogue indices; None: the whole table
    counts: Ints | None  # (C,) rows in use
    events: Tensor  # (C, S, W + 1) local
    shared: int  # the first so many local rows are negatives of everybody
    private: Tensor | None  # (C, S, W) local, for one private negative per position
    allowed: Tensor  # (C, 1, N), or (C, S, W, 1) for private negatives


def shared_negatives(loss: LossConfig, seed: int, round_: int, catalogue: int) -> Ints:
    """The round's negatives: sorted, distinct, uniform over the catalogue, from the public seed; ``(N,)``."""
    wanted = getattr(loss, "negatives", 0)
    rng = generator(seed, "negatives", round_)
    return np.sort(rng.choice(catalogue, min(wanted, catalogue), replace=False)).astype(np.int64)


def train(experiment: Experiment, weights: Weights, sequences: Sequences, users: Ints, round_: int) -> Iterator[Update]:
    """Train a cohort from the same global weights and yield each user's update.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, local training, seed.
    weights : Weights
        The global weights, shared; left untouched.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64, distinct.
    round_ : int
        From 1; with the seed and each user, the key of all draws.

    Yields
    ------
    Update
        One per user, bucket by bucket, hence not in the order of `users`.
    """
    catalogue = len(weights.table)
    loss = build_loss(experiment.loss, catalogue)
    negatives = shared_negatives(experiment.loss, experiment.seed, round_, catalogue)
    for bucket in windows(experiment, sequences, users, round_):
        size = max(1, experiment.runtime.memory_mb * 2**20 // _bytes_per_user(experiment, bucket, catalogue))
        for start in range(0, len(bucket.users), size):
            chunk = Windows(*(part[start : start + size] for part in bucket))
            problem = _pose(experiment, sequences, chunk, negatives, catalogue, round_)
            yield from _solve(experiment, weights, loss, problem, round_)


def _pose(
    experiment: Experiment, sequences: Sequences, chunk: Windows, negatives: Ints, catalogue: int, round_: int
) -> _Problem:
    users, events, lengths = chunk
    c, s, w = events.shape[0], events.shape[1], events.shape[2] - 1
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    if experiment.loss.kind == "softmax":
        return _Problem(chunk, None, None, torch.from_numpy(events), 0, None, everything)
    real = np.arange(w + 1) < lengths[..., None]  # (C, S, W + 1)
    trained, owner = sequences.events(users, sequences.stops(users, "train")[0])
    if experiment.loss.kind == "bce":
        drawn = uniform_integers(experiment.seed, "private-negatives", round_, users, s * w, catalogue)
        allowed = torch.from_numpy(~membership(owner, trained, drawn, catalogue)).view(c, s, w, 1)
        touched = np.concatenate([events, drawn.reshape(c, s, w)], axis=-1)
        rows, counts, local = localise(touched, np.concatenate([real, real[..., 1:]], -1), negatives, catalogue)
        index = torch.from_numpy(local)
        return _Problem(chunk, rows, counts, index[..., : w + 1], 0, index[..., w + 1 :], allowed)
    allowed = torch.from_numpy(~membership(owner, trained, np.tile(negatives, (c, 1)), catalogue)).unsqueeze(1)
    rows, counts, local = localise(events, real, negatives, catalogue)
    return _Problem(chunk, rows, counts, torch.from_numpy(local), len(negatives), None, allowed)


def _solve(experiment: Experiment, weights: Weights, loss: Loss, problem: _Problem, round_: int) -> Iterator[Update]:
    local, (users, _, lengths) = experiment.federation.local, problem.windows
    c = len(users)
    origin = weights.table.expand(c, -1, -1) if problem.rows is None else weights.table[torch.from_numpy(problem.rows)]
    start = Weights(origin, weights.body.expand(c, -1))
    stacked = Weights(*(part.clone(memory_format=torch.contiguous_format).requires_grad_() for part in start))
    losses = torch.zeros(lengths.shape)  # (C, S)
    for step in range(lengths.shape[1]):
        per_user = _loss(experiment, stacked, loss, problem, step, round_)  # (C,)
        gradients = torch.autograd.grad(per_user.sum(), stacked)
        losses[:, step] = per_user.detach()
        with torch.no_grad():
            active = torch.from_numpy(lengths[:, step] > 1).float()  # (C,)
            for part, gradient, begin in zip(stacked, gradients, start, strict=True):
                if local.prox:
                    pull = local.prox * active.view(-1, *[1] * (part.dim() - 1))
                    part.addcmul_(pull, part - begin, value=-local.lr)
                part.sub_(gradient, alpha=local.lr)
    with torch.no_grad():
        table, body = (part.detach().sub_(begin) for part, begin in zip(stacked, start, strict=True))
    trained = np.maximum(lengths - 1, 0)  # (C, S)
    steps = np.maximum((trained > 0).sum(-1), 1)
    events = trained.sum(-1) // (local.epochs or lengths.shape[1])
    mean_loss = losses.sum(-1).numpy() / steps
    # A sum meets every number, and whatever is not finite makes it so: one pass instead of one test per user.
    finite = np.isfinite(mean_loss) & torch.isfinite(table.sum((1, 2)) + body.sum(1)).numpy()
    for i, user in enumerate(users):
        r = None if problem.rows is None or problem.counts is None else problem.rows[i, : problem.counts[i]]
        rows = None if r is None else r.astype(np.int32)
        change = Weights(table[i] if rows is None else table[i, : len(rows)], body[i])
        yield Update(int(user), rows, change, int(events[i]), float(mean_loss[i]), bool(finite[i]))


def _loss(experiment: Experiment, stacked: Weights, loss: Loss, problem: _Problem, step: int, round_: int) -> Tensor:
    """Loss of each user in one local step, ``(C,)``."""
    model, (users, events, lengths) = experiment.model, problem.windows
    c, w = len(users), events.shape[-1] - 1
    index = problem.events[:, step]  # (C, W + 1)
    targets = index[:, 1:]
    mask = torch.from_numpy(np.arange(1, w + 1) < lengths[:, step, None])  # (C, W)
    masks = None
    if model.dropout:
        bits = uniform_bits(experiment.seed, f"dropout-{step}", round_, users, dropout_sites(model) * w * model.dim)
        masks = torch.from_numpy(keep_mask(bits, model.dropout)).view(c, -1, w, model.dim)
    hidden = encode(model, named(model, stacked.body), _gather(stacked.table, index[:, :-1]), masks)  # (C, W, D)
    if experiment.loss.kind == "softmax":
        return loss(Candidates(hidden, hidden @ stacked.table.mT, problem.allowed), targets, mask)
    positive = (hidden * _gather(stacked.table, targets)).sum(-1)  # (C, W)
    if problem.private is not None:
        other = (hidden * _gather(stacked.table, problem.private[:, step])).sum(-1, keepdim=True)  # (C, W, 1)
        return loss(Candidates(positive, other, problem.allowed[:, step]), targets, mask)
    negative = hidden @ stacked.table[:, : problem.shared].mT  # (C, W, N)
    return loss(Candidates(positive, negative, problem.allowed), targets, mask)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each user's table: ``(C, R, D)`` at ``(C, L)`` → ``(C, L, D)``."""
    c, r, d = table.shape
    flat = index + torch.arange(c).unsqueeze(-1) * r
    return F.embedding(flat, table.view(c * r, d))


def _bytes_per_user(experiment: Experiment, bucket: Windows, catalogue: int) -> int:
    """Working memory of one user in a chunk, an estimate: weights with gradients, activations, logits and masks."""
    model, w = experiment.model, bucket.events.shape[-1] - 1
    scored = catalogue if experiment.loss.kind == "softmax" else getattr(experiment.loss, "negatives", 1)
    rows = catalogue if experiment.loss.kind == "softmax" else scored + bucket.events[0].size * 2
    body = 12 * model.blocks * model.dim**2
    activations = w * model.dim * (12 + 2 * model.ffn) * model.blocks
    return int(4 * (3 * rows * model.dim + 3 * body + 2 * activations + 3 * w * scored))
