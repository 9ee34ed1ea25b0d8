"""A number an item, such as a price."""

import math
from typing import Annotated, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.data.attributes import Column
from common.data.encoders.encoded import Dense
from common.features import NumericFeature
from common.section import Section

_EDGES = 1024
_LARGEST = float(np.finfo(np.float32).max)


class Scale(Section):
    """A fitted numeric feature."""

    kind: Literal["numeric"] = "numeric"
    """Selects this encoder."""
    name: str
    """Name of the feature."""
    column: str
    """Column that is read."""
    scaling: Literal["standard", "log", "quantile", "none"]
    """As in `NumericFeature`."""
    pattern: str | None = None
    """As in `NumericFeature`."""
    mean: float = 0.0
    """Mean of the values, for `log` of their logarithms."""
    deviation: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the same; 0 of a column that is constant, which is encoded as 0."""
    edges: tuple[float, ...] = ()
    """For `quantile`: at most 1,024 of the values, evenly over their order, ascending."""

    @model_validator(mode="after")
    def _sound(self) -> "Scale":
        if self.scaling == "quantile" and (not self.edges or list(self.edges) != sorted(self.edges)):
            raise ValueError("edges must ascend")
        return self

    def encode(self, column: Column) -> Dense:
        """Encode numbers as (I, 2): the scaled value, and whether it is missing. Errors as in `fit_scale`."""
        values = _numbers(column.matched(self.pattern))
        missing = np.isnan(values)
        values[missing] = 0.0
        if self.scaling == "quantile":
            # The middle between the share below and the share not above: ties share a place, the median is near 0.
            # Rather than to a normal law: it is bounded, so that one item cannot dominate, and has room at both ends.
            below, upto = (np.searchsorted(self.edges, values, side) for side in ("left", "right"))
            scaled = (below + upto) / len(self.edges) - 1
            scaled[missing] = 0.0
        else:
            scaled = _log(values) if self.scaling == "log" else values
            if self.scaling != "none":
                with np.errstate(over="ignore"):
                    scaled = (scaled - self.mean) / self.deviation if self.deviation else np.zeros_like(scaled)
            scaled[missing] = self.mean if self.scaling == "none" else 0.0
        bounded = np.clip(scaled, -_LARGEST, _LARGEST)  # an absurd number stays finite
        return Dense(np.stack([bounded, missing], axis=1).astype(np.float32))


def fit_scale(config: NumericFeature, column: Column) -> Scale:
    """Measure numbers; missing ones (null, NaN, blank text) take no part.

    Raises
    ------
    DataError
        If there is none, if a text is no number, if one is infinite, or if they are too large to be squared.
    """
    column = column.matched(config.pattern)
    values = _numbers(column)
    values = values[~np.isnan(values)]
    if not len(values):
        raise column.fault("holds no number at all; leave this feature away")
    mean, deviation, edges = 0.0, 1.0, tuple[float, ...]()
    if config.scaling == "quantile":
        edges = _spread(values)
    else:
        mean, deviation = _moments(_log(values) if config.scaling == "log" else values, column)
    return Scale(
        name=config.name,
        column=config.read,
        scaling=config.scaling,
        pattern=config.pattern,
        mean=mean,
        deviation=deviation,
        edges=edges,
    )


def _spread(values: NDArray[np.float64]) -> tuple[float, ...]:
    ranks = np.linspace(0, len(values) - 1, min(len(values), _EDGES)).round().astype(np.int64)
    return tuple(np.sort(values)[ranks].tolist())


def _moments(values: NDArray[np.float64], column: Column) -> tuple[float, float]:
    if values.min() == values.max():  # not by the deviation, which rounding can keep from 0
        return float(values[0]), 0.0
    try:  # exact sums, so that no order of items and no machine changes a bit
        mean = math.fsum(values) / len(values)
        return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values.tolist()) / len(values))
    except OverflowError:
        raise column.fault("has numbers too large to be squared; scaling=log or quantile takes them") from None


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sign(values) * np.log1p(np.abs(values))


def _numbers(column: Column) -> NDArray[np.float64]:
    """Values as (I,) float64, NaN where missing."""
    values = column.values
    if values.dtype == pl.String:
        words = values.str.strip_chars()
        values = words.cast(pl.Float64, strict=False)
        wrong = (values.is_null() & (words != "")).fill_null(False)
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise column.fault(f"{words[row]!r} is no number; mend it, or make the feature categorical", row)
    elif not (values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null)):
        raise column.fault(f"is of type {values.dtype}; numeric takes numbers")
    numbers = values.cast(pl.Float64).fill_null(math.nan).to_numpy().copy()
    infinite = np.isinf(numbers)
    if infinite.any():
        raise column.fault("is infinite; leave it empty or give a number", int(infinite.argmax()))
    return numbers
