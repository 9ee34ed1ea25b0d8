"""From replies to one mean update: check each reply, then one indexed sum in the order of the users."""

from collections.abc import Mapping
from math import nan
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from common.config import FederationConfig
from common.models.weights import Weights
from common.wire import LARGEST, METRICS, UPDATE, Pending, number, payload_bytes, pending_of, record, whole_number
from server.exchange import Rejected, one_line
from server.roster import Roster


class Explicit(NamedTuple):
    """An update by its numbers."""

    table: NDArray[np.float32]
    body: NDArray[np.float32]
    rows: NDArray[np.int32] | None

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return sum(part.nbytes for part in self if part is not None)


class Reply(NamedTuple):
    """A checked update."""

    user: int
    events: int
    """1 where the device does not tell."""
    loss: float
    """NaN where the device does not tell."""
    update: Explicit | tuple[Pending, int]
    """Its numbers, or where in this process they wait to be computed."""
    bytes: int
    """Size of its arrays."""
    below: int = 1
    """Whether the update was within the clipping norm before it was clipped, 0 or 1."""
    participations: int = 0
    """Rounds that the user has taken part in, this one included, where devices keep accounts; else 0."""


def check(message: Message, weights: Weights, roster: Roster, silent: bool = False) -> Reply:
    """Read one user's reply and hold it against the global weights.

    Parameters
    ----------
    message : Message
        A train reply.
    weights : Weights
        The global weights; shapes and catalogue size come from them.
    roster : Roster
        Who lives where.
    silent : bool
        Whether devices tell neither losses nor counts of events; what one says of them is not looked at then.

    Raises
    ------
    Rejected
        Where the client refused or speaks for a user of another node, or where a tensor is missing, misshapen, of a
        wrong type, not finite or larger than `LARGEST`.
    """
    if message.has_error():
        raise Rejected(f"refused: {one_line(message.error.reason)}")
    try:
        arrays = record(message.content, UPDATE, ArrayRecord)
        said = facts_of(record(message.content, METRICS, MetricRecord), silent)
        # What this process computes itself has been checked by its maker, and is not computed one by one.
        update = pending_of(arrays) or explicit(arrays)
        size = update.size if isinstance(update, Explicit) else payload_bytes(arrays)
    except Exception as fault:  # numpy reads headers as Python, so a stranger's bytes can raise nearly anything
        raise Rejected(f"malformed: {type(fault).__name__}") from fault
    return checked(said, update, size, message.metadata.src_node_id, weights, roster, silent)


class Facts(NamedTuple):
    """What a device says beside its update."""

    user: int
    events: int
    loss: float
    below: int
    participations: int


def facts_of(metrics: Mapping[str, object], silent: bool) -> Facts:
    """Read them.

    Raises
    ------
    KeyError, TypeError
        Where one is missing or of another kind.
    """
    user, events, loss, participations = whole_number(metrics, "user"), 1, nan, 0
    if silent:
        participations = whole_number(metrics, "participations")
    else:
        events, loss = whole_number(metrics, "events"), float(number(metrics, "loss"))
    return Facts(user, events, loss, whole_number(metrics, "below") if "below" in metrics else 1, participations)


def checked(
    said: Facts,
    update: Explicit | tuple[Pending, int],
    size: int,
    node: int,
    weights: Weights,
    roster: Roster,
    silent: bool,
) -> Reply:
    """A reply of what a user says and sends; errors as in `check`."""
    if not roster.hosts(node, said.user):
        raise Rejected("speaks for a user of another node")
    if not 0 <= said.events < 2**31 or not (silent or np.isfinite(said.loss)) or said.below not in {0, 1}:
        raise Rejected("impossible event count or loss")
    if not 0 <= said.participations < 2**31:
        raise Rejected("impossible number of participations")
    if isinstance(update, Explicit):
        check_numbers(update, weights)
    return Reply(said.user, said.events, said.loss, update, size, said.below, said.participations)


def explicit(records: ArrayRecord) -> Explicit:
    """An update's numbers, unchecked."""
    arrays = {name: np.asarray(array.numpy()) for name, array in records.items()}  # an archive becomes an odd array
    return Explicit(arrays["table"], arrays["body"], arrays.get("rows"))


def norm(update: Explicit) -> float:
    """Its L2 norm; infinite or NaN where a number is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(np.float64(np.vdot(update.body, update.body)) + np.vdot(update.table, update.table)))


def summed_numbers(update: Explicit, scale: float) -> tuple[NDArray[np.int64] | None, Weights]:
    """Rows and numbers of an update times a factor, as `Pending.summed` gives them."""
    rows = None if update.rows is None else update.rows.astype(np.int64)
    parts = (torch.from_numpy(np.asarray(part, dtype=np.float32) * np.float32(scale)) for part in update[:2])
    return rows, Weights(*parts)


def check_numbers(update: Explicit, weights: Weights, largest: float = LARGEST) -> None:
    """Hold an update's numbers against the global weights and the largest norm; errors as in `check`."""
    table, body, rows = update
    items, dim = weights.table.shape
    if table.dtype != np.float32 or body.dtype != np.float32:
        raise Rejected("wrong dtype")
    if rows is not None and not _valid_rows(rows, items):
        raise Rejected("item rows outside the catalogue or repeated")
    if body.shape != tuple(weights.body.shape) or table.shape != (items if rows is None else len(rows), dim):
        raise Rejected("wrong shape")
    if not norm(update) <= largest:  # nor is NaN
        raise Rejected("not finite or too large")


def _valid_rows(rows: NDArray[np.int32], items: int) -> bool:
    if rows.dtype != np.int32 or rows.ndim != 1:
        return False
    return len(rows) == 0 or (rows.min() >= 0 and rows.max() < items and len(np.unique(rows)) == len(rows))


def weigh(replies: list[Reply], config: FederationConfig) -> NDArray[np.float32]:
    """Weight of each reply in the mean, ``(C,)``: its events, or one."""
    if config.weighting == "uniform":
        return np.ones(len(replies), dtype=np.float32)
    return np.array([reply.events for reply in replies], dtype=np.float32)


def norms_of(replies: list[Reply]) -> NDArray[np.float64]:
    """L2 norm of each update, ``(C,)``."""
    waiting = {id(reply.update[0]): reply.update[0] for reply in replies if not isinstance(reply.update, Explicit)}
    known = {name: updates.norms for name, updates in waiting.items()}
    return np.array(
        [
            norm(reply.update) if isinstance(reply.update, Explicit) else known[id(reply.update[0])][reply.update[1]]
            for reply in replies
        ]
    )


def weighted_sum(replies: list[Reply], importance: NDArray[np.float32], weights: Weights) -> Weights:
    """Σ importance · update over the replies, of the global weights' shapes.

    The order is that of the replies, so no order of arrival changes a bit. Updates that wait in this process are summed
    by their maker; sparse ones that came over a network in one indexed sum over all their rows together.
    """
    total = Weights(*(torch.zeros_like(part) for part in weights))
    waiting: dict[Pending, list[tuple[int, float]]] = {}
    explicit: list[tuple[Explicit, float]] = []
    for reply, weight in zip(replies, importance.tolist(), strict=True):
        if isinstance(reply.update, Explicit):
            explicit.append((reply.update, weight))
        else:
            updates, i = reply.update
            waiting.setdefault(updates, []).append((i, weight))
    for updates, members in waiting.items():
        _add(total, *updates.summed(_spread(members, len(updates))))
    if explicit:
        _add_explicit(total, explicit)
    return total


def _spread(members: list[tuple[int, float]], size: int) -> NDArray[np.float32]:
    """Importance of each of `size` users, 0 for those whose reply isn't there."""
    spread = np.zeros(size, dtype=np.float32)
    for i, weight in members:
        spread[i] += weight
    return spread


def _add(total: Weights, rows: NDArray[np.int64] | None, part: Weights) -> None:
    total.body.add_(part.body)
    if rows is None:
        total.table.add_(part.table)
    else:
        total.table.index_add_(0, torch.from_numpy(rows), part.table)


def _add_explicit(total: Weights, updates: list[tuple[Explicit, float]]) -> None:
    scale = torch.tensor([weight for _, weight in updates])
    body = scale @ torch.from_numpy(np.stack([update.body for update, _ in updates]))
    rows, tables, scales = [np.zeros(0, dtype=np.int32)], [np.zeros((0, total.table.shape[1]), dtype=np.float32)], []
    for update, weight in updates:
        if update.rows is None:
            total.table.add_(torch.from_numpy(update.table), alpha=weight)
        else:
            rows.append(update.rows)
            tables.append(update.table)
            scales.append(np.full(len(update.rows), weight, dtype=np.float32))
    values = np.concatenate(tables) * np.concatenate([*scales, np.zeros(0, dtype=np.float32)])[:, None]
    _add(total, np.concatenate(rows).astype(np.int64), Weights(torch.from_numpy(values), body))
