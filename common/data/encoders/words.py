"""Texts of items, such as titles, to vectors: TF-IDF, then a truncated SVD (latent semantic analysis).

Deerwester et al., JASIS 41(6), 1990. Only the SVD itself needs scikit-learn, and only where it is fitted: whoever has
the fitted values encodes a text with numpy alone.
"""

import base64
import binascii
import hashlib
import importlib
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.data.attributes import Column
from common.data.encoders.encoded import Dense
from common.errors import UsageError
from common.features import TextFeature
from common.section import Positive, Section

_BLOCK = 1 << 12
"""Rows at a time."""


class Weighted(NamedTuple):
    """TF-IDF of all items (CSR), each row of length 1 or empty.

    Attributes
    ----------
    offsets : (I+1,) int64
        Words of item i are ``[offsets[i], offsets[i+1])``.
    words : (nnz,) int64
        Numbers of the words, ascending inside an item.
    weights : (nnz,) float64
        Their weights.
    """

    offsets: NDArray[np.int64]
    words: NDArray[np.int64]
    weights: NDArray[np.float64]


class Components(Section):
    """The right singular vectors, one row each."""

    shape: tuple[Positive, Positive]
    """Number of vectors, which a small catalogue can keep below the feature's `dim`, and of words."""
    digest: str
    """First 16 hexadecimal digits of the sha256 of `values`' bytes."""
    values: str = Field(repr=False)
    """float32, little-endian, row after row, in base64."""

    @classmethod
    def of(cls, matrix: NDArray[np.float32]) -> "Components":
        """Pack a matrix."""
        packed = matrix.astype("<f4").tobytes()
        return cls(shape=matrix.shape, digest=_digest(packed), values=base64.b64encode(packed).decode())

    def matrix(self) -> NDArray[np.float32]:
        """Unpack the matrix."""
        packed = base64.b64decode(self.values)
        return np.frombuffer(packed, "<f4").reshape(self.shape).astype(np.float32)

    @model_validator(mode="after")
    def _sound(self) -> "Components":
        try:
            packed = base64.b64decode(self.values, validate=True)
        except binascii.Error:
            raise ValueError("values are not base64") from None
        if _digest(packed) != self.digest or len(packed) != 4 * self.shape[0] * self.shape[1]:
            raise ValueError("values do not match their shape and digest")
        return self


class Words(Section):
    """A fitted text feature."""

    kind: Literal["text"] = "text"
    """Selects this encoder."""
    name: str
    """Name of the feature."""
    column: str
    """Column that is read."""
    dim: Positive
    """Width of the vectors."""
    words: tuple[str, ...]
    """The words, that of most items first, ties by name."""
    idf: tuple[float, ...]
    """Inverse document frequency of each word, log((1 + I) / (1 + its items)) + 1."""
    svd: Components
    """From words to vectors."""

    @model_validator(mode="after")
    def _agree(self) -> "Words":
        if not len(self.words) == len(self.idf) == self.svd.shape[1] or self.svd.shape[0] > self.dim:
            raise ValueError("words, idf and svd disagree in size")
        return self

    def encode(self, column: Column) -> Dense:
        """Encode texts as (I, dim), rows of length 1; zeros where no word is known. `DataError` if they are no text."""
        rows = _weighted(_cut(column), self.words, np.array(self.idf), len(column.values))
        components = np.ascontiguousarray(self.svd.matrix().T, dtype=np.float64)  # (words, k)
        matrix = np.zeros((len(column.values), self.dim), np.float32)
        for begin in range(0, len(matrix), _BLOCK):
            bounds = rows.offsets[begin : begin + _BLOCK + 1]
            part, filled = slice(bounds[0], bounds[-1]), np.flatnonzero(np.diff(bounds))
            if not len(filled):
                continue
            # One sum a row, in the order of its words, and no matrix product: so a row's bits depend on no other row.
            terms = rows.weights[part, None] * components[rows.words[part]]
            sums = np.add.reduceat(terms, bounds[filled] - bounds[0], axis=0)
            norms = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
            sums = np.divide(sums, norms, where=norms > 0, out=sums)
            matrix[begin + filled, : sums.shape[1]] = sums
        return Dense(matrix)


def fit_words(config: TextFeature, column: Column) -> Words:
    """Count words and decompose their TF-IDF.

    The decomposition's last bits may differ from machine to machine. Where that matters, one machine fits, and all
    others get its `common.data.features.Features.fitted`.

    Raises
    ------
    DataError
        If the column holds no text, or `min_count` leaves no word.
    UsageError
        If scikit-learn is not installed.
    """
    cut = _cut(column)
    counts = cut.group_by("word").agg(pl.len().alias("items")).sort("items", "word", descending=[True, False])
    if counts.is_empty():
        raise column.fault("holds no words at all; leave this feature away")
    counts = counts.filter(pl.col("items") >= config.min_count).head(config.max_words)
    if counts.is_empty():
        raise column.fault(f"min_count={config.min_count} leaves no word; lower it")
    words, size = tuple(counts["word"]), len(column.values)
    idf = np.log((1 + size) / (1 + counts["items"].to_numpy())) + 1
    matrix = decompose(_weighted(cut, words, idf, size), (size, len(words)), config.dim)
    svd = Components.of(matrix)
    return Words(name=config.name, column=config.read, dim=config.dim, words=words, idf=tuple(idf.tolist()), svd=svd)


def decompose(rows: Weighted, shape: tuple[int, int], dim: int) -> NDArray[np.float32]:
    """Find the first right singular vectors, (k, words) with k at most `dim`.

    Raises
    ------
    UsageError
        If scikit-learn is not installed.
    """
    try:
        decomposition = importlib.import_module("sklearn.decomposition")
        sparse = importlib.import_module("scipy.sparse")
    except ModuleNotFoundError:
        raise UsageError("item features of kind text need scikit-learn: pip install 'hushrec[text]'") from None
    matrix = sparse.csr_matrix((rows.weights, rows.words, rows.offsets), shape=shape)
    fitted = decomposition.TruncatedSVD(n_components=min(dim, *shape), n_iter=7, random_state=0).fit(matrix)
    components: NDArray[np.float32] = fitted.components_.astype(np.float32)
    return components


def _cut(column: Column) -> pl.DataFrame:
    """Words of two letters or more, in lower case, as columns row: u32, word: str and count: u32."""
    if column.values.dtype not in (pl.String, pl.Null):
        raise column.fault(f"is of type {column.values.dtype}; text takes text")
    rows = column.values.cast(pl.String).str.to_lowercase().alias("word").to_frame().with_row_index("row")
    rows = rows.with_columns(pl.col("word").str.extract_all(r"\b\w\w+\b")).explode("word").drop_nulls()
    return rows.group_by("row", "word").agg(pl.len().alias("count"))


def _weighted(cut: pl.DataFrame, words: tuple[str, ...], idf: NDArray[np.float64], size: int) -> Weighted:
    numbers = pl.DataFrame({"word": words, "number": range(len(words))}, {"word": pl.String, "number": pl.Int64})
    found = cut.join(numbers, on="word").sort("row", "number")
    row, word = found["row"].to_numpy(), found["number"].to_numpy()
    weights = found["count"].to_numpy() * idf[word]
    norms = np.sqrt(np.bincount(row, np.square(weights), minlength=size))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=size))]).astype(np.int64)
    return Weighted(offsets, word, weights / norms[row])


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:16]
