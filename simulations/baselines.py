"""What a figure is worth: the random and the popularity ranker, and the best possible one where the law is known.

All on the protocol of the test split. They read the users' events, so they exist in simulations only.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.evaluation import held_out_ranks
from common.config import Experiment
from common.data.law import Law
from common.data.sequences import Ints, Sequences
from common.seeding import generator
from common.sources import SyntheticData

Ranks = NDArray[np.float64]
Scorer = Callable[[Ints, Ints], Tensor]
"""Scores of all items ``(B, I)`` for users ``(B,)`` whose histories end at stops ``(B,)``."""


def baseline_ranks(experiment: Experiment, sequences: Sequences, items: int) -> dict[str, Ranks]:
    """Test rank of every user, NaN where nothing is held out, for each baseline.

    Parameters
    ----------
    experiment : Experiment
        Its data section says whether a ceiling is known.
    sequences : Sequences
        All users' histories.
    items : int
        Size of the catalogue.

    Returns
    -------
    dict of str to ndarray
        ``popularity``, ``random`` and, for synthetic data, ``ceiling``; ``(U,)`` float64 each.
    """
    scorers: dict[str, Scorer] = {
        "popularity": by_popularity(sequences, items),
        "random": at_random(experiment.seed, items),
    }
    if isinstance(experiment.data, SyntheticData) and not _filtered(experiment.data):
        scorers["ceiling"] = by_law(Law.of(experiment.data), sequences)
    return {name: _ranks(scorer, sequences, items) for name, scorer in scorers.items()}


def by_popularity(sequences: Sequences, items: int) -> Scorer:
    """The items with the most training events first."""
    users = np.arange(len(sequences))
    counts = np.zeros(items)
    for start in range(0, len(users), 2**16):
        here = users[start : start + 2**16]
        counts += np.bincount(sequences.events(here, sequences.stops(here, "train")[0])[0], minlength=items)
    row = torch.from_numpy(counts)
    return lambda users, stops: row.repeat(len(users), 1)


def at_random(seed: int, items: int) -> Scorer:
    """Every item scores at random."""
    rng = generator(seed, "random-ranker")
    return lambda users, stops: torch.from_numpy(rng.random((len(users), items)))


def by_law(law: Law, sequences: Sequences) -> Scorer:
    """The ranker that knows the law of synthetic data: no model can expect to do better."""

    def scorer(users: Ints, stops: Ints) -> Tensor:
        length = int((stops - sequences.offsets[users]).max())
        return torch.from_numpy(law.scores(*sequences.windows(users, stops, length)))

    return scorer


def _ranks(scorer: Scorer, sequences: Sequences, items: int) -> Ranks:
    ranks = np.full(len(sequences), np.nan)
    for users, stops, targets in _batches(sequences, items):
        ranks[users] = held_out_ranks(scorer(users, stops), sequences, users, stops, targets)
    return ranks


def _batches(sequences: Sequences, items: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    size = max(1, 2**24 // items)
    for start in range(0, len(sequences), size):
        users = np.arange(start, min(start + size, len(sequences)))
        stops, targets = sequences.stops(users, "test")
        held = targets >= 0
        yield users[held], stops[held], targets[held]


def _filtered(data: SyntheticData) -> bool:
    """Whether filters may have taken events or items away, so that the law no longer numbers what is left."""
    return max(data.min_user_events, data.min_item_events) > 1
