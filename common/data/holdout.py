"""Items that training never sees, to measure how well a recommender ranks items that are new (cold start)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.seeding import generator
from common.sources import DataConfig

Ints = NDArray[np.int64]


def cold_count(catalogue_size: int, share: float) -> int:
    """How many items a share of the catalogue is, halves rounded upwards."""
    return int(share * catalogue_size + 0.5)


def cold_items(catalogue_size: int, share: float, seed: int) -> Ints:
    """Draw the items that are held out of training.

    Parameters
    ----------
    catalogue_size : int
        Number of items.
    share : float
        Share of them that is held out, in [0, 1); the number is rounded, halves upwards.
    seed : int
        Every node draws the same items; a larger share holds out those of a smaller one, too.

    Returns
    -------
    (n,) int64
        Ascending.

    Raises
    ------
    ValueError
        If `share` is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), not {share}")
    number = cold_count(catalogue_size, share)
    return _drawn(catalogue_size, number, seed)


def cold_of(data: DataConfig, catalogue_size: int) -> Ints:
    """The items that a data section (`cold`, `cold_seed`) holds out of training."""
    return cold_items(catalogue_size, data.cold, data.cold_seed)


@lru_cache(maxsize=4)
def _drawn(catalogue_size: int, number: int, seed: int) -> Ints:
    if not number:
        return np.zeros(0, dtype=np.int64)  # asked for once a chunk, so without a draw
    items: Ints = np.sort(generator(seed, "cold-items").permutation(catalogue_size)[:number]).astype(np.int64)
    items.setflags(write=False)
    return items


def concerning(items: NDArray[np.integer], cold: Ints) -> NDArray[np.bool_]:
    """Tell which events concern cold items.

    Parameters
    ----------
    items : (E,) integers
        Items of the events.
    cold : (n,) int64
        From `cold_of`.

    Returns
    -------
    (E,) bool
    """
    # The table's size is that of the catalogue; sorting, the other way, would cost E log E.
    return np.isin(items, cold, kind="table")
