"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it.

A fault of the file system becomes one line that names the path and the mend.
"""

import errno
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from common.errors import HushrecError, StateError

_MENDS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission; change the permissions or choose another folder",
    errno.EPERM: "no permission; change the permissions or choose another folder",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "is a folder, not a file; check the path",
    errno.EEXIST: "exists already; remove it or choose another name",
}


@contextmanager
def explained(path: Path, error: type[HushrecError] = StateError) -> Iterator[None]:
    """Turn an `OSError` inside the block into one line with the path and the mend.

    Parameters
    ----------
    path : Path
        The path to name in the message.
    error : type of HushrecError, optional
        What to raise: `DataError` for the user's data, `StateError` (default) for our own files.

    Raises
    ------
    HushrecError
        Of type `error`, in place of an `OSError`.
    """
    try:
        yield
    except OSError as fault:
        code = fault.errno or 0
        raise error(f"{path}: {_MENDS.get(code) or fault.strerror or fault}") from fault


@contextmanager
def atomic(path: Path, error: type[HushrecError] = StateError) -> Iterator[Path]:
    """Write a file wholly or not at all.

    Parameters
    ----------
    path : Path
        Where the file shall stand; its folder must exist. A reader sees the old file or the new one, never a part.
    error : type of HushrecError, optional
        What an `OSError` becomes (see `explained`).

    Yields
    ------
    Path
        A new path in the same folder, with the same suffix, to write to. It is removed if anything at all is raised.

    Raises
    ------
    HushrecError
        Of type `error`, if the file system refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    with explained(path, error):
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:  # an interrupt, too, must leave nothing behind
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # the file is in place; some network file systems cannot flush a folder
        _flush(path.parent)


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a run directory for this process, so that two never write into one.

    What a process that was killed has left half-written is removed.

    Parameters
    ----------
    folder : Path
        It exists.
    wait : float
        Seconds that another process is waited for.

    Raises
    ------
    StateError
        Where another process holds it. The lock dies with its process, however that ends.
    """
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + wait
    try:
        while True:
            try:
                flock(descriptor, LOCK_EX | LOCK_NB)
                break
            except OSError as fault:
                if time.monotonic() >= end:
                    text = f"{folder}: another hushrec process is running here; wait for it or stop it"
                    raise StateError(text) from fault
            time.sleep(0.2)
        for half_written in folder.glob(".????????????.*"):  # by `atomic`, in a process that was killed
            half_written.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, error: type[HushrecError] = StateError) -> None:
    """Write a whole file atomically; arguments and errors as in `atomic`."""
    with atomic(path, error) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object, error: type[HushrecError] = StateError) -> None:
    """Write `json_text(value)`, indented, atomically; arguments and errors as in `atomic`."""
    write_bytes(path, (json_text(value, indent=2) + "\n").encode(), error)


def read_json(path: Path, error: type[HushrecError] = StateError) -> Any:
    """Read a JSON file.

    Raises
    ------
    HushrecError
        Of type `error`, if the file is missing, unreadable or not JSON.
    """
    with explained(path, error):
        content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except ValueError as fault:
        raise error(f"{path}: not a JSON file, perhaps truncated ({fault}); restore or remove it") from fault


def append_line(path: Path, text: str, *, sync: bool = False, error: type[HushrecError] = StateError) -> None:
    """Append one line, wholly or not at all, and flush it.

    Parameters
    ----------
    path : Path
        The file; made if it is missing.
    text : str
        The line, without its end.
    sync : bool, optional
        Also wait until the disk has it, as a ledger must.
    error : type of HushrecError, optional
        What an `OSError` becomes (see `explained`).

    Raises
    ------
    ValueError
        If `text` has more than one line.
    HushrecError
        Of type `error`, if the file system refuses; the file is then as before.
    """
    if "\n" in text:
        raise ValueError("one line, not several")
    with explained(path, error), open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        line = (text + "\n").encode()
        try:
            while line:  # one turn, unless the disk fills up in the middle of the line; the next turn then raises
                line = line[file.write(line) :]
            if sync:
                os.fsync(file.fileno())
                if not before:  # of a new file in a folder that was not flushed a power cut may leave nothing
                    _flush(path.parent)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def sha256(path: Path, error: type[HushrecError] = StateError) -> str:
    """Hexadecimal sha256 of a file's content; errors as in `explained`."""
    with explained(path, error), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value: object, indent: int | None = None) -> str:
    """JSON that every reader accepts.

    Parameters
    ----------
    value : object
        Mappings, sequences, numbers, strings, paths, numpy scalars and arrays, nested at will. What is not finite
        becomes ``null``, because JSON knows neither NaN nor infinity.
    indent : int, optional
        Spaces a level; by default all is one line.

    Returns
    -------
    str
        Keys stay in their order.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> object:
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, without importing numpy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
