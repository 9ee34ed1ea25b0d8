"""The law behind synthetic data, and the best ranker that any model could be.

Items fall into interests and are popular by Zipf's law; each has a few likely next items of its own interest. Given the
history x_1 … x_t the next event is drawn so:

1. with probability `noise` from the overall popularity (so is the first event);
2. otherwise some x_j is the cause, with weight ``recency ** (t - j)``; then with probability `follow` one of x_j's
   successors, else by popularity inside x_j's interest;
3. an item that the user has seen already is thrown away and the whole draw made again.

By 3. the exact law of the next item is the mixture of 1. and 2. restricted to unseen items and renormalised, and it
depends on nothing but the history. Hence ranking by `Law.scores` is Bayes-optimal: no model has a higher
expected HR, NDCG or MRR.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.sources import SyntheticData

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_NEGLIGIBLE = 1e-6


def generator(seed: int, *key: int) -> np.random.Generator:
    """Counter-based generator (Philox) keyed by the data's seed and a purpose."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def reach(recency: float, length: int) -> int:
    """How many steps back a cause may lie: where its weight falls below one in a million the law itself is cut."""
    if recency >= 1:
        return length
    return max(1, min(length, math.ceil(math.log(_NEGLIGIBLE) / math.log(recency))))


@dataclass(frozen=True, eq=False)
class Law:
    """Exact law of synthetic sequences over I items in G interests.

    Attributes
    ----------
    config : SyntheticData
        Its parameters.
    popularity : (I,) float64
        Overall popularity; sums to 1.
    interest : (I,) int64
        Interest of each item, 0 … G - 1.
    inside : (I,) float64
        Popularity inside the item's own interest; sums to 1 over each interest.
    successors : (I, S) int64
        Likely next items. An item with fewer than S companions is padded with itself at weight 0; one without any is
        its own successor, which is never accepted, since it has been seen.
    weights : (I, S) float64
        Probability of each successor; every one is half as likely as the one before.
    reach : int
        Number of last events that may be causes.
    """

    config: SyntheticData
    popularity: Floats
    interest: Ints
    inside: Floats
    successors: Ints
    weights: Floats
    reach: int

    @classmethod
    def of(cls, config: SyntheticData) -> "Law":
        """Draw popularity, interests and successors from the configuration's seed; ids carry no information."""
        rng = generator(config.seed, 0)
        popularity = np.empty(config.items)
        popularity[rng.permutation(config.items)] = np.arange(1, config.items + 1, dtype=np.float64) ** -config.zipf
        popularity /= popularity.sum()
        interest = rng.permutation(config.items) % config.interests
        inside = popularity / np.bincount(interest, popularity)[interest]
        successors, weights = _successors(interest, config.successors, rng)
        return cls(config, popularity, interest, inside, successors, weights, reach(config.recency, config.max_length))

    def scores(self, histories: Ints, lengths: Ints) -> Floats:
        """Probability of every item to come next, up to a factor per row.

        Parameters
        ----------
        histories : (n, L) int64
            Events in time order, padded on the right. They must be whole: an item that was cut off would count as
            unseen.
        lengths : (n,) int64
            Number of events of each row; without any, the overall popularity is returned.

        Returns
        -------
        (n, I) float64
            Scores; 0 for items of the history.
        """
        rows, width = histories.shape
        items = len(self.popularity)
        weight, total = self._recency(lengths, width)
        row, column = np.nonzero(weight)
        cause, weight = histories[row, column], weight[row, column]

        follow, noise = self.config.follow, np.where(total > 0, self.config.noise, 1.0)
        liking = np.bincount(
            row * self.config.interests + self.interest[cause], weight, rows * self.config.interests
        ).reshape(rows, -1)  # (n, G)
        following = np.bincount(
            (row[:, None] * items + self.successors[cause]).ravel(),
            (weight[:, None] * self.weights[cause]).ravel(),
            rows * items,
        ).reshape(rows, items)
        caused = follow * following + (1 - follow) * liking[:, self.interest] * self.inside
        scores: Floats = noise * self.popularity + (1 - noise) * caused
        row, column = np.nonzero(np.arange(width) < lengths[:, None])
        scores[row, histories[row, column]] = 0.0
        return scores

    def blame(self, histories: Ints, lengths: Ints, following: Ints) -> Floats:
        """Probability of every event to be the cause of the next item, up to a factor per row.

        Parameters
        ----------
        histories, lengths
            As in `scores`.
        following : (n,) int64
            The item that came next.

        Returns
        -------
        (n, L) float64
            0 where an event cannot be the cause.
        """
        weight, _ = self._recency(lengths, histories.shape[1])
        goal = following[:, None]
        follow = (self.weights[histories] * (self.successors[histories] == goal[..., None])).sum(-1)
        inside = np.where(self.interest[histories] == self.interest[goal], self.inside[goal], 0.0)
        chances: Floats = weight * (self.config.follow * follow + (1 - self.config.follow) * inside)
        return chances

    def _recency(self, lengths: Ints, width: int) -> tuple[Floats, Floats]:
        """Probability of every place to be the cause, before the next item is seen, (n, L); the weights' sum (n, 1)."""
        back = lengths[:, None] - np.arange(width)  # 1 = the last event
        weight = np.where((back >= 1) & (back <= self.reach), self.config.recency ** np.maximum(back - 1.0, 0.0), 0.0)
        total = weight.sum(axis=1, keepdims=True)
        return weight / np.maximum(total, np.finfo(np.float64).tiny), total


def _successors(interest: Ints, count: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Draw each item's distinct successors uniformly from its companions: Floyd's sampling, all items at once."""
    items = len(interest)
    order = np.argsort(interest, kind="stable")  # members of each interest side by side
    size = np.bincount(interest)
    start = np.cumsum(size) - size
    place = np.empty(items, dtype=np.int64)
    place[order] = np.arange(items) - start[interest[order]]  # of an item among its interest's members
    others = size[interest] - 1
    wanted = np.minimum(count, others)

    chosen = np.full((items, int(wanted.max(initial=1)) or 1), -1, dtype=np.int64)  # numbers among the other members
    for step in range(chosen.shape[1]):
        last = others - wanted + step
        drawn = (rng.random(items) * (last + 1)).astype(np.int64)
        taken = (chosen == drawn[:, None]).any(axis=1)
        chosen[:, step] = np.where(step < wanted, np.where(taken, last, drawn), -1)
    # Floyd's set is uniform but its order is not, and weights go by order.
    keys = np.where(chosen >= 0, rng.random(chosen.shape), 2.0)
    chosen = np.take_along_axis(chosen, np.argsort(keys, axis=1), axis=1)

    real = chosen >= 0
    member = chosen + (chosen >= place[:, None])  # skip the item itself
    successors = order[np.where(real, start[interest][:, None] + member, 0)]
    weights = np.where(real, 0.5 ** np.arange(chosen.shape[1]), 0.0)
    weights[wanted == 0, 0] = 1.0
    successors = np.where(real, successors, np.arange(items)[:, None])
    return successors, weights / weights.sum(axis=1, keepdims=True)
