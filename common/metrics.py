"""From the rank of each user's held-out item to figures with intervals.

A rank counts from 1 and may be fractional (see `expected_ranks`); NaN means that the user has no held-out item and is
left out of every figure. Without users a figure is NaN. With one relevant item a user, HR@K equals recall@K.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.seeding import generator

Floats = NDArray[np.float64]
Ranks = NDArray[np.float64]


class Ranking(NamedTuple):
    """Ranks of held-out items, from 1, ties at their expected rank; NaN where a user has none. All ``(C,)``."""

    full: Ranks
    """Against the whole catalogue."""
    sampled: Ranks
    """Against `evaluation.sampled` negatives and the item itself; NaN where that is off."""
    personal: Ranks
    """As `full`, with what stays on the device and is fine-tuned there; NaN where nothing is."""


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float


class Counted(NamedTuple):
    """Users behind the figures, and users without a held-out item."""

    evaluated: int
    left_out: int


def expected_ranks(better: ArrayLike, equal: ArrayLike) -> Floats:
    """Mean rank over all ways to break the ties.

    Parameters
    ----------
    better : (n,)
        Number of items that score strictly higher than the held-out one.
    equal : (n,)
        Number of *other* items that score the same.

    Returns
    -------
    (n,) float64
        ``1 + better + equal / 2``. A constant scorer thus gets the middle rank, not the first.
    """
    return 1.0 + np.asarray(better, np.float64) + np.asarray(equal, np.float64) / 2


def hit_rate(ranks: ArrayLike, k: int) -> Floats:
    """1 for each user whose rank is at most `k`, else 0; the mean is HR@K. (n,) to (n,); NaN stays, errors: `point`."""
    ranks = _checked(ranks, k)
    return np.where(np.isnan(ranks), np.nan, ranks <= k)


def ndcg(ranks: ArrayLike, k: int) -> Floats:
    """1 / log2(rank + 1) for each user whose rank is at most `k`, else 0; the mean is NDCG@K. Shapes as `hit_rate`."""
    return hit_rate(ranks, k) / np.log2(np.asarray(ranks, np.float64) + 1)


def reciprocal_rank(ranks: ArrayLike) -> Floats:
    """1 / rank of each user; the mean is MRR. Shapes as `hit_rate`."""
    return 1 / _checked(ranks)


def count(ranks: ArrayLike) -> Counted:
    """Count the users with and without a held-out item among `ranks`, (n,)."""
    left_out = int(np.isnan(_checked(ranks)).sum())
    return Counted(np.size(ranks) - left_out, left_out)


def point(ranks: ArrayLike, cutoffs: Sequence[int]) -> dict[str, float]:
    """Figures without intervals, for validation.

    Parameters
    ----------
    ranks : (n,)
        Ranks of the held-out items; NaN without one.
    cutoffs : sequence of int
        The K of HR@K and NDCG@K.

    Returns
    -------
    dict of str to float
        ``hr@K`` and ``ndcg@K`` for each K, and ``mrr``.

    Raises
    ------
    ValueError
        If a rank or a cutoff is below 1.
    """
    names, table = _table(ranks, cutoffs)
    return dict(zip(names, _means(table), strict=True))


def from_histogram(edges: ArrayLike, counts: ArrayLike, users: int, cutoffs: Sequence[int]) -> dict[str, float]:
    """Figures from how many users have which rank, as a noised release tells it.

    Parameters
    ----------
    edges : (b,)
        Largest rank of each bin, ascending; every rank up to the largest cutoff has a bin of its own.
    counts : (b,)
        Users of each bin; noise may have made them negative.
    users : int
        Users that were asked: a public number, where the number of those with an answer is not.
    cutoffs : sequence of int
        The K of HR@K and NDCG@K.

    Returns
    -------
    dict of str to float
        As in `point`; MRR counts a wide bin at its largest rank, so it is a little low.
    """
    last, held = np.asarray(edges, np.float64), np.asarray(counts, np.float64)
    figures = {}
    for k in cutoffs:
        inside = last <= k
        figures[f"hr@{k}"] = float(held[inside].sum() / max(1, users))
        figures[f"ndcg@{k}"] = float((held / np.log2(last + 1))[inside].sum() / max(1, users))
    return figures | {"mrr": float((held / last).sum() / max(1, users))}


def summarise(ranks: ArrayLike, cutoffs: Sequence[int], resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Figures with 95 % intervals: percentile bootstrap over users (Efron, Annals of Statistics 1979).

    Parameters
    ----------
    ranks, cutoffs
        As in `point`; the same errors.
    resamples : int, optional
        Bootstrap resamples. Time is proportional to users times resamples, memory to their sum.
    seed : int, optional
        Seed of the resamples; equal ranks in any order give equal intervals.

    Returns
    -------
    dict of str to Estimate
        Keys as in `point`. One user alone tells nothing about the spread: the interval is then a point.
    """
    names, table = _table(ranks, cutoffs)
    values, users = _means(table), len(table)
    if not users:
        return {name: Estimate(np.nan, np.nan, np.nan) for name in names}
    rng = generator(seed, "bootstrap")
    means = np.empty((resamples, len(names)))
    for mean in means:
        times = np.bincount(rng.integers(users, size=users), minlength=users)  # how often each user was drawn
        np.divide(times @ table, users, out=mean)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    # Rounding of sums in another order must not push the value out of an interval of no width.
    rows = zip(names, values, np.minimum(low, values), np.maximum(high, values), strict=True)
    return {name: Estimate(value, float(lo), float(hi)) for name, value, lo, hi in rows}


def mean_and_sd(values: ArrayLike) -> Spread:
    """Mean and sample standard deviation (n - 1) of a figure over seeds, (n,); NaN where there are too few."""
    values = np.asarray(values, np.float64)
    return Spread(
        float(values.mean()) if values.size else np.nan,
        float(values.std(ddof=1)) if values.size > 1 else np.nan,
    )


def coverage(lists: ArrayLike, items: int) -> float:
    """Share of a catalogue of `items` that stands in any of the `lists`, (n, k) of item numbers; below 0 is padding."""
    return np.unique(_shown(lists)).size / items if items else np.nan


def long_tail_share(lists: ArrayLike, popularity: ArrayLike, head: float = 0.2) -> float:
    """Share of the recommended places that go to the long tail.

    Parameters
    ----------
    lists : (n, k) integers
        Recommended items of each user; below 0 is padding.
    popularity : (items,)
        Number of training events of each item.
    head : float, optional
        The tail is the catalogue without this share of most popular items.

    Returns
    -------
    float
        From 0 to 1. Equally popular items at the border belong to the tail in part.
    """
    shown = _shown(lists)
    return float(_lowest(np.asarray(popularity), 1 - head)[shown].mean()) if shown.size else np.nan


def worst_tenth(values: ArrayLike, lengths: ArrayLike) -> float:
    """Mean over the tenth of users with the shortest histories.

    Parameters
    ----------
    values : (n,)
        A figure of each user, such as `ndcg`; NaN is left out.
    lengths : (n,)
        Length of each user's history.

    Returns
    -------
    float
        Users of equal length at the border share the remaining weight equally, so that their order does not matter.
    """
    values, lengths = np.asarray(values, np.float64), np.asarray(lengths)
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=_lowest(lengths[known], 0.1))) if known.any() else np.nan


def _checked(ranks: ArrayLike, *cutoffs: int) -> Floats:
    ranks = np.asarray(ranks, np.float64)
    if (ranks < 1).any():
        raise ValueError(f"ranks count from 1; found {np.nanmin(ranks)}")
    if any(k < 1 for k in cutoffs):
        raise ValueError(f"cutoffs must be at least 1, not {list(cutoffs)}")
    return ranks


def _table(ranks: ArrayLike, cutoffs: Sequence[int]) -> tuple[list[str], Floats]:
    """Names (m,) and, for each evaluated user in the order of rank, the figures (users, m)."""
    ranks = _checked(ranks, *cutoffs)
    ranks = np.sort(ranks[~np.isnan(ranks)])
    columns = {f"{name}@{k}": of(ranks, k) for k in cutoffs for name, of in (("hr", hit_rate), ("ndcg", ndcg))}
    columns["mrr"] = reciprocal_rank(ranks)
    return list(columns), np.stack(list(columns.values()), axis=1)


def _means(table: Floats) -> list[float]:
    means: list[float] = (table.mean(0) if len(table) else np.full(table.shape[1], np.nan)).tolist()
    return means


def _shown(lists: ArrayLike) -> NDArray[np.int64]:
    shown = np.asarray(lists, np.int64).ravel()
    return shown[shown >= 0]


def _lowest(keys: NDArray[np.generic], share: float) -> Floats:
    """Weight from 0 to 1 of each of `keys`, (n,), in the lowest `share`; equals at the border share what is left."""
    size = share * len(keys)
    border = np.sort(keys)[max(0, int(np.ceil(size)) - 1)]
    below, at = keys < border, keys == border
    weights: Floats = below + at * ((size - below.sum()) / at.sum())
    return weights
