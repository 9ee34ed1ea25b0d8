"""Where the time of a round goes: named phases, each charged with its own time and not with that of phases inside it.

Always on, since a phase costs a microsecond and a round has a dozen. The account is this process's; phases of one
round do not run side by side.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _Account:
    """Seconds by phase, and the phases under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.mark = 0.0

    def charge(self) -> None:
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.mark
        self.mark = now


_account = _Account()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge the time inside to a name; a phase around it stands still meanwhile."""
    _account.charge()
    _account.open.append(name)
    try:
        yield
    finally:
        _account.charge()
        _account.open.pop()


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """Charge to a name the time that an iterable takes to make its items, not what is done with them."""
    iterator, end = iter(items), object()
    while True:
        with phase(name):
            item = next(iterator, end)
        if item is end:
            return
        yield item  # type: ignore[misc]


def drain() -> dict[str, float]:
    """Seconds by phase since the last call; the account begins anew."""
    seconds, _account.seconds = _account.seconds, {}
    return seconds
