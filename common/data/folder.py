"""A prepared data set on disk: one folder of flat arrays, complete or not there at all.

``manifest.json`` is written last and the folder gets its name last, so that a half-written one is never seen::

    manifest.json      what was read, from which files, with which options, and which optional arrays there are
    items.npy          (E,) int32    all users' events, user after user, in time order
    times.npy          (E,) int64    when; where the source has no times, the place in the file's order
    offsets.npy        (U+1,) int64  events of user u are [offsets[u], offsets[u+1])
    train_end.npy      (U,) int64    training events of u are [offsets[u], train_end[u])
    validation.npy     (U,) int64    place of the held-out event in `items`, or -1
    test.npy           (U,) int64    the same
    users.parquet      user: str
    catalogue.parquet  item: str, and title: str, genres: list[str], domain: str where known
    behaviours.npy     (E,) int8     optional; names in the manifest
    ratings.npy        (E,) float32  optional
    causes.npy         (E,) int32    optional, synthetic data only (see `common.data.synthetic`)
    domains.npy        (I,) int8     optional, of the items; names in the manifest
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from common.errors import DataError
from common.files import read_json

FORMAT = 2
"""Version of the layout; part of the digest, so that a change makes every folder anew."""
MANIFEST = "manifest.json"
"""What the folder holds; written last."""
CATALOGUE = "catalogue.parquet"
"""The items, which everybody may know."""
USERS = "users.parquet"
"""The users' ids."""
ARRAYS: dict[str, type[np.generic]] = {
    "items": np.int32,
    "times": np.int64,
    "offsets": np.int64,
    "train_end": np.int64,
    "validation": np.int64,
    "test": np.int64,
}
"""Types of the arrays that every folder has."""
EXTRAS: dict[str, type[np.generic]] = {"behaviours": np.int8, "ratings": np.float32, "causes": np.int32}
"""Types of the optional arrays."""
DOMAINS = "domains"
"""The one optional array by item, not by event."""
_TYPES: dict[str, type[np.generic]] = ARRAYS | EXTRAS | {DOMAINS: np.int8}


def damaged(folder: Path, why: str) -> DataError:
    """Build the error for a prepared folder that cannot be used."""
    return DataError(f"prepared data {folder} is damaged ({why}); delete it and it will be made anew")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a prepared folder's manifest.

    Raises
    ------
    DataError
        If it is missing, is not JSON, or has another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DataError(f"{folder} is no prepared data set: it has no {MANIFEST}")
    manifest = read_json(path, DataError)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(folder, f"{MANIFEST} is not of format {FORMAT}")
    kept, extras = manifest.get("kept"), manifest.get("extras")
    if (
        not {"digest", "read"} <= manifest.keys()
        or not isinstance(kept, dict)
        or any(type(kept.get(name)) is not int or kept[name] < 0 for name in ("users", "items", "events"))
        or not isinstance(extras, list)
        or any(not isinstance(extra, str) or extra not in EXTRAS for extra in extras)
    ):
        raise damaged(folder, f"{MANIFEST} is incomplete")
    return manifest


def load_array(folder: Path, name: str, size: int | None = None) -> NDArray[Any]:
    """Memory-map one array, checked for type and, where given, size.

    Raises
    ------
    DataError
        If the file is missing, truncated, of another type or of another size.
    """
    dtype = _TYPES[name]
    try:
        array = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy parses the header as Python, and a damaged one can raise nearly anything
        raise damaged(folder, f"{name}.npy: {error}") from None
    if array.dtype != dtype or array.ndim != 1 or (size is not None and len(array) != size):
        expected = f"{np.dtype(dtype)} ({'any' if size is None else size},)"
        raise damaged(folder, f"{name}.npy is {array.dtype} {array.shape}, expected {expected}")
    return array


class Appender:
    """A one-dimensional ``.npy`` file that grows, for data larger than memory.

    The header is written again at the end; numpy pads it so that any length fits.
    """

    def __init__(self, folder: Path, name: str):
        self._dtype = np.dtype(_TYPES[name])
        self._file = (folder / f"{name}.npy").open("w+b")
        self._length = 0
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        npy.write_array_header_1_0(self._file, header)

    def append(self, values: NDArray[Any]) -> None:
        """Add values at the end, cast to the array's type."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += len(values)

    def close(self) -> None:
        """Write the final length and close the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()


@contextmanager
def being_made(target: Path) -> Iterator[Path]:
    """Give a draft folder that becomes `target` when the block ends well, and vanishes when it does not.

    If another process has made the same folder meanwhile, that one stays.

    Raises
    ------
    DataError
        If the disk does not let it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            draft = Path(work) / target.name
            draft.mkdir()
            yield draft
            for path in [*draft.iterdir(), draft]:
                _fsync(path)
            try:
                draft.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            _fsync(target.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; HUSHREC_CACHE names another place"
        ) from None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
