"""Items as people name them on a command line."""

import csv
from collections.abc import Iterable


def listed(text: str, known: Iterable[str]) -> list[str]:
    """Cut a text into names at its commas.

    Parameters
    ----------
    text : str
        Where it has quotes, they alone say which commas are part of a name (as in a line of CSV).
    known : iterable of str
        Ids and titles. One that has commas itself is one name as it stands, case and spaces at commas no matter; of
        several that begin alike the one with most commas.

    Returns
    -------
    list of str
        Names, known or not; blank ones are left away.
    """
    parts = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])]
    whole = {} if '"' in text or len(parts) < 2 else {_plain(name): name for name in known if "," in name}
    longest, found = 1 + max((name.count(",") for name in whole), default=0), []
    while parts:
        for count in range(min(longest, len(parts)), 0, -1):
            name = whole.get(_plain(",".join(parts[:count])))
            if name is not None or count == 1:
                found.append(parts[0] if name is None else name)
                del parts[:count]
                break
    return [name for name in found if name]


def _plain(name: str) -> str:
    return ",".join(part.strip() for part in name.casefold().split(","))
