"""Messages out, replies in, until a deadline that no clock can be turned back on."""

import time
from collections.abc import Iterable

from flwr.app import Array, Message, RecordDict
from flwr.serverapp import Grid

LOST = frozenset({0, 3, 4, 5, 8})
"""Flower's error codes of replies that it makes itself for a node that is gone, or whose client died."""
ROOM = 2**14
"""Bytes that a user may say beside the numbers of its update: headers, names, reasons."""
FIRST_POLL, SLOWEST_POLL = 0.1, 2.0
"""Seconds between two looks for replies, at first and at last."""


class Rejected(Exception):  # noqa: N818 - a verdict on one reply, never raised further
    """A reply that must not be heard, and why."""


def exchange(grid: Grid, messages: Iterable[Message], deadline: float) -> list[Message]:
    """Send messages and collect what comes back in time.

    Flower's own `send_and_receive` looks every three seconds, and at the time of day, which may jump.

    Parameters
    ----------
    grid : Grid
        Where node ids are a `range` all nodes live in this process, and nobody can be late.
    messages : iterable of Message
        One or none per node and user.
    deadline : float
        Seconds until what is not there is left out.
    """
    if isinstance(grid.get_node_ids(), range):
        return list(grid.send_and_receive(messages, timeout=deadline))
    waiting = set(grid.push_messages(list(messages)))  # Flower iterates over them twice
    end, pause = time.monotonic() + deadline, FIRST_POLL
    replies: list[Message] = []
    while waiting:
        came = list(grid.pull_messages(waiting))
        replies += came
        waiting -= {reply.metadata.reply_to_message_id for reply in came}
        if not waiting or time.monotonic() >= end:
            break
        time.sleep(min(pause, max(end - time.monotonic(), 0.0)))
        pause = FIRST_POLL if came else min(2 * pause, SLOWEST_POLL)
    return replies


def answered(replies: Iterable[Message]) -> list[Message]:
    """Replies that come from nodes, not from Flower on behalf of nodes that are gone (as if from the SuperLink)."""
    return [reply for reply in replies if not (reply.has_error() and reply.error.code in LOST)]


def one_line(reason: str | None) -> str:
    """A stranger's reason, fit for a line of `metrics.jsonl`; of a long one, such as a traceback, both ends."""
    text = reason or ""
    if len(text) > 4000:
        text = f"{text[:1000]} {text[-3000:]}"
    text = " ".join("".join(each if each.isprintable() else " " for each in text).split()) or "no reason given"
    return text if len(text) <= 200 else f"{text[:60]} … {text[-137:]}"


def bounded(content: RecordDict, users: int, numbers: int = 0) -> None:
    """Hold a reply's size against what so many users could have to say, before any of it is read.

    Parameters
    ----------
    content : RecordDict
        As it came.
    users : int
        Users of the node who were asked.
    numbers : int
        How many numbers it may bring, 4 bytes each.

    Raises
    ------
    Rejected
        Where it is larger.
    """
    if _size(content) > 4 * numbers + (users + 1) * ROOM:
        raise Rejected("more bytes than its users could have to say")


def _size(content: RecordDict) -> int:
    total = 0
    for name, entries in content.items():
        total += len(name)
        for key, value in entries.items():
            sized = value.data if isinstance(value, Array) else value
            width = 8 if isinstance(sized, list) else 1
            total += len(key) + (width * len(sized) if isinstance(sized, bytes | str | list) else 8)
            total += sum(len(each) for each in sized if isinstance(each, bytes | str)) if isinstance(sized, list) else 0
    return total
