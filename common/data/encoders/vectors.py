"""A vector an item, made elsewhere, such as by an encoder of its picture."""

import math
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data.attributes import Column
from common.data.encoders.encoded import Dense
from common.features import VectorsFeature
from common.section import Positive, Section

_LARGEST = float(np.finfo(np.float32).max)
_BLOCK = 1 << 14
"""Rows of doubles at a time."""


class Vectors(Section):
    """A fitted feature of vectors: nothing but their width."""

    kind: Literal["vectors"] = "vectors"
    """Selects this encoder."""
    name: str
    """Name of the feature, and of the column where rows come as a table."""
    column: str
    """Column that is read."""
    width: Positive
    """Numbers of a vector."""
    normalise: bool
    """As in `VectorsFeature`."""

    def encode(self, column: Column) -> Dense:
        """Encode vectors as (I, width + 1): zeros and a 1 where there is none. Errors as in `fit_vectors`."""
        rows, width = _lists(column)
        if rows.height and width != self.width:
            raise column.fault(f"has vectors of {width} numbers, expected {self.width}")
        matrix = np.zeros((len(column.values), self.width + 1), np.float32)
        places = rows["row"].to_numpy()
        matrix[:, -1] = 1
        matrix[places, -1] = 0
        for begin in range(0, len(places), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            vectors = _matrix(column, rows[part], self.width)  # (part, width) float64
            if self.normalise:
                norms = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
                vectors = np.divide(vectors, norms, where=norms > 0, out=vectors)
            matrix[places[part], :-1] = vectors
        return Dense(matrix)


def fit_vectors(config: VectorsFeature, column: Column) -> Vectors:
    """Measure the width of vectors.

    Raises
    ------
    DataError
        If there is none, if two differ in width, or if a number is missing, infinite or beyond 32 bits.
    """
    rows, width = _lists(column)
    if not rows.height:
        raise column.fault("holds no vector at all; leave this feature away")
    return Vectors(name=config.name, column=config.read, width=width, normalise=config.normalise)


def _lists(column: Column) -> tuple[pl.DataFrame, int]:
    """Give the vectors that are there, as columns row: u32 and vector: list, and their width."""
    kind = column.values.dtype
    if kind == pl.Null:
        return pl.DataFrame(schema={"row": pl.UInt32, "vector": pl.List(pl.Float64)}), 0
    if not (isinstance(kind, pl.List | pl.Array) and kind.inner.is_numeric()):
        raise column.fault(f"is of type {kind}; vectors takes lists of numbers")
    rows = column.values.alias("vector").to_frame().with_row_index("row").drop_nulls()
    if isinstance(kind, pl.Array):
        rows = rows.with_columns(pl.col("vector").arr.to_list())
    widths = rows["vector"].list.len()
    if not rows.height:
        return rows, 0
    wrong = (widths != widths[0]) | (widths == 0)
    if wrong.any():
        at = int(wrong.arg_max() or 0)
        raise column.fault(f"a vector of {widths[at]} numbers, where the first has {widths[0]}", rows["row"][at])
    return rows, widths[0]


def _matrix(column: Column, rows: pl.DataFrame, width: int) -> NDArray[np.float64]:
    flat = rows["vector"].explode().cast(pl.Float64).fill_null(math.nan).to_numpy()
    matrix = flat.reshape(-1, width).copy()
    wrong = ~(np.abs(matrix) <= _LARGEST).all(axis=1)  # NaN, too
    if wrong.any():
        raise column.fault("a number is missing, infinite or beyond 32 bits", rows["row"][int(wrong.argmax())])
    return matrix
