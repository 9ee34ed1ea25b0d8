"""Who takes part in a round: a pure function of the seed and the round, so a resumed run needs only its number."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.config import FederationConfig
from common.seeding import generator


def cohort(config: FederationConfig, population: int, seed: int, round_: int) -> NDArray[np.int64]:
    """Users of a round, sorted and distinct.

    Parameters
    ----------
    config : FederationConfig
        `sampling` and `cohort`.
    population : int
        Users there are; they are 0 … population − 1.
    seed, round_ : int
        The experiment's seed and the round, from 1.

    Returns
    -------
    ndarray
        ``(C,)`` int64; empty at times under `poisson`; under `passes` a little less where a round lies in two passes
        and a user would have come twice.
    """
    size = min(config.cohort, population)
    if config.sampling == "passes":
        return _in_turn(population, seed, (round_ - 1) * size, round_ * size)
    rng = generator(seed, "cohort", round_)
    if config.sampling == "poisson":  # a binomial count, then that many without replacement: independent coin flips
        size = int(rng.binomial(population, size / population))
    return without_replacement(rng, population, size)


def _in_turn(population: int, seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """Users at the places from `start` to before `stop` of endless passes, each a permutation of its own; distinct."""
    parts = []
    for number in range(start // population, (stop - 1) // population + 1):
        order, begin = _order(population, seed, number), number * population
        parts.append(order[max(start - begin, 0) : stop - begin])
    return np.unique(np.concatenate(parts)).astype(np.int64)


@lru_cache(maxsize=2)
def _order(population: int, seed: int, number: int) -> NDArray[np.int64]:
    """The order of a pass, kept for the rounds that share it."""
    return generator(seed, "pass", number).permutation(population)


def some_users(users: int | None, population: int, seed: int, purpose: str, round_: int) -> NDArray[np.int64]:
    """All users, or so many drawn for one purpose and round; sorted int64."""
    if users is None or users >= population:
        return np.arange(population)
    return without_replacement(generator(seed, purpose, round_), population, users)


def without_replacement(rng: np.random.Generator, population: int, size: int) -> NDArray[np.int64]:
    """Uniform subset of 0 … population − 1, sorted; for a small part of many, in time that grows with `size` only."""
    return np.sort(rng.choice(population, size, replace=False, shuffle=False)).astype(np.int64)
