"""Encoded features of all items, in the two forms that training takes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Bags:
    """Values of all items on one categorical feature: the weighted sum of their vectors is the mean.

    Attributes
    ----------
    offsets : (I+1,) int64
        Values of item i are at ``[offsets[i], offsets[i+1])``; none where nothing is known.
    values : (nnz,) int64
        Numbers of the values, ascending inside an item, each below `size`.
    weights : (nnz,) float32
        1 / the item's number of values.
    size : int
        Number of values there are, the rare one, which is the last, included.
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.int64]
    weights: NDArray[np.float32]
    size: int


@dataclass(frozen=True, eq=False)
class Dense:
    """Numbers of all items on one feature.

    Attributes
    ----------
    matrix : (I, V) float32
        All finite. For ``numeric`` and ``vectors`` the last column is 1 where the value is missing, else 0.
    """

    matrix: NDArray[np.float32]
