"""One or several values an item, such as genres."""

from typing import Literal

import numpy as np
import polars as pl
from pydantic import model_validator

from common.data.attributes import Column
from common.data.encoders.encoded import Bags
from common.features import CategoricalFeature
from common.section import Section


class Vocabulary(Section):
    """A fitted categorical feature."""

    kind: Literal["categorical"] = "categorical"
    """Selects this encoder."""
    name: str
    """Name of the feature."""
    column: str
    """Column that is read."""
    separator: str | None
    """As in `CategoricalFeature`."""
    pattern: str | None = None
    """As in `CategoricalFeature`."""
    vocabulary: tuple[str, ...]
    """The values, that of most items first, ties by name."""
    rare: bool
    """Whether the last number, behind the vocabulary, stands for all other values; else these count as none."""

    @model_validator(mode="after")
    def _sound(self) -> "Vocabulary":
        if len(set(self.vocabulary)) < len(self.vocabulary):
            raise ValueError("vocabulary holds a value twice")
        return self

    def encode(self, column: Column) -> Bags:
        """Encode values; `DataError` if they are neither text nor lists of it nor whole numbers."""
        size, names = len(self.vocabulary), pl.Series(self.vocabulary, dtype=pl.String)
        numbers = pl.DataFrame({"value": names, "number": pl.Series(range(size), dtype=pl.Int64)})
        found = _values(column.matched(self.pattern), self.separator).join(numbers, on="value", how="left")
        if self.rare:
            found = found.with_columns(pl.col("number").fill_null(size))
        found = found.select("row", "number").drop_nulls().unique().sort("row", "number")
        counts = np.bincount(found["row"].to_numpy(), minlength=len(column.values))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        weights = (1 / np.repeat(counts, counts)).astype(np.float32)
        return Bags(offsets, found["number"].to_numpy(writable=True), weights, size + self.rare)


def fit_vocabulary(config: CategoricalFeature, column: Column) -> Vocabulary:
    """Count values.

    Raises
    ------
    DataError
        If there is none, if `min_count` leaves none, or if the column's type has no values.
    """
    column = column.matched(config.pattern)
    counts = _values(column, config.separator)["value"].value_counts().sort("count", "value", descending=[True, False])
    if counts.is_empty():
        raise column.fault("holds no value at all; leave this feature away")
    kept = counts.filter(pl.col("count") >= config.min_count).head(config.max_values or counts.height)
    if kept.is_empty():
        most = f"{counts['value'][0]!r}, the most frequent, has {counts['count'][0]}"
        raise column.fault(f"min_count={config.min_count} leaves no value ({most}); lower it")
    return Vocabulary(
        name=config.name,
        column=config.read,
        separator=config.separator,
        pattern=config.pattern,
        vocabulary=tuple(kept["value"]),
        rare=kept.height < counts.height,
    )


def _values(column: Column, separator: str | None) -> pl.DataFrame:
    """Distinct values of each item, as columns row: u32 and value: str; blank ones are none."""
    values, kind = column.values, column.values.dtype
    inner = kind.inner if isinstance(kind, pl.List | pl.Array) else kind
    if inner != pl.Null and not (inner.is_integer() or inner in (pl.String, pl.Categorical, pl.Enum, pl.Boolean)):
        raise column.fault(f"is of type {kind}; categorical takes text, whole numbers, or lists of them")
    rows = values.alias("value").to_frame().with_row_index("row")
    if inner is not kind:
        rows = rows.explode("value")
    rows = rows.with_columns(pl.col("value").cast(pl.String))
    if separator is not None:
        rows = rows.with_columns(pl.col("value").str.split(separator)).explode("value")
    return rows.with_columns(pl.col("value").str.strip_chars()).filter(pl.col("value") != "").unique()
