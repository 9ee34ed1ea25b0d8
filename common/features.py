"""The schema of public item features: what is known of an item besides who used it; see `common.data.features`.

Neither torch nor polars is imported here, as in `common.config`.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from common.section import Positive, Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]


class _Column(Section):
    """What features read from a column have in common."""

    name: Name
    """Name of the feature; no two share one."""
    column: str | None = None
    """Column of the source or the catalogue, such as `genres`; by default the feature's name."""

    @property
    def read(self) -> str:
        """Name of the column that is read."""
        return self.column or self.name


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as fault:
        raise ValueError(f"{pattern!r} is no regular expression ({fault})") from None
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; put the value, and nothing else, in parentheses")
    return pattern


class _Matched(_Column):
    """What features that may be a part of a text have in common."""

    pattern: Annotated[str, AfterValidator(_one_group)] | None = None
    """Regular expression with one group, which matches the value in a column of text: ``\\((\\d{4})\\)`` is the year
    in `Toy Story (1995)`. Of several matches the first counts; without one the value is unknown."""


class CategoricalFeature(_Matched):
    """One or several values an item, such as genres: text or whole numbers, or lists of them."""

    kind: Literal["categorical"]
    """Selects this feature."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Cuts a text into several values, such as `|`; a CSV holds no lists."""
    min_count: Positive = 1
    """Values that fewer items have count as one value, `rare`; so do values unknown so far, of items that come later.
    Where no value was rare, an unknown one counts as none."""
    max_values: Positive | None = None
    """Only so many values, the most frequent ones; the others count as `rare`."""


class NumericFeature(_Matched):
    """A number an item, such as a price; a missing one counts as the mean, with a second column that says so."""

    kind: Literal["numeric"]
    """Selects this feature."""
    scaling: Literal["standard", "log", "quantile", "none"] = "standard"
    """`standard`: mean 0, standard deviation 1. `log`: the same after log(1 + |x|), with x's sign, for prices and
    counts. `quantile`: the place among all items' values, from -1 to 1, which no outlier can stretch; missing is the
    median. `none`: as it is."""


class VectorsFeature(Section):
    """A vector an item, such as an encoder made of its picture or text."""

    kind: Literal["vectors"]
    """Selects this feature."""
    name: Name
    """Name of the feature; no two share one."""
    path: Annotated[str, Field(min_length=1)]
    """Parquet with the columns `item` and `vector` (lists of numbers), or `x.npy` of one row an item, with `x.items`
    beside it, one item's id a line. Absolute, or relative to $HUSHREC_DATA, or to the working directory."""
    normalise: bool = True
    """Scale each vector to length 1."""

    @property
    def read(self) -> str:
        """Name of the column that is read, where rows come as a table."""
        return self.name


class TextFeature(_Column):
    """Words of a text, such as the title: TF-IDF, then a truncated SVD (needs the `text` extra)."""

    kind: Literal["text"]
    """Selects this feature."""
    dim: Positive = 64
    """Width of the vectors."""
    min_count: Positive = 1
    """Words in fewer items' texts are left out."""
    max_words: Positive = 20_000
    """Only so many words, those in most items' texts."""


FeatureConfig = Annotated[
    CategoricalFeature | NumericFeature | VectorsFeature | TextFeature, Field(discriminator="kind")
]


class ItemFeatures(Section):
    """Which public features items have."""

    source: Annotated[str, Field(min_length=1)] | None = None
    """CSV, TSV or Parquet with a column `item` and others, or JSON of item to list of values (as S3-Rec's
    `item2attributes`; read as the column `attributes`). Where the catalogue has a column of the same name, this one
    counts. Absolute, or relative to $HUSHREC_DATA, or to the working directory."""
    columns: tuple[FeatureConfig, ...] = ()
    """The features."""

    @model_validator(mode="after")
    def _sound(self) -> "ItemFeatures":
        names = [feature.name for feature in self.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two features are called {twice[0]!r}; give one another name, and its column")
        return self
