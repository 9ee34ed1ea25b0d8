"""Columns of made-up items, as `common.data.attributes.gather` gives them."""

import numpy as np
import polars as pl

from common.data.attributes import Column


def column(values, dtype=None):
    """Column ``x`` of items ``i0``, ``i1`` …"""
    return Column(
        pl.Series("x", values, dtype, strict=False), pl.Series([f"i{n}" for n in range(len(values))]), "f.csv"
    )


def bags(values):
    """What `Bags` hold, a list an item."""
    return [values.values[a:b].tolist() for a, b in zip(values.offsets[:-1], values.offsets[1:], strict=True)]


def exact_svd(rows, shape, dim):
    """Stands for scikit-learn's SVD, so that all the rest is tested without it."""
    dense = np.zeros(shape)
    for row, (a, b) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        dense[row, rows.words[a:b]] = rows.weights[a:b]
    return np.linalg.svd(dense, full_matrices=False)[2][:dim].astype(np.float32)
