"""What a figure is worth: the random and the popularity ranker, and the best possible one where the law is known.

All on the protocol of the test split. They read the users' events, so they exist in simulations only.
"""

from collections.abc import Callable

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

SCORES = 2**24
"""Scores held at once."""


def baseline_ranks(
    experiment: Experiment, sequences: Sequences, items: int, users: Ints | None = None
) -> dict[str, Ranks]:
    """Test rank of some users, NaN for the others and where nothing is held out, for each baseline.

    Parameters
    ----------
    experiment : Experiment
        Its data section says whether a ceiling is known.
    sequences : Sequences
        All users' histories.
    items : int
        Size of the catalogue.
    users : ndarray, optional
        Whom to rank, ``(C,)`` int64; by default all.

    Returns
    -------
    dict of str to ndarray
        ``popularity``, ``random`` and, for synthetic data, ``ceiling``; ``(U,)`` float64 each.
    """
    users = np.arange(len(sequences)) if users is None else users
    scorers: dict[str, Scorer] = {
        "popularity": by_popularity(sequences, items),
        "random": at_random(experiment.seed, items),
    }
    if isinstance(experiment.data, SyntheticData) and not _filtered(experiment.data):
        scorers["ceiling"] = by_law(Law.of(experiment.data), sequences)
    return {name: _ranks(scorer, sequences, items, users) for name, scorer in scorers.items()}


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


def _ranks(scorer: Scorer, sequences: Sequences, items: int, users: Ints) -> Ranks:
    ranks = np.full(len(sequences), np.nan)
    size = max(1, SCORES // items)
    for start in range(0, len(users), size):
        here = users[start : start + size]
        stops, targets = sequences.stops(here, "test")
        held = targets >= 0
        who, ends = here[held], stops[held]
        ranks[who] = held_out_ranks(scorer(who, ends), sequences, who, ends, targets[held])
    return ranks


def _filtered(data: SyntheticData) -> bool:
    """Whether filters may have taken events or items away, so that the law no longer numbers what is left."""
    return data.cold > 0 or max(data.min_user_events, data.min_item_events) > 1
