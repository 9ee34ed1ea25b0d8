"""Errors about unknown names, with the nearest known one."""

import difflib
from collections.abc import Sequence

from common.errors import DataError

_MANY = 100_000


def unknown(what: str, name: str, known: Sequence[str], count: int | None = None) -> DataError:
    """Build the error for a name that does not exist.

    Parameters
    ----------
    what : str
        What was looked for, such as ``"item"``; it opens the message.
    name : str
        The name that was not found.
    known : sequence of str
        The names that exist.
    count : int, optional
        How many things they name, where some have several names.

    Returns
    -------
    DataError
        To be raised by the caller; it names the nearest spelling, or else the first few known names.
    """
    # Ratcliff-Obershelp costs some 10 microseconds a name: among very many, only those that begin alike are compared.
    pool = known if len(known) <= _MANY else [other for other in known if other[:2] == name[:2]][:_MANY]
    close = difflib.get_close_matches(name, pool, n=1)
    if close:
        return DataError(f"no {what} {name!r}; did you mean {close[0]!r}?")
    shown = ", ".join(repr(other) for other in known[:5])
    return DataError(f"no {what} {name!r}; there are {len(known) if count is None else count}, such as {shown}")
