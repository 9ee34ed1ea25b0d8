import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.encoders.numeric import fit_scale
from common.features import NumericFeature
from tests.support.columns import column


def numeric(values, scaling="standard", dtype=pl.Float64):
    scale = fit_scale(NumericFeature(kind="numeric", name="x", scaling=scaling), column(values, dtype))
    return scale, scale.encode(column(values, dtype)).matrix


def test_standard():
    _, matrix = numeric([1.0, None, 3.0, math.nan])
    assert matrix.tolist() == [[-1, 0], [0, 1], [1, 0], [0, 1]]
    assert matrix.dtype == np.float32


def test_log_keeps_the_sign():
    scale, matrix = numeric([0.0, math.e - 1, 1 - math.e, None], "log")
    assert scale.mean == 0
    assert scale.deviation == pytest.approx(math.sqrt(2 / 3))
    assert matrix[:, 0].tolist() == pytest.approx([0, math.sqrt(1.5), -math.sqrt(1.5), 0])


def test_quantile_by_hand():
    scale, matrix = numeric([10.0, 20.0, 20.0, 1e300, None], "quantile")
    assert matrix.tolist() == [[-0.75, 0], [0, 0], [0, 0], [0.75, 0], [0, 1]]
    assert scale.encode(column([-5.0, 15.0, math.nan, 1e301])).matrix[:, 0].tolist() == [-1, -0.5, 0, 1]


def test_quantile_of_many_keeps_few_edges():
    scale, matrix = numeric([float(n) for n in range(5000)], "quantile")
    assert len(scale.edges) == 1024
    assert np.abs(matrix[:, 0] - np.linspace(-1, 1, 5000)).max() < 0.002


def test_no_scaling_fills_with_the_mean():
    assert numeric([1.0, None, 3.0], "none")[1].tolist() == [[1, 0], [2, 1], [3, 0]]


@pytest.mark.parametrize("scaling", ["standard", "log", "quantile"])
def test_a_constant_column_is_zero(scaling):
    scale, matrix = numeric([0.1] * 7 + [None], scaling)
    assert matrix[:, 0].tolist() == [0] * 8
    assert np.isfinite(scale.encode(column([5.0, -1e308])).matrix).all()


def test_numbers_as_text_and_truths():
    assert numeric([" 1", "3.0", "", None], dtype=pl.String)[1].tolist() == [[-1, 0], [1, 0], [0, 1], [0, 1]]
    assert numeric([True, False], dtype=pl.Boolean)[1].tolist() == [[1, 0], [-1, 0]]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.randoms())
def test_no_order_of_items_changes_the_fit(values, random):
    shuffled = random.sample(values, len(values))
    for scaling in ("standard", "log", "quantile"):
        assert numeric(values, scaling)[0] == numeric(shuffled, scaling)[0]
