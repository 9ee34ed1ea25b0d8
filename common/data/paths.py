"""Where data files are looked for; reads none, so that the server may ask, too."""

import os
from pathlib import Path

from common.errors import DataError


def resolve(path: str, key: str) -> Path:
    """Find a data path: absolute, or in $HUSHREC_DATA, or in the working directory.

    Parameters
    ----------
    path : str
        What the configuration says; a ``~`` is somebody's home.
    key : str
        Where it says so, such as ``data.path``.

    Raises
    ------
    DataError
        If it is nowhere; it names the places and the mend.
    """
    wanted = Path(os.path.expanduser(path))
    places = [Path.cwd()]
    if root := os.environ.get("HUSHREC_DATA"):
        places.insert(0, Path(os.path.expanduser(root)))
    if wanted.is_absolute():
        places = [Path("/")]
    for place in places:
        if os.path.exists(place / wanted):  # unlike Path.exists, False where a folder on the way is locked
            return place / wanted
    tried = " nor ".join(str(place / wanted) for place in places)
    download = "get it (hushrec data download), " if key == "data.path" else ""
    raise DataError(f"{key}: no {tried}; {download}set HUSHREC_DATA to the folder that holds it, or correct {key}")
