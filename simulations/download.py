"""Fetch MovieLens from GroupLens, checked against a known checksum; nothing of it may lie in this repository.

F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4: 19:1-19:19. https://doi.org/10.1145/2827872
"""

import shutil
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from common.data.names import unknown
from common.errors import DataError
from common.files import sha256

URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
"""Where GroupLens keeps its archives."""
CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Trans. Interact. Intell. Syst. 5, 4, Article 19. https://doi.org/10.1145/2827872"
)
"""To be cited in publications that use any of the data sets."""
_TIMEOUT = 60  # seconds without a byte
_RESEARCH = "For research only, no commercial use without permission; no endorsement may be implied; cite: " + CITATION
_MEND = "or put the files there yourself and give data.path=... or HUSHREC_DATA"


class Source(NamedTuple):
    """A data set that can be fetched.

    Attributes
    ----------
    sha256 : str
        Checksum of the archive.
    licence : str
        Terms of use in short; the README inside the archive has them in full.
    """

    sha256: str
    licence: str


SOURCES = {
    "ml-100k": Source(
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        f"{_RESEARCH} No redistribution without separate permission.",
    ),
    "ml-1m": Source(
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        f"{_RESEARCH} No redistribution without separate permission.",
    ),
    "ml-latest-small": Source(
        "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        f"{_RESEARCH} Redistribution under the same terms is allowed.",
    ),
}
"""Every data set that `download` knows."""


def licence(name: str) -> str:
    """Terms of use of a data set in one paragraph, for the caller to show.

    Raises
    ------
    DataError
        If there is no such data set.
    """
    return _source(name).licence


def download(name: str, target: Path) -> Path:
    """Fetch a data set and unpack it.

    Parameters
    ----------
    name : str
        One of `SOURCES`.
    target : Path
        Folder for data sets, such as $HUSHREC_DATA; the data set becomes ``target/name``.

    Returns
    -------
    Path
        ``target/name``. It is either complete or not there.

    Raises
    ------
    DataError
        If there is no such data set, if it is there already, if the network or the disk fails, or if the archive is
        not the one that is known.
    """
    source, folder = _source(name), target / name
    if folder.exists():
        raise DataError(f"{folder} exists already; delete it to download it again, or give data.path={folder}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target) as work:
            archive = Path(work) / f"{name}.zip"
            _fetch(URL.format(name=name), archive)
            _check(archive, source.sha256)
            _unpack(archive, name, Path(work))
            (Path(work) / name).rename(folder)
    except (OSError, HTTPException) as error:  # time-outs and expired certificates are among the former
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(f"cannot download {name} to {target}: {reason}; try again, {_MEND}") from None
    return folder


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise unknown("data set to download", name, list(SOURCES))
    return SOURCES[name]


def _fetch(url: str, archive: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, archive.open("wb") as file:  # noqa: S310 - addresses of our own list
        shutil.copyfileobj(answer, file)


def _check(archive: Path, expected: str) -> None:
    found = sha256(archive, DataError)
    if found != expected:
        raise DataError(
            f"{archive.name} is cut short or not the known archive (sha256 {found[:12]}, expected {expected[:12]}); "
            f"try again, {_MEND}"
        )


def _unpack(archive: Path, name: str, work: Path) -> None:
    """Unpack members below ``name/`` and refuse an archive that holds any other."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.namelist():
                parts = Path(member).parts
                if Path(member).is_absolute() or ".." in parts or "\\" in member or parts[:1] != (name,):
                    raise DataError(f"{archive.name} holds {member!r}, outside {name}/; nothing was unpacked")
            packed.extractall(work)
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise DataError(f"{archive.name} cannot be unpacked ({error}); try again, {_MEND}") from None
