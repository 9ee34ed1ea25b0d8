"""Robust aggregation: from a round's updates to one, by a rule that some wrong updates cannot move far.

All rules but the mean take every user for one voice, since an attacker would lie about its number of events, and want
whole tables: a row that a user does not send would count as zero, and the median of nearly all zeros is zero.

Of Flower's code the trimmed mean is called here. Its strategies FedMedian, FedTrimmedAvg, Krum and MultiKrum are not,
nor is `select_multikrum`; the tests hold every rule against them. They stack the whole cohort once more or twice, where
here a block of coordinates is enough; and distances in single precision are wrong once what the updates share
outweighs what tells them apart: with 100 in common and 0.2 between them Krum chose another user.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from numpy.typing import NDArray

from common.errors import StateError
from common.models.weights import Weights
from common.privacy.mechanism import clip_factors
from common.robustness import (
    AggregationConfig,
    KrumAggregation,
    MedianAggregation,
    MultiKrumAggregation,
    TrimmedMeanAggregation,
)
from server.aggregation import Explicit, Reply, weighted_sum
from server.optimizers import mean_of

Numbers = NDArray[np.float32]
Importance = NDArray[np.float32]

BLOCK = 500_000
"""Numbers that are looked at at once. The best of a few sizes; one whose rows are a power of two long sorts slower."""


def robust_mean(
    config: AggregationConfig, replies: list[Reply], weights: Weights, importance: Importance | None = None
) -> Weights:
    """One update out of a round's, of the global weights' shapes, float32.

    Beside the replies themselves at most one copy of the cohort's updates is held, and only where they wait in this
    process to be computed.

    Parameters
    ----------
    config : AggregationConfig
        The rule.
    replies : list of Reply
        Checked updates in the order of their users, at least one.
    weights : Weights
        The global weights; only their shapes matter.
    importance : (C,) float32, optional
        Weight of each reply in the mean, by default one; the other rules do not look at it.

    Raises
    ------
    StateError
        Where a reply holds some rows of the table only and the rule wants them all.
    """
    if not replies or not (importance is None or importance.sum() > 0):
        raise ValueError("no updates to aggregate")
    partial = [reply.user for reply in replies if is_sparse(reply)]
    if partial and config.kind != "mean":
        raise StateError(
            f"user {partial[0]} sent only some rows of the item table, and aggregation {config.kind} wants them all; "
            "use loss.kind softmax or aggregation mean"
        )
    return AGGREGATIONS[config.kind](config, replies, weights, importance)


def is_sparse(reply: Reply) -> bool:
    """Whether an update holds some rows of the item table only."""
    return reply.update.rows is not None if isinstance(reply.update, Explicit) else not reply.update[0].whole


def _mean(config: Any, replies: list[Reply], weights: Weights, importance: Importance | None = None) -> Weights:
    counted = np.ones(len(replies), dtype=np.float32) if importance is None else importance
    return mean_of(weighted_sum(replies, counted, weights), float(counted.sum()))


def _median(config: MedianAggregation, replies: list[Reply], weights: Weights, importance: Any) -> Weights:
    """The trimmed mean that keeps the middle one, or the middle two."""
    return _by_coordinate(replies, weights, (config.tolerates(len(replies)) + 0.25) / len(replies))


def _trimmed(config: TrimmedMeanAggregation, replies: list[Reply], weights: Weights, importance: Any) -> Weights:
    return _by_coordinate(replies, weights, config.trim)


def _krum(
    config: KrumAggregation | MultiKrumAggregation, replies: list[Reply], weights: Weights, importance: Any
) -> Weights:
    """Of Krum and Multi-Krum: the mean of the chosen."""
    scores = krum_scores(squared_distances(replies), config.attackers(len(replies)))
    chosen = np.sort(np.argsort(scores, kind="stable")[: config.kept(len(replies))])
    return _mean(config, [replies[i] for i in chosen], weights)


AGGREGATIONS: dict[str, Callable[[Any, list[Reply], Weights, Importance | None], Weights]] = {
    "mean": _mean,
    "median": _median,
    "trimmed-mean": _trimmed,
    "krum": _krum,
    "multi-krum": _krum,
}
"""Rule by ``kind``."""


def _by_coordinate(replies: list[Reply], weights: Weights, cut: float) -> Weights:
    result = Weights(*(torch.empty(part.shape) for part in weights))
    updates = [_numbers(reply) for reply in replies]
    for part, filled in enumerate(result):
        flat = filled.view(-1).numpy()
        for here, values in _blocks([update[part] for update in updates]):
            # Flower selects three times faster in what is sorted, and the order of users then changes no bit.
            values.sort(axis=0)
            flat[here] = trim_mean(values, cut)
    return result


def squared_distances(replies: list[Reply]) -> NDArray[np.float64]:
    """Squared L2 distance between any two whole updates, ``(C, C)``, in double precision."""
    gram = np.zeros((len(replies), len(replies)))
    for part in zip(*(_numbers(reply) for reply in replies), strict=True):
        for _, values in _blocks(list(part)):
            wide = values.astype(np.float64)
            gram += wide @ wide.T
    squares = gram.diagonal()
    return np.maximum(squares[:, None] + squares - 2 * gram, 0)


def krum_scores(distances: NDArray[np.float64], attackers: int) -> NDArray[np.float64]:
    """Sum of each update's distances ``(C, C)`` to its n − f − 2 nearest others, at least one; ``(C,)``."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    scores: NDArray[np.float64] = np.sort(others, axis=1)[:, : max(1, len(others) - attackers - 2)].sum(axis=1)
    return scores


def _numbers(reply: Reply) -> tuple[Numbers, Numbers]:
    """An update's table and body, flat; views where the numbers are there already."""
    update = reply.update
    if not isinstance(update, Explicit):
        table, body = (part.detach().numpy() for part in update[0].one(update[1]))
        return table.reshape(-1), body.reshape(-1)
    return update.table.reshape(-1), update.body.reshape(-1)


def _blocks(updates: list[Numbers]) -> Iterator[tuple[slice, Numbers]]:
    """Some coordinates of all users at a time, ``(C, …)``, a copy each; and which they are."""
    width = max(1, BLOCK // len(updates))
    for start in range(0, updates[0].size, width):
        here = slice(start, start + width)
        yield here, np.stack([update[here] for update in updates])


def norm_bounded_factors(norms: NDArray[np.float64], bound: float) -> NDArray[np.float32]:
    """What each update is multiplied with so that its norm is at most the bound, ``(C,)``; see `clip_factors`."""
    factors: NDArray[np.float32] = clip_factors(torch.from_numpy(norms).double(), bound).float().numpy()
    return factors


def adaptive_bound(norms: NDArray[np.float64]) -> float:
    """The median of a round's norms: a bound for norm bounding (Sun et al., arXiv 1911.07963) that nobody has to guess.

    Updates of zero do not count, or a round in which most have nothing to say would silence the rest; 0 where all are.
    """
    return float(np.median(norms[norms > 0])) if (norms > 0).any() else 0.0
