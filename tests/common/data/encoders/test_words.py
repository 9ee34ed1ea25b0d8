import math
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from common.data.encoders import words
from common.errors import DataError, UsageError
from common.features import TextFeature
from tests.support.columns import column, exact_svd


def test_text(monkeypatch):
    monkeypatch.setattr(words, "decompose", exact_svd)
    texts = column(["Red shoe, red", "A blue shoe!", None, "hat", "hat X"])
    fitted = words.fit_words(TextFeature(kind="text", name="x", dim=5), texts)
    assert fitted.words == ("hat", "shoe", "blue", "red")
    assert fitted.idf == pytest.approx([math.log(6 / 3) + 1, math.log(6 / 3) + 1, math.log(3) + 1, math.log(3) + 1])
    matrix = fitted.encode(texts).matrix
    assert matrix.shape == (5, 5)
    assert np.linalg.norm(matrix, axis=1).tolist() == pytest.approx([1, 1, 0, 1, 1], abs=1e-6)
    assert not matrix[:, 4].any()  # four words span four dimensions
    shoe, red = math.log(2) + 1, 2 * (math.log(3) + 1)
    cosine = shoe * shoe / (math.hypot(shoe, red) * math.hypot(shoe, red / 2))
    assert (matrix @ matrix.T)[0].tolist() == pytest.approx([1, cosine, 0, 0, 0], abs=1e-6)  # nothing is cut off
    assert not fitted.encode(column(["nothing known"])).matrix.any()
    monkeypatch.setattr(words, "_BLOCK", 2)
    assert fitted.encode(texts).matrix.tobytes() == matrix.tobytes()


def test_text_without_scikit_learn_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r"hushrec\[text\]"):
        words.fit_words(TextFeature(kind="text", name="x"), column(["some words"]))


@pytest.mark.parametrize(("dim", "found"), [(2, 2), (500, 5)])
def test_text_with_scikit_learn(dim, found):
    pytest.importorskip("sklearn")
    texts = column([f"film red{n % 3}" if n % 3 else "hat blue" for n in range(60)] + [None])  # of rank 3
    fitted = words.fit_words(TextFeature(kind="text", name="x", dim=dim), texts)
    assert fitted.svd.shape == (found, 5)
    assert fitted == words.fit_words(TextFeature(kind="text", name="x", dim=dim), texts)
    rows = words._weighted(words._cut(texts), fitted.words, np.array(fitted.idf), 61)
    expected, got = exact_svd(rows, (61, 5), dim), fitted.svd.matrix()
    assert got.T @ got == pytest.approx(expected.T @ expected, abs=1e-4)  # the same subspace


@pytest.mark.parametrize(("values", "message"), [([1], "is of type Int64; text takes text"), ([None, "!"], "no words")])
def test_no_text(values, message):
    with pytest.raises(DataError, match=message):
        words.fit_words(TextFeature(kind="text", name="x"), column(values))


def test_damaged_components(monkeypatch):
    monkeypatch.setattr(words, "decompose", exact_svd)
    fitted = words.fit_words(TextFeature(kind="text", name="x", dim=2), column(["red shoe", "hat"])).model_dump()
    svd = fitted["svd"]
    for broken in ({"values": svd["values"][:-8]}, {"values": "é"}, {"shape": (1, 3)}, {"digest": ""}):
        with pytest.raises(ValidationError, match="values"):
            words.Words.model_validate({**fitted, "svd": {**svd, **broken}})
    with pytest.raises(ValidationError, match="disagree"):
        words.Words.model_validate({**fitted, "idf": (1.0,)})
