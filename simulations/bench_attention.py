"""What each attention mechanism costs against the length of the history, in turn, on one thread."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from common.models.attention import MECHANISMS, Setting
from common.models.mixing import interval_buckets
from common.models.schema import AttentionConfig

LENGTHS = (50, 200, 800, 2000)
USERS, HEADS, WIDTH = 4, 2, 32
"""What is mixed: `USERS` histories, `HEADS` of `WIDTH` numbers each."""
ENOUGH = 2.0
"""Seconds after which a mechanism is not tried with longer histories."""
_CONFIG: TypeAdapter[Any] = TypeAdapter(AttentionConfig)


def bench_attention(repeats: int, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Milliseconds of a forward and backward pass.

    Parameters
    ----------
    repeats : int
        Of each; mechanisms take turns, and the median counts.
    report : callable
        Told what is under way.

    Returns
    -------
    list of dict
        Per mechanism ``kind``, and ``milliseconds`` by length, none where it would take too long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken: dict[str, dict[int, list[float]]] = {kind: {} for kind in MECHANISMS}
        for length in LENGTHS:
            report(f"histories of {length:,}")
            for _ in range(repeats):
                for kind, times in taken.items():
                    slowest = max((statistics.median(t) for at, t in times.items() if at < length), default=0.0)
                    if slowest < ENOUGH:
                        times.setdefault(length, []).append(_once(kind, length))
    finally:
        torch.set_num_threads(threads)
    return [
        {"kind": kind, "milliseconds": {n: 1e3 * statistics.median(times[n]) if n in times else None for n in LENGTHS}}
        for kind, times in taken.items()
    ]


def _once(kind: str, length: int) -> float:
    """Seconds of a forward and backward pass."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    config = _CONFIG.validate_python({"kind": kind})
    query, key, value = (drawn(USERS, HEADS, length, WIDTH) for _ in range(3))
    own: dict[str, Tensor] = {}
    buckets = None
    if kind == "additive":
        own = {"vector": drawn(HEADS, WIDTH)}
    if kind == "time-aware":
        own = {"interval_key": drawn(config.buckets, WIDTH), "interval_value": drawn(config.buckets, WIDTH)}
        times = torch.randint(10**7, (USERS, length), generator=draw).sort().values
        buckets = interval_buckets(times, torch.full((USERS,), length), config.buckets)
    setting = Setting(config, own, None, buckets)
    began = time.perf_counter()
    mixed = MECHANISMS[kind](query, key, value, setting)
    torch.autograd.grad(mixed.sum(), [query, key, value, *own.values()])
    return time.perf_counter() - began
