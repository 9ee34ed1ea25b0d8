"""Before examples are trained on: one made-up batch against a naive loop, and no training on a mismatch.

Per-example gradients go wrong silently, in Opacus above all (see `client.opacus_module`), and a clip of wrong gradients
is no bound. Nothing here looks at anybody's events.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from client.batches import Windows
from client.examples import Examples, add_clipped
from client.problem import Problem, pose
from client.step import read_vectors, step_loss
from common.config import Experiment
from common.data.sequences import Sequences
from common.errors import StateError
from common.models.weights import Weights, initialise, named
from common.privacy.schema import ExampleLevel, on_device
from common.seeding import generator

ITEMS, TOLERANCE = 23, 1e-4
"""Catalogue of the made-up batch; largest difference over the largest number."""

Gradients = Callable[[Experiment, Weights, Problem], Weights]
"""Gradient of each example, ``(E, I, D)`` and ``(E, P)``, in one way or another."""


def self_test(experiment: Experiment, name: str, ours: Gradients) -> None:
    """Compare per-example gradients with a naive loop's.

    Batches of three segments, and of as many as a segment has positions, which is where Opacus confuses dimensions.

    Raises
    ------
    StateError
        Where they differ.
    """
    privacy = on_device(experiment.privacy)
    width = privacy.segment if isinstance(privacy, ExampleLevel) else 10
    weights = _weights(experiment)
    for count in (3, width - 1, 1):
        problem = _problem(experiment, count, width)
        try:
            expected, found = naive(experiment, weights, problem), ours(experiment, weights, problem)
        except (RuntimeError, AttributeError, IndexError, ValueError) as fault:  # some faults are not even silent
            raise StateError(
                f"{name}: per-example gradients cannot be computed ({fault}); nothing is trained"
            ) from fault
        gaps = [(a - b).abs().max() / a.abs().max() for a, b in zip(expected, found, strict=True)]
        gap = float(torch.stack(gaps).max())
        if not gap <= TOLERANCE:  # nor is NaN
            raise StateError(
                f"{name}: per-example gradients differ from a loop's by {gap:.1e} of the largest number; a clip would "
                "bound nothing, so nothing is trained. Another version of torch or opacus may be at fault"
            )


def naive(experiment: Experiment, weights: Weights, problem: Problem) -> Weights:
    """One backward pass per example on plain shared weights."""
    tables, bodies = [], []
    for e in range(len(problem.counts)):
        alone = _only(problem, e)
        here = Weights(*(part.clone().requires_grad_() for part in weights))
        rows = here.table if alone.rows is None else here.table[torch.from_numpy(alone.rows[0])]
        vectors = read_vectors(rows, alone, 0)
        loss = step_loss(experiment, vectors, named(experiment.model, here.body), alone, 0, 1)[0]
        table, body = torch.autograd.grad(loss, here)
        tables.append(table)
        bodies.append(body)
    return Weights(torch.stack(tables), torch.stack(bodies))


def stacked(experiment: Experiment, weights: Weights, problem: Problem) -> Weights:
    """As the vectorised engine has them: each example an owner of its own, with a bound that nothing reaches."""
    owner = np.arange(len(problem.counts))
    change = Weights(torch.zeros(len(owner), *weights.table.shape), torch.zeros(len(owner), len(weights.body)))
    add_clipped(experiment, weights, change, Examples(owner, problem), 1e9, 1.0, 1)
    return change


@lru_cache(maxsize=4)
def stacked_is_right(experiment: Experiment) -> None:
    """`self_test` of the vectorised engine, once in a process; errors as there."""
    self_test(experiment, "vectorized", stacked)


def _only(problem: Problem, e: int) -> Problem:
    def part(values: Tensor) -> Tensor:
        return values[e : e + 1] if len(values) == len(problem.counts) else values

    users, events, lengths, *_ = problem.windows
    return problem._replace(
        windows=Windows(users[e : e + 1], events[e : e + 1], lengths[e : e + 1]),
        rows=None if problem.rows is None else problem.rows[e : e + 1],
        counts=problem.counts[e : e + 1],
        events=problem.events[e : e + 1],
        private=None if problem.private is None else problem.private[e : e + 1],
        barred=None if problem.barred is None else part(problem.barred),
    )


def _weights(experiment: Experiment) -> Weights:
    """Weights that are nowhere special."""
    rng = generator(0, "self-test")
    return Weights(
        *(
            part + 0.1 * torch.from_numpy(rng.standard_normal(part.shape, dtype=np.float32))
            for part in initialise(experiment.model, ITEMS, 0)
        )
    )


def _problem(experiment: Experiment, count: int, width: int) -> Problem:
    rng = generator(1, "self-test", count)
    lengths = rng.integers(2, width + 1, (count, 1))
    inside = np.arange(width) < lengths
    events = np.where(inside, rng.integers(ITEMS, size=(count, width)), 0)
    windows = Windows(np.arange(count), events[:, None], lengths)
    known = np.nonzero(inside)[0], events[inside]
    nobody: Sequences = None  # type: ignore[assignment]  # with `known` given nothing is read of them
    return pose(experiment, nobody, windows, 1, ITEMS, known)[1]
