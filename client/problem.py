"""One chunk of a cohort as a problem to solve: windows, negatives, and which row of which table each item is.

Two numberings. In a *shared* problem all users read one table, of the rows that anybody here touches; in a *stacked*
one each user has a table of its own, of the rows that it touches itself. With full softmax either is the whole
catalogue.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.batches import Windows
from client.rows import Ints, localise, membership
from common.config import Experiment
from common.data.holdout import cold_of
from common.data.sequences import Sequences
from common.loss import LossConfig
from common.models.items import Mixture
from common.seeding import generator, uniform_integers


class Problem(NamedTuple):
    """What C users train on, numbered for one kind of table."""

    windows: Windows
    """Users, lengths, and the windows' items by their catalogue indices."""
    rows: Ints | None
    """Catalogue indices of the table's rows: ``(R,)`` shared, ``(C, R)`` stacked (0 where unused); none
    for the whole catalogue.
    """
    counts: Ints
    """Rows that each user touches, ``(C,)``."""
    events: Tensor
    """Table rows of the windows' items, ``(C, S, W + 1)`` int64."""
    negatives: int
    """So many rows at the table's start are the negatives that all users share; 0 for `softmax` and `bce`."""
    private: Tensor | None
    """Table rows of one negative per position, ``(C, S, W)``, for `bce`."""
    catalogue: int
    """Number of items I."""
    barred: Tensor | None
    """−inf where a negative is one of the user's training items, else 0: ``(C, 1, N)`` or ``(C, S, W, 1)``; for
    `softmax` where an item is cold, ``(1, 1, I)``, and none where none is."""
    mixture: Mixture | None = None
    """What items are made of, where they have no row each; all other indices are those of items then."""
    scored: Tensor | None = None
    """Items that every position is scored against, where these are not the table's first rows: ``(N,)``."""
    domains: tuple[Tensor, Tensor] | None = None
    """Domains of the windows' next items ``(C, S, W)`` and of what positions are scored against ``(N,)``: an item is
    rivalled by those of its own domain only. None where there is one."""

    @property
    def shared(self) -> int:
        """So many rows at the table's start are read by all users: the negatives, or the whole catalogue."""
        if self.mixture is not None:
            return self.mixture.rows
        return self.catalogue if self.rows is None else self.negatives


def shared_negatives(loss: LossConfig, seed: int, round_: int, catalogue: int, cold: Ints | None = None) -> Ints:
    """The round's negatives: sorted, distinct, uniform over all items but cold ones, from the public seed; ``(N,)``."""
    wanted = getattr(loss, "negatives", 0)
    rng = generator(seed, "negatives", round_)
    warm = catalogue if cold is None or not len(cold) else np.setdiff1d(np.arange(catalogue), cold)
    many = warm if isinstance(warm, int) else len(warm)
    return np.sort(rng.choice(warm, min(wanted, many), replace=False)).astype(np.int64)


def pose(
    experiment: Experiment,
    sequences: Sequences,
    chunk: Windows,
    round_: int,
    catalogue: int,
    known: tuple[Ints, Ints] | None = None,
    mixture: Mixture | None = None,
) -> tuple[Problem, Problem]:
    """The shared and the stacked problem of a chunk.

    Parameters
    ----------
    experiment : Experiment
        Loss and seed.
    sequences : Sequences
        For the training items of the chunk's users, which are never negatives.
    chunk : Windows
        What the users train on.
    round_ : int
        With the seed, and for private negatives each user, the key of the negatives.
    catalogue : int
        Number of items.
    known : tuple of ndarray, optional
        Positions in the chunk, and items that are not negatives there, ``(K,)`` each; by default each user's training
        items.
    """
    domains = None if known is not None else sequences.domains
    both = _posed(experiment, sequences, chunk, round_, catalogue, known, mixture, domains)
    if domains is None or experiment.loss.kind == "bce":
        return both
    scored = domains
    if experiment.loss.kind != "softmax":
        cold = cold_of(experiment.data, catalogue)
        scored = domains[shared_negatives(experiment.loss, experiment.seed, round_, catalogue, cold)]
    apart = torch.from_numpy(domains[chunk.events[..., 1:]]), torch.tensor(scored)
    shared, stacked = (problem._replace(domains=apart) for problem in both)
    return shared, stacked


def _posed(
    experiment: Experiment,
    sequences: Sequences,
    chunk: Windows,
    round_: int,
    catalogue: int,
    known: tuple[Ints, Ints] | None,
    mixture: Mixture | None,
    domains: NDArray[np.int8] | None,
) -> tuple[Problem, Problem]:
    loss, (users, events, lengths, *_) = experiment.loss, chunk
    cold = cold_of(experiment.data, catalogue)  # in training there are no such items
    c, s, w = events.shape[0], events.shape[1], events.shape[2] - 1
    if loss.kind == "softmax":
        barred = None
        if len(cold):
            barred = torch.zeros(1, 1, catalogue)
            barred[..., torch.tensor(cold)] = -torch.inf
        counts = np.full(c, catalogue if mixture is None else mixture.rows)
        whole = Problem(chunk, None, counts, torch.from_numpy(events), 0, None, catalogue, barred, mixture)
        return whole, whole
    if known is None:
        learnt = sequences.events if experiment.federation.local.predict == "all" else sequences.had
        trained, owner = learnt(users, sequences.stops(users, "train")[0])
    else:
        owner, trained = known
    real: NDArray[np.bool_] = np.arange(w + 1) < lengths[..., None]  # (C, S, W + 1)
    if loss.kind == "bce":
        negatives = np.zeros(0, dtype=np.int64)
        drawn = _private_negatives(
            experiment.seed, round_, users, events[..., 1:].reshape(c, s * w), catalogue, domains
        )
        own: NDArray[np.bool_] = membership(owner, trained, drawn, catalogue).reshape(c, s, w, 1)
        own |= np.isin(drawn, cold).reshape(own.shape)
        items = np.concatenate([events, drawn.reshape(c, s, w)], axis=-1)  # (C, S, 2W + 1)
        real = np.concatenate([real, real[..., 1:]], axis=-1)
    else:
        negatives = shared_negatives(loss, experiment.seed, round_, catalogue, cold)
        tiled = np.broadcast_to(negatives, (c, len(negatives)))
        own = membership(owner, trained, tiled, catalogue).reshape(c, 1, len(negatives))
        items = events
    n = len(negatives)
    if mixture is not None:
        index, counts = torch.from_numpy(items), np.full(c, mixture.rows)
        private = index[..., w + 1 :] if items.shape[2] > w + 1 else None
        barred = torch.from_numpy(np.where(own, -np.inf, 0).astype(np.float32))
        scored = None if loss.kind == "bce" else torch.from_numpy(negatives)
        whole = Problem(chunk, None, counts, index[..., : w + 1], n, private, catalogue, barred, mixture, scored)
        return whole, whole
    touched = localise(items, real, negatives, catalogue)
    used = np.arange(touched.rows.shape[1]) < touched.counts[:, None]  # (C, R)
    others = np.unique(touched.rows[:, n:][used[:, n:]])  # no negatives among them: these have rows of their own
    flat = touched.local.reshape(c, items.shape[1] * items.shape[2])
    catalogue_index = np.take_along_axis(touched.rows, flat, axis=1).reshape(touched.local.shape)
    common = np.where(touched.local < n, touched.local, n + np.searchsorted(others, catalogue_index))
    rows = np.concatenate([negatives, others]) if n + len(others) else np.zeros(1, dtype=np.int64)  # padding needs one
    facts = chunk, touched.counts, n, catalogue, torch.from_numpy(np.where(own, -np.inf, 0).astype(np.float32))
    return _numbered(rows, common, *facts), _numbered(touched.rows, touched.local, *facts)


def _private_negatives(
    seed: int, round_: int, users: Ints, goals: Ints, catalogue: int, domains: NDArray[np.int8] | None
) -> Ints:
    """One negative for each of the users' next items ``(C, n)``: any item, or any of that item's domain."""
    draw = partial(uniform_integers, seed, "private-negatives", round_, users, goals.shape[1])
    if domains is None:
        return draw(catalogue)
    size, order = np.bincount(domains), np.argsort(domains, kind="stable")
    first, here = np.cumsum(size) - size, domains[goals]
    drawn: Ints = order[first[here] + draw(1 << 62) % size[here]]
    return drawn


def _numbered(
    rows: Ints, items: Ints, chunk: Windows, counts: Ints, negatives: int, catalogue: int, barred: Tensor
) -> Problem:
    width = chunk.events.shape[2]
    index = torch.from_numpy(items)
    private = index[..., width:] if items.shape[2] > width else None
    return Problem(chunk, rows, counts, index[..., :width], negatives, private, catalogue, barred)
