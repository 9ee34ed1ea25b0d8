"""A node that hosts several users: one message in, their cohort, one reply out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from client.device import Device
from client.handlers import HANDLERS
from common.config import FederationConfig
from common.wire import METRICS, MODEL, ROUND, UPDATE, Pending, arrays, of_user, pending_of, record, whole_numbers

MOST_REASONS = 20
"""Different reasons for refusals that a node tells."""


def addressed(message: Message) -> list[int] | None:
    """The users of this node whom a message addresses; none where it does not name any, being for the node's only one.

    Raises
    ------
    KeyError, TypeError
        Where the message holds something else.
    """
    told = record(message.content, ROUND, ConfigRecord)
    return whole_numbers(told, "users") if "users" in told else None


def handle(kind: str, message: Message, users: Sequence[int], device: Device) -> Message:
    """Answer for all users that a message addresses.

    Parameters
    ----------
    kind : str
        ``train`` or ``evaluate``.
    message : Message
        For this node.
    users : sequence of int
        Distinct.
    device : Device
        Their data.

    Returns
    -------
    Message
        What the single replies say, as lists in the order of ``user``; refusals are left out and their reasons told.
        Updates are summed up, each by its weight, or with `federation.shards` ``users`` each under its user's name.
    """
    replies = HANDLERS[kind]([message] * len(users), users, device)
    good = [reply.content for reply in replies if not reply.has_error()]
    reasons = [reply.error.reason or "no reason given" for reply in replies if reply.has_error()]
    content = RecordDict({METRICS: _side_by_side([record(each, METRICS, MetricRecord) for each in good])})
    if kind == "train" and good:
        updates = [record(each, UPDATE, ArrayRecord) for each in good]
        if device.experiment.federation.shards == "sum":
            importance = _importance(device.experiment.federation, content)
            shape = record(message.content, MODEL, ArrayRecord)["table"].shape
            content[UPDATE] = _summed(updates, importance, shape)
        else:
            told = record(content, METRICS, MetricRecord)["user"]
            for user, update in zip(told, updates, strict=True):  # type: ignore[arg-type]
                content[of_user(UPDATE, int(user))] = update
    why = Counter(reasons).most_common(MOST_REASONS)
    content[ROUND] = ConfigRecord({"reasons": [reason for reason, _ in why], "times": [times for _, times in why]})
    return Message(content, reply_to=message)


def _side_by_side(metrics: list[MetricRecord]) -> MetricRecord:
    """One record of lists; a number that some lack, such as a rank where nothing is held out, is NaN there."""
    names = dict.fromkeys(name for each in metrics for name in each)
    columns: dict[str, Any] = {name: [each.get(name, float("nan")) for each in metrics] for name in names}
    return MetricRecord(columns)


def _importance(config: FederationConfig, content: RecordDict) -> list[float]:
    told = record(content, METRICS, MetricRecord)
    weighed = told["events"] if config.weighting == "events" else [1.0] * len(told["user"])  # type: ignore[arg-type]
    return [float(weight) for weight in weighed]  # type: ignore[union-attr]


def _summed(updates: list[ArrayRecord], importance: list[float], shape: tuple[int, ...]) -> ArrayRecord:
    """Σ importance · update, of the table's rows that anybody touched."""
    waiting: dict[Pending, list[tuple[int, float]]] = {}
    for update, weight in zip(updates, importance, strict=True):
        source = pending_of(update)
        if source is None:
            raise TypeError("an update does not wait in this process")
        waiting.setdefault(source[0], []).append((source[1], weight))
    table, touched, body = torch.zeros(*shape), np.zeros(shape[0], dtype=bool), None
    for source_, members in waiting.items():
        spread = np.zeros(len(source_), dtype=np.float32)
        for i, weight in members:
            spread[i] = weight
        rows, part = source_.summed(spread)
        if rows is None:
            table.add_(part.table)
            touched[:] = True
        else:
            table.index_add_(0, torch.from_numpy(rows), part.table)
            touched[rows] = True
        body = part.body if body is None else body + part.body
    return _packed(table, touched, body)


def _packed(table: Tensor, touched: "np.ndarray[tuple[int], np.dtype[np.bool_]]", body: Tensor | None) -> ArrayRecord:
    if body is None:
        raise ValueError("nobody's update")
    if touched.all():
        return arrays(table=table.numpy(), body=body.numpy())
    rows = np.flatnonzero(touched)
    return arrays(table=table.numpy()[rows], body=body.numpy(), rows=rows.astype(np.int32))
