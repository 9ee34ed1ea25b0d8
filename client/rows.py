"""Which item rows a user touches, and where each item stands among them: a device trains and sends only these."""

from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class LocalRows(NamedTuple):
    """The local item table of each user of a cohort: the round's N negatives first, then the user's own items."""

    rows: Ints
    """Catalogue index of each local row, ``(C, R)``; unused ones at a row's end are 0."""
    counts: Ints
    """Local rows in use, ``(C,)``."""
    local: Ints
    """Position of each given item in its user's local table, of the shape that was given."""


def localise(items: Ints, real: NDArray[np.bool_], negatives: Ints, catalogue: int) -> LocalRows:
    """Number the items that each user touches.

    Parameters
    ----------
    items : ndarray
        Catalogue indices, ``(C, …)`` int64.
    real : ndarray
        False at padding, same shape; padding is pointed at local row 0 and claims none.
    negatives : ndarray
        Sorted distinct catalogue indices shared by the round, ``(N,)``; an item among them uses the negative's row.
    catalogue : int
        Number of items I.

    Returns
    -------
    LocalRows
    """
    users, shared = len(items), len(negatives)
    width = prod(items.shape[1:])
    flat, mask = items.reshape(users, width), real.reshape(users, width)
    local = np.zeros_like(flat)
    position = positions_among(flat, negatives)
    local[position >= 0] = position[position >= 0]
    own = mask & (position < 0)
    owner = np.nonzero(own)[0]
    keys, inverse = np.unique(owner * catalogue + flat[own], return_inverse=True)  # sorted by user, then item
    key_owner = keys // catalogue
    first = np.searchsorted(key_owner, np.arange(users))
    slot = shared + np.arange(len(keys)) - first[key_owner]
    local[own] = slot[inverse]
    counts = shared + np.bincount(key_owner, minlength=users)
    rows = np.zeros((users, max(1, int(counts.max(initial=shared)))), dtype=np.int64)
    rows[:, :shared] = negatives
    rows[key_owner, slot] = keys % catalogue
    return LocalRows(rows, counts, local.reshape(items.shape))


def positions_among(items: Ints, negatives: Ints) -> Ints:
    """Position of each item in the sorted `negatives`, −1 where it isn't among them; same shape as `items`."""
    if len(negatives) == 0:
        return np.full_like(items, -1)
    position = np.minimum(np.searchsorted(negatives, items), len(negatives) - 1)
    return np.where(negatives[position] == items, position, -1)


def membership(owners: Ints, items: Ints, candidates: Ints, catalogue: int) -> NDArray[np.bool_]:
    """Whether each user's candidates are among its items.

    Parameters
    ----------
    owners, items : ndarray
        Ragged lists of items in flat form: position in the cohort and catalogue index, ``(E,)`` each.
    candidates : ndarray
        ``(C, N)`` catalogue indices.
    catalogue : int
        Number of items.

    Returns
    -------
    ndarray
        ``(C, N)`` bool.
    """
    keys = np.sort(owners * catalogue + items)
    wanted = np.arange(len(candidates))[:, None] * catalogue + candidates
    return positions_among(wanted, keys) >= 0
