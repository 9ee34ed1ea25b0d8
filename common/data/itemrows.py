"""Which rows of the table an item's vector is the weighted sum of: its features', as a prepared folder keeps them.

A categorical value is a row, and so is each number of a dense feature, by which its row is multiplied. All of it is
public: it follows from the catalogue, and every device has the same.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config import Experiment
from common.data import folder as disk
from common.data.catalogue import Catalogue
from common.data.encoders.encoded import Bags
from common.errors import DataError
from common.files import read_json, write_json

if TYPE_CHECKING:
    from common.data.features import Features

FITTED = "features.json"
"""What `common.data.features.apply` needs to encode items that come later."""
_ARRAYS = {"feature_offsets": np.int64, "feature_rows": np.int64, "feature_weights": np.float32}
FILES = (FITTED, *(f"{name}.npy" for name in _ARRAYS))
"""All that a folder has of it."""


class ItemRows(NamedTuple):
    """A sparse matrix from rows to items, by items (CSR)."""

    offsets: NDArray[np.int64]
    """Item i is made of ``[offsets[i], offsets[i+1])``, ``(I+1,)``."""
    rows: NDArray[np.int64]
    """``(nnz,)``, each below `size`."""
    weights: NDArray[np.float32]
    """``(nnz,)``."""
    groups: tuple[int, ...]
    """Number of rows of each feature, in their order."""

    @property
    def size(self) -> int:
        """Number of rows there are."""
        return sum(self.groups)


def rows_of(features: "Features") -> ItemRows:
    """Number the rows, feature after feature, and say what each item is made of."""
    owners, rows, weights = [], [], []
    groups: list[int] = []
    for feature in features:
        begin = sum(groups)
        if isinstance(feature.values, Bags):
            bags = feature.values
            owners.append(np.repeat(np.arange(features.items), np.diff(bags.offsets)))
            rows.append(begin + bags.values)
            weights.append(bags.weights)
            groups.append(bags.size)
        else:
            item, column = np.nonzero(feature.values.matrix)
            owners.append(item)
            rows.append(begin + column)
            weights.append(feature.values.matrix[item, column])
            groups.append(feature.values.matrix.shape[1])
    nothing = [np.zeros(0, dtype=np.int64)]
    owner = np.concatenate([*nothing, *owners])
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=features.items))]).astype(np.int64)
    values = np.concatenate([np.zeros(0, dtype=np.float32), *weights]).astype(np.float32)
    return ItemRows(offsets, np.concatenate([*nothing, *rows])[order], values[order], tuple(groups))


def save(folder: Path, features: "Features") -> dict[str, Any]:
    """Write them into a folder that is being made; give what its manifest shall say."""
    made = rows_of(features)
    arrays: tuple[NDArray[Any], ...] = made.offsets, made.rows, made.weights
    for name, array in zip(_ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    write_json(folder / FITTED, features.fitted())
    return {"digest": features.digest, "rows": made.groups}


def load(folder: Path) -> ItemRows | None:
    """Read what a prepared folder knows of its items' features; none where it knows nothing.

    Raises
    ------
    DataError
        Where the arrays are damaged, or do not fit one another or the manifest.
    """
    manifest = disk.read_manifest(folder)
    told = manifest.get("features")
    if told is None:
        return None
    arrays = []
    for name, dtype in _ARRAYS.items():
        try:
            array = np.load(folder / f"{name}.npy", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, and a damaged one can raise nearly anything
            raise disk.damaged(folder, f"{name}.npy: {error}") from None
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            raise disk.damaged(folder, f"{name}.npy is not a list of {np.dtype(dtype)}")
        arrays.append(array)
    offsets, rows, weights = arrays
    groups = tuple(told["rows"])
    sound = (
        len(offsets) == manifest["kept"]["items"] + 1
        and offsets[0] == 0
        and offsets[-1] == len(rows) == len(weights)
        and (np.diff(offsets) >= 0).all()
        and (not len(rows) or (rows.min() >= 0 and rows.max() < sum(groups)))
        and np.isfinite(weights).all()
    )
    if not sound:
        raise disk.damaged(folder, "its items' features do not fit one another")
    return ItemRows(offsets, rows, weights, groups)


def known(folder: Path) -> dict[str, int]:
    """How many items of a prepared folder each feature knows something of, by its name.

    Raises
    ------
    DataError
        As in `load`, or where what was fitted is damaged.
    """
    made = load(folder)
    if made is None:
        return {}
    fitted = read_json(folder / FITTED, DataError)
    try:
        return dict(
            zip((column["name"] for column in fitted["columns"]), told(made, fitted).sum(0).tolist(), strict=True)
        )
    except (TypeError, KeyError, ValueError) as fault:
        raise disk.damaged(folder, f"{FITTED} does not fit its features") from fault


def told(made: ItemRows, fitted: Any) -> NDArray[np.bool_]:
    """Whether each feature knows something of each item, ``(I, F)``; from `FITTED`, which may be of anything."""
    items, begin, found = len(made.offsets) - 1, 0, []
    owners = np.repeat(np.arange(items), np.diff(made.offsets))
    for column, size in zip(fitted["columns"], made.groups, strict=True):
        dense = column["kind"] in {"numeric", "vectors"}  # whose last row says that the item is missing
        begin, inside = begin + size, (made.rows >= begin) & (made.rows < begin + size)
        marked = np.bincount(owners[made.rows == begin - 1 if dense else inside], minlength=items) > 0
        found.append(~marked if dense else marked)
    return np.stack(found, 1)


def table_rows(experiment: Experiment, catalogue: Catalogue) -> int:
    """Rows of the table that a model of a catalogue's items has; reads the manifest at most.

    Raises
    ------
    DataError
        Where the catalogue knows nothing of its items.
    """
    if experiment.model.items == "own":
        return catalogue.items
    known = disk.read_manifest(catalogue.folder).get("features")
    if known is None:
        raise unknown_features(catalogue.folder)
    groups, own = known["rows"], experiment.model.items == "both"
    gates = len(groups) + own if experiment.model.fusion == "gate" else 0
    return int(sum(groups)) + catalogue.items * own + gates


def unknown_features(folder: Path) -> DataError:
    """Build the error for a prepared folder that knows nothing of its items."""
    return DataError(f"{folder}: knows no features of its items; prepare it with data.features")
