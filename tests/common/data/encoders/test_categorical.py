import polars as pl
import pytest

from common.data.encoders.categorical import fit_vocabulary
from common.features import CategoricalFeature
from tests.support.columns import bags, column


@pytest.mark.parametrize("option", [{"min_count": 2}, {"max_values": 1}])
def test_rare_values_become_one(option):
    column_ = column([["a", "b"], ["a"], ["c", "b2"], None, []])
    fitted = fit_vocabulary(CategoricalFeature(kind="categorical", name="x", **option), column_)
    assert (fitted.vocabulary, fitted.rare) == (("a",), True)
    encoded = fitted.encode(column_)
    assert (bags(encoded), encoded.size) == ([[0, 1], [0], [1], [], []], 2)
    assert bags(fitted.encode(column([["new", "newer"], ["a"]]))) == [[1], [0]]


def test_ties_go_by_name_and_an_unknown_value_counts_as_none():
    fitted = fit_vocabulary(CategoricalFeature(kind="categorical", name="x"), column([3, 10, None]))
    assert (fitted.vocabulary, fitted.rare) == (("10", "3"), False)
    assert bags(fitted.encode(column([4, 3, 10]))) == [[], [1], [0]]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([["x", "y"], None], pl.Array(pl.String, 2)),
        ([["x", "y"], None], pl.List(pl.Categorical)),
        ([[1, 2], [None, None]], pl.List(pl.UInt8)),
        ([[True, False], []], pl.List(pl.Boolean)),
    ],
)
def test_lists_of_any_kind(values, dtype):
    found = column(values, dtype)
    assert bags(fit_vocabulary(CategoricalFeature(kind="categorical", name="x"), found).encode(found)) == [[0, 1], []]
