import math

import numpy as np
import polars as pl
import pytest

from common.data.encoders import vectors
from common.data.encoders.vectors import fit_vectors
from common.errors import DataError
from common.features import VectorsFeature
from tests.support.columns import column


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [1.0]], r"item 'i1': a vector of 1 numbers, where the first has 2"),
        ([[1.0], [math.nan]], r"item 'i1': a number is missing, infinite"),
        ([None, [None]], r"item 'i1': a number is missing"),
        ([None, [1e39]], r"item 'i1': .*beyond 32 bits"),
        ([None, None], r"no vector at all"),
        ([[]], r"a vector of 0 numbers"),
    ],
)
def test_bad_vectors(rows, message):
    found = column(rows, pl.List(pl.Float64))
    with pytest.raises(DataError, match=message):
        fit_vectors(VectorsFeature(kind="vectors", name="x", path="p"), found).encode(found)


def test_another_width_than_fitted():
    fitted = fit_vectors(VectorsFeature(kind="vectors", name="x", path="p"), column([[1.0, 2.0]]))
    with pytest.raises(DataError, match=r"has vectors of 1 numbers, expected 2"):
        fitted.encode(column([[1.0]]))
    for nothing in (column([None, None]), column([None], pl.List(pl.Float32)), column([], pl.Array(pl.Float32, 9))):
        assert fitted.encode(nothing).matrix.tolist() == [[0, 0, 1]] * len(nothing.values)


def test_blocks_change_nothing(monkeypatch):
    found = column(np.random.default_rng(0).normal(size=(7, 3)))
    fitted = fit_vectors(VectorsFeature(kind="vectors", name="x", path="p"), found)
    whole = fitted.encode(found).matrix
    assert np.linalg.norm(whole, axis=1).tolist() == pytest.approx([1] * 7)
    monkeypatch.setattr(vectors, "_BLOCK", 2)
    assert fitted.encode(found).matrix.tobytes() == whole.tobytes()
