"""What travels between server and clients, and how it is packed into Flower records.

| direction | record | holds |
|---|---|---|
| to a client | `MODEL` arrays | `table` (I, D), `body` (P,) |
| | `ROUND` config | `round`, `split`, `experiment` (its hash); `users`, where several live there |
| from train | `UPDATE` arrays | `table` (R, D), `body` (P,), `rows` (R,) int32 unless the whole table moved |
| | `METRICS` metrics | `user`, `events`, `loss` |
| from evaluate | `METRICS` metrics | `user`, `rank`, `rank_sampled`, `rank_personal`; none where nothing is held out |
| from query | `METRICS` metrics | `first`, `users` (who lives there), `population`, `items`, `rows` of the table |
| | `ROUND` config | `catalogue` (its version) |

A node that is asked for several users replies with lists in `METRICS`, and its `UPDATE` is the weighted sum of their
updates, or there is an ``UPDATE-user`` of each; `ROUND` says why users refused (`reasons`) and how many (`times`).
"""

from collections.abc import Callable, Mapping
from io import BytesIO
from math import prod
from typing import Protocol, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from common.models.weights import Weights

MODEL, UPDATE, ROUND, METRICS = "model", "update", "round", "metrics"
RANKS = "rank", "rank_sampled", "rank_personal"
"""Metrics of a ranking, by the fields of `common.metrics.Ranking`."""
REFUSED = 1
"""Error code of a reply from a client that did not train or evaluate; the reason says why."""


LARGEST = 1e6
"""Largest norm of an update; beyond it training on the device has diverged, or the numbers are made up."""


R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


class Pending(Protocol):
    """Updates of several users that live in this process: single ones, or a weighted sum, are computed when asked for.

    In one process the server needs no more than the sum, which may be far cheaper than all single updates.
    """

    counts: NDArray[np.int64]
    """Rows that each user sends, ``(C,)``."""
    whole: bool
    """Whether these rows are the whole table."""

    @property
    def norms(self) -> NDArray[np.float64]:
        """L2 norm of each whole update, ``(C,)``."""

    def __len__(self) -> int:
        """Number of users, C."""

    def rows(self, i: int) -> NDArray[np.int32]:
        """Catalogue indices of the i-th user's rows."""

    def one(self, i: int) -> Weights:
        """Change of the i-th user's rows ``(R, D)`` and of the body ``(P,)``."""

    def summed(self, importance: NDArray[np.float32]) -> tuple[NDArray[np.int64] | None, Weights]:
        """Σ importance · update, importance ``(C,)``, 0 leaves a user out.

        Catalogue indices of the sum's table rows, none for the whole table; and these rows and the body.
        """


class LazyArray(Array):
    """A Flower Array whose values, and whose bytes, are made only when somebody asks for them.

    In one process nobody asks for bytes, which saves two copies and about 160 µs a tensor; over a network it serialises
    like its parent. The memory is shared: neither side may write into it.

    Parameters
    ----------
    make : callable
        Gives the values.
    shape, dtype
        Theirs.
    pending : tuple of Pending and int, optional
        Where these values are part of the i-th of several updates.
    """

    def __init__(
        self,
        make: Callable[[], NDArray[np.generic]],
        shape: tuple[int, ...],
        dtype: str,
        pending: tuple[Pending, int] | None = None,
    ):
        # Not by attributes, whose setter keeps books on what was changed: 5 µs each, three arrays a client and round.
        self.__dict__.update(
            dtype=dtype, shape=shape, stype="numpy.ndarray", _is_dirty=True, make=make, pending=pending
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format, made on demand and not kept."""
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> NDArray[np.generic]:
        """The values themselves."""
        values: NDArray[np.generic] = self.__dict__["make"]()
        return values

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Pickled, as between Ray's processes, it is a plain Array: its class cannot be found by its borrowed name."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


LazyArray.__qualname__ = "Array"  # Flower writes the class's name into what it sends, and looks it up on arrival


Q = TypeVar("Q", ArrayRecord, MetricRecord, RecordDict)


def assembled(empty: Q, entries: Mapping[str, object]) -> Q:
    """A Flower record of entries of our own making, without the check of each, which takes 6 to 14 µs a record.

    Parameters
    ----------
    empty : record
        One of the kind that is wanted; left as it is.
    entries : mapping
        Its entries, of the types that the kind allows.
    """
    record = empty.copy()
    record.__dict__["_data"] = dict(entries)
    return record


NO_ARRAYS, NO_METRICS, NO_RECORDS = ArrayRecord(), MetricRecord(), RecordDict()
"""What `assembled` starts from."""


def arrays(**values: NDArray[np.generic]) -> ArrayRecord:
    """A Flower record of named arrays that share memory with the arguments."""
    record = ArrayRecord()
    for name, value in values.items():
        record[name] = LazyArray(lambda value=value: value, tuple(value.shape), str(value.dtype))  # type: ignore[misc]
    return record


def pending_update(updates: Pending, i: int, body: tuple[int, ...], dim: int) -> ArrayRecord:
    """The i-th of several updates as a Flower record that computes nothing until it is read or sent.

    Parameters
    ----------
    updates : Pending
        All of them.
    i : int
        Which.
    body : tuple of int
        Shape of the body.
    dim : int
        Width of the table.
    """
    count = int(updates.counts[i])

    def table() -> NDArray[np.float32]:
        values: NDArray[np.float32] = updates.one(i).table.numpy()
        return values

    def rest() -> NDArray[np.float32]:
        values: NDArray[np.float32] = updates.one(i).body.numpy()
        return values

    waiting = {} if updates.whole else {"rows": LazyArray(lambda: updates.rows(i), (count,), "int32", (updates, i))}
    waiting["table"] = LazyArray(table, (count, dim), "float32", (updates, i))
    waiting["body"] = LazyArray(rest, body, "float32", (updates, i))
    return assembled(NO_ARRAYS, waiting)


def pending_of(record: ArrayRecord) -> tuple[Pending, int] | None:
    """Where a record's update waits to be computed in this process; none where it came over a network.

    Nor where anything in the record was exchanged, which is then read like a stranger's.
    """
    sources = [array.__dict__.get("pending") if isinstance(array, LazyArray) else None for array in record.values()]
    first: tuple[Pending, int] | None = sources[0] if sources else None
    if first is None or any(source != first for source in sources):
        return None
    return first if len(sources) == (2 if first[0].whole else 3) else None


def pack(weights: Weights) -> ArrayRecord:
    """Weights as a Flower record, sharing memory."""
    return arrays(table=weights.table.detach().numpy(), body=weights.body.detach().numpy())


def unpack(record: ArrayRecord) -> Weights:
    """Weights from a Flower record; float32, sharing memory where they came from this process.

    Raises
    ------
    KeyError
        Where a tensor is missing.
    """
    return Weights(*(torch.as_tensor(_writable(record[name].numpy())) for name in Weights._fields))


def _writable(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Torch warns of read-only memory, such as a message's; copy only that."""
    return values if values.flags.writeable else values.copy()


def record(content: RecordDict, name: str, kind: type[R]) -> R:
    """One record of a message, of the given kind; `RecordDict`'s own views by kind copy all records at each call.

    Raises
    ------
    KeyError, TypeError
        Where it is missing or of another kind.
    """
    found = content[name]
    if not isinstance(found, kind):
        raise TypeError(f"{name} is no {kind.__name__}")
    return found


def number(metrics: Mapping[str, object], name: str) -> float:
    """One number of a metrics record; replies come from strangers, who may send a list or nothing.

    Raises
    ------
    KeyError, TypeError
        Where it is missing or no number.
    """
    value = metrics[name]
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is not a number")
    return value


def whole_number(metrics: Mapping[str, object], name: str) -> int:
    """One whole number of a metrics record; errors as in `number`."""
    value = number(metrics, name)
    if not isinstance(value, int):
        raise TypeError(f"{name} is not a whole number")
    return value


def whole_numbers(values: Mapping[str, object], name: str) -> list[int]:
    """A list of distinct whole numbers, none below 0; errors as in `number`."""
    value = values[name]
    if not isinstance(value, list) or any(type(each) is not int or each < 0 for each in value):
        raise TypeError(f"{name} is not a list of whole numbers")
    numbers: list[int] = list(value)
    if len(set(numbers)) < len(numbers):
        raise TypeError(f"{name} holds a number twice")
    return numbers


def of_user(name: str, user: int) -> str:
    """Name of one user's record in the reply of a node that hosts several."""
    return f"{name}-{user}"


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of the arrays' values in a record, without Flower's framing."""
    return sum(prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())
