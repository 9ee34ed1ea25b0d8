"""Items that training never sees, to measure how well a recommender ranks items that are new (cold start)."""

import numpy as np
from numpy.typing import NDArray

from common.seeding import generator

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
        The experiment's seed. Every node draws the same items; a larger share holds out those of a smaller one, too.

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
    order = generator(seed, "cold-items").permutation(catalogue_size)
    return np.sort(order[:number]).astype(np.int64)


def concerning(items: NDArray[np.integer], cold: Ints) -> NDArray[np.bool_]:
    """Tell which events concern cold items.

    Parameters
    ----------
    items : (E,) integers
        Items of the events.
    cold : (n,) int64
        From `cold_items`.

    Returns
    -------
    (E,) bool
    """
    # The table's size is that of the catalogue; sorting, the other way, would cost E log E.
    return np.isin(items, cold, kind="table")


def without(items: NDArray[np.int32], offsets: Ints, cold: Ints) -> tuple[NDArray[np.int32], Ints]:
    """Leave the events on cold items out; users stay, maybe with no event at all.

    Parameters
    ----------
    items : (E,) int32
        Items of all events.
    offsets : (U+1,) int64
        Events of user u are ``[offsets[u], offsets[u+1])``.
    cold : (n,) int64
        From `cold_items`.

    Returns
    -------
    items : (E',) int32
        Those that stay, in their order.
    offsets : (U+1,) int64
        Their bounds. Any other place p in the array moves in the same way, to the number of events kept before it.
    """
    warm = ~concerning(items, cold)
    before = np.concatenate([[0], np.cumsum(warm, dtype=np.int64)])  # (E+1,) events kept before each place
    return items[warm], before[offsets]
