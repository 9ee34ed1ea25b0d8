"""Who takes part in a round: a pure function of the seed and the round, so a resumed run needs only its number."""

from functools import lru_cache
from math import ceil

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
        ``(C,)`` int64; empty at times under `poisson`; under `passes` as many rounds of equal size as a pass needs,
        so a little less than `cohort` where that does not divide the population.
    """
    size = min(ceil(config.cohort * (1 + config.replies.oversample)), population)
    if config.sampling == "passes":
        return _in_turn(population, seed, size, round_)
    rng = generator(seed, "cohort", round_)
    if config.sampling == "poisson":  # a binomial count, then that many without replacement: independent coin flips
        size = int(rng.binomial(population, size / population))
    return without_replacement(rng, population, size)


def _in_turn(population: int, seed: int, size: int, round_: int) -> NDArray[np.int64]:
    """Users of a round of endless passes, each cut into rounds of nearly equal sizes, so that none lies in two."""
    number, part = divmod(round_ - 1, -(-population // size))
    parts = np.array_split(_order(population, seed, number), -(-population // size))
    return np.sort(parts[part]).astype(np.int64)


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
