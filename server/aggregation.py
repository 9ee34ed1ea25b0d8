"""From replies to one mean update: check each reply, then one indexed sum in the order of the users."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from common.config import FederationConfig
from common.models.weights import Weights
from common.wire import METRICS, UPDATE, number, whole_number
from server.roster import Roster

LARGEST = 1e6
"""Largest norm of an update; beyond it training on the device has diverged, or the numbers are made up."""


class Reply(NamedTuple):
    """A checked update."""

    user: int
    events: int
    loss: float
    table: NDArray[np.float32]
    body: NDArray[np.float32]
    rows: NDArray[np.int32] | None

    @property
    def bytes(self) -> int:
        """Bytes of its arrays."""
        return self.table.nbytes + self.body.nbytes + (0 if self.rows is None else self.rows.nbytes)


class Rejected(Exception):  # noqa: N818 - a verdict on one reply, never raised further
    """A reply that must not enter the sum, and why."""


def check(message: Message, weights: Weights, roster: Roster) -> Reply:
    """Read one reply and hold it against the global weights.

    Parameters
    ----------
    message : Message
        A train reply.
    weights : Weights
        The global weights; shapes and catalogue size come from them.
    roster : Roster
        Who lives where.

    Raises
    ------
    Rejected
        Where the client refused or speaks for a user of another node, or where a tensor is missing, misshapen, of a
        wrong type, not finite or larger than `LARGEST`.
    """
    if message.has_error():
        raise Rejected(f"refused: {message.error.reason or 'no reason given'}")
    try:
        reply = _read(message)
    except Exception as fault:  # numpy reads headers as Python, so a stranger's bytes can raise nearly anything
        raise Rejected(f"malformed: {type(fault).__name__}") from fault
    if not roster.hosts(message.metadata.src_node_id, reply.user):
        raise Rejected("speaks for a user of another node")
    items, dim = weights.table.shape
    if reply.table.dtype != np.float32 or reply.body.dtype != np.float32:
        raise Rejected("wrong dtype")
    if reply.rows is not None and not _valid_rows(reply.rows, items):
        raise Rejected("item rows outside the catalogue or repeated")
    rows = items if reply.rows is None else len(reply.rows)
    if reply.body.shape != tuple(weights.body.shape) or reply.table.shape != (rows, dim):
        raise Rejected("wrong shape")
    if not 0 <= reply.events < 2**31 or not np.isfinite(reply.loss):
        raise Rejected("impossible event count or loss")
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vdot(reply.body, reply.body) + np.vdot(reply.table, reply.table)
    if not squares <= LARGEST**2:  # nor is NaN
        raise Rejected("not finite or too large")
    return reply


def _read(message: Message) -> Reply:
    records, metrics = message.content.array_records[UPDATE], message.content.metric_records[METRICS]
    arrays = {name: np.asarray(array.numpy()) for name, array in records.items()}  # an archive becomes an odd array
    return Reply(
        whole_number(metrics, "user"),
        whole_number(metrics, "events"),
        float(number(metrics, "loss")),
        arrays["table"],
        arrays["body"],
        arrays.get("rows"),
    )


def _valid_rows(rows: NDArray[np.int32], items: int) -> bool:
    if rows.dtype != np.int32 or rows.ndim != 1:
        return False
    return len(rows) == 0 or (rows.min() >= 0 and rows.max() < items and len(np.unique(rows)) == len(rows))


def admit(replies: Iterable[Message], weights: Weights, roster: Roster) -> tuple[list[Reply], Counter[str]]:
    """Checked replies in the order of their users, and how many were left out for each reason."""
    good: dict[int, Reply] = {}
    rejected: Counter[str] = Counter()
    for message in replies:
        try:
            reply = check(message, weights, roster)
            if reply.user in good:
                raise Rejected("second reply of one user")
            good[reply.user] = reply
        except Rejected as verdict:
            rejected[str(verdict)] += 1
    return [good[user] for user in sorted(good)], rejected


def weigh(replies: list[Reply], config: FederationConfig) -> NDArray[np.float32]:
    """Weight of each reply in the mean, ``(C,)``: its events, or one."""
    if config.weighting == "uniform":
        return np.ones(len(replies), dtype=np.float32)
    return np.array([reply.events for reply in replies], dtype=np.float32)


def weighted_sum(replies: list[Reply], importance: NDArray[np.float32], weights: Weights) -> Weights:
    """Σ importance · update over the replies, of the global weights' shapes.

    Sparse replies cost one indexed sum over all their rows together; the order is that of the replies, so no order of
    arrival changes a bit.
    """
    scale = torch.from_numpy(importance)
    body = scale @ torch.from_numpy(np.stack([reply.body for reply in replies]))  # (P,)
    table = torch.zeros_like(weights.table)
    sparse = [
        (reply.rows, reply.table, float(w))
        for reply, w in zip(replies, importance, strict=True)
        if reply.rows is not None
    ]
    if sparse:
        rows, values, scales = zip(*sparse, strict=True)
        each = torch.tensor(scales).repeat_interleave(torch.tensor([len(part) for part in rows]))
        flat = torch.from_numpy(np.concatenate(values)).mul_(each.unsqueeze(1))
        table.index_add_(0, torch.from_numpy(np.concatenate(rows)).long(), flat)
    for i, reply in enumerate(replies):
        if reply.rows is None:
            table.add_(torch.from_numpy(reply.table), alpha=float(importance[i]))
    return Weights(table, body)
