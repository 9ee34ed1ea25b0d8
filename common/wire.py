"""What travels between server and clients, and how it is packed into Flower records.

| direction | record | holds |
|---|---|---|
| to a client | `MODEL` arrays | `table` (I, D), `body` (P,) |
| | `ROUND` config | `round`, `split`, `experiment` (its hash) |
| from train | `UPDATE` arrays | `table` (R, D), `body` (P,), `rows` (R,) int32 unless the whole table moved |
| | `METRICS` metrics | `user`, `events`, `loss` |
| from evaluate | `METRICS` metrics | `user`, `rank`, `rank_sampled`; no rank where nothing is held out |
| from query | `METRICS` metrics | `user`, `items` |
"""

from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from numpy.typing import NDArray

from common.models.weights import Weights

MODEL, UPDATE, ROUND, METRICS = "model", "update", "round", "metrics"
REFUSED = 1
"""Error code of a reply from a client that did not train or evaluate; the reason says why."""


class LazyArray(Array):
    """A Flower Array that turns into bytes only when somebody asks for them.

    In one process nobody does, which saves two copies and about 160 µs a tensor; over a network it serialises like its
    parent. The memory is shared: neither side may write into it.
    """

    def __init__(self, values: NDArray[np.generic]):
        self.dtype = str(values.dtype)
        self.shape = tuple(values.shape)
        self.stype = "numpy.ndarray"
        self.__dict__["values"] = values

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's own format, made on demand and not kept."""
        buffer = BytesIO()
        np.save(buffer, self.__dict__["values"], allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> NDArray[np.generic]:
        """The shared values themselves."""
        values: NDArray[np.generic] = self.__dict__["values"]
        return values

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Pickled, as between Ray's processes, it is a plain Array: its class cannot be found by its borrowed name."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


LazyArray.__qualname__ = "Array"  # Flower writes the class's name into what it sends, and looks it up on arrival


def arrays(**values: NDArray[np.generic]) -> ArrayRecord:
    """A Flower record of named arrays that share memory with the arguments."""
    record = ArrayRecord()
    for name, value in values.items():
        record[name] = LazyArray(value)
    return record


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


def number(metrics: MetricRecord, name: str) -> float:
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


def whole_number(metrics: MetricRecord, name: str) -> int:
    """One whole number of a metrics record; errors as in `number`."""
    value = number(metrics, name)
    if not isinstance(value, int):
        raise TypeError(f"{name} is not a whole number")
    return value


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of the arrays' values in a record, without Flower's framing."""
    return sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in record.values())
