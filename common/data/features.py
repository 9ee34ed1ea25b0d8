"""Public item features: fitted on the catalogue, encoded for training, and the same for items that come later.

Everything here follows from the catalogue and the files that the configuration names, never from users' events. So
every node may compute it for itself, and `Features.digest` tells whether all have the same.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from common.data.attributes import Column, gather
from common.data.catalogue import Catalogue
from common.data.encoders.categorical import Vocabulary, fit_vocabulary
from common.data.encoders.encoded import Bags, Dense
from common.data.encoders.numeric import Scale, fit_scale
from common.data.encoders.vectors import Vectors, fit_vectors
from common.data.encoders.words import Words, fit_words
from common.data.names import unknown
from common.errors import DataError
from common.features import ItemFeatures

FORMAT = 1
"""Version of the fitted values."""
Encoder = Annotated[Vocabulary | Scale | Vectors | Words, Field(discriminator="kind")]
"""What each kind of feature is fitted to."""
FITTERS: dict[str, Callable[[Any, Column], Vocabulary | Scale | Vectors | Words]] = {
    "categorical": fit_vocabulary,
    "numeric": fit_scale,
    "vectors": fit_vectors,
    "text": fit_words,
}
"""Every kind of feature; each fitter gets its section and the items' column."""
_ENCODERS: TypeAdapter[tuple[Vocabulary | Scale | Vectors | Words, ...]] = TypeAdapter(tuple[Encoder, ...])


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of all items.

    Attributes
    ----------
    encoder : Vocabulary, Scale, Vectors or Words
        What was fitted.
    values : Bags or Dense
        Bags where `kind` is ``categorical``, else Dense.
    """

    encoder: Vocabulary | Scale | Vectors | Words
    values: Bags | Dense

    @property
    def name(self) -> str:
        """Name in the configuration."""
        return self.encoder.name

    @property
    def kind(self) -> str:
        """Kind in the configuration."""
        return self.encoder.kind

    @property
    def vocabulary(self) -> list[str]:
        """Names of a categorical feature's values, by number; the rare one, which is the last, has none. Else empty."""
        return list(self.encoder.vocabulary) if isinstance(self.encoder, Vocabulary) else []

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The encoded arrays by name: ``offsets``, ``values`` and ``weights``, or ``matrix``."""
        if isinstance(self.values, Dense):
            return {"matrix": self.values.matrix}
        return {name: getattr(self.values, name) for name in ("offsets", "values", "weights")}


@dataclass(frozen=True, eq=False)
class Features:
    """All features of all items.

    Attributes
    ----------
    items : int
        Number of items.
    columns : tuple of Feature
        In the order of the configuration.
    """

    items: int
    columns: tuple[Feature, ...]

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, name: str) -> Feature:
        """Give the feature of that name; `KeyError` if there is none."""
        return {feature.name: feature for feature in self.columns}[name]

    def fitted(self) -> dict[str, Any]:
        """Everything that `apply` needs to encode other items alike; plain JSON, exact both ways."""
        return {"format": FORMAT, "columns": [feature.encoder.model_dump(mode="json") for feature in self.columns]}

    @cached_property
    def digest(self) -> str:
        """Fingerprint of all names, sizes and arrays: 16 hexadecimal digits of a sha256."""
        state = hashlib.sha256(f"{FORMAT} {self.items}".encode())
        for feature in self.columns:
            size = feature.values.size if isinstance(feature.values, Bags) else 0
            state.update(f"\n{feature.name} {feature.kind} {size}".encode())
            for name, array in feature.arrays().items():
                portable = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
                state.update(f"\n{name} {portable.dtype.str} {portable.shape} ".encode())
                state.update(portable.data)
        return state.hexdigest()[:16]


def fit(catalogue: Catalogue, config: ItemFeatures) -> Features:
    """Fit the features to the catalogue, and encode it.

    Parameters
    ----------
    catalogue : Catalogue
        The items; those that training leaves out are fitted on, too, for what is public of them is no secret.
    config : ItemFeatures
        The section.

    Raises
    ------
    DataError
        If a file or column is missing or not as it should be (see `common.data.attributes.gather`, `fit_vocabulary`,
        `fit_scale`, `fit_vectors` and `fit_words`); it names file, column, item where there is one, and the mend.
    UsageError
        If a text feature needs scikit-learn, which is not installed.
    """
    columns = gather(catalogue, config)
    encoders = [FITTERS[feature.kind](feature, columns[feature.name]) for feature in config.columns]
    return Features(catalogue.items, tuple(Feature(each, each.encode(columns[each.name])) for each in encoders))


def apply(fitted: dict[str, Any], rows: pl.DataFrame, place: str = "new items") -> Features:
    """Encode items with values fitted before; nothing is fitted anew.

    Parameters
    ----------
    fitted : dict
        From `Features.fitted`, maybe by way of JSON.
    rows : DataFrame
        One row an item, with each feature's column (for ``vectors``, a column of lists under the feature's name), and
        for messages ``item``.
    place : str, optional
        What to call them in messages.

    Returns
    -------
    Features
        Values unknown to a vocabulary count as rare, or as none where it has no rare value; unknown words as none.

    Raises
    ------
    DataError
        If `fitted` is damaged or of another format, or a column is missing or holds what `fit` would refuse.
    """
    if not isinstance(fitted, dict) or fitted.get("format") != FORMAT:
        raise DataError(f"fitted item features are not of format {FORMAT}; fit them anew")
    try:
        encoders = _ENCODERS.validate_python(fitted.get("columns"))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise DataError(f"fitted item features are damaged (columns.{at}: {first['msg']}); fit them anew") from None
    items = rows["item"].cast(pl.String) if "item" in rows.columns else pl.Series("item", range(rows.height))
    columns = []
    for encoder in encoders:
        if encoder.column not in rows.columns:
            raise DataError(f"{place}: {unknown('column', encoder.column, rows.columns)}")
        columns.append(Feature(encoder, encoder.encode(Column(rows[encoder.column], items, place))))
    return Features(rows.height, tuple(columns))
