"""Each user's own gradient of one step, for a whole chunk at once, in the form that is cheapest to clip and sum."""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from client.problem import Problem
from client.step import Vectors, step_loss
from common.config import Experiment
from common.models.alike import Outer, Tap
from common.models.weights import body_shapes, named


class Tables(NamedTuple):
    """Numbers of the item rows that each of C users touches, R at the most."""

    shared: Tensor
    """Of the rows that all of them touch, ``(C, N, D)``: the negatives, or the whole catalogue."""
    own: Tensor
    """Of each user's other rows, ``(C, R − N, D)``; past a user's count they are zero."""

    @classmethod
    def split(cls, table: Tensor, n: int) -> "Tables":
        """Of one tensor ``(C, R, D)``, as views."""
        return cls(table[:, :n], table[:, n:])

    def of(self, users: Tensor) -> "Tables":
        """Those of some users."""
        return Tables(self.shared[users], self.own[users])


class Stack(NamedTuple):
    """The single updates of C users, each yet to be multiplied with its factor, which saves a pass over all of them."""

    tables: Tables
    parts: list[Tensor | Outer]
    """The body's parameters in their order, ``(C, …)`` each."""
    factors: Tensor
    """``(C,)`` float32."""


def own_gradients(
    experiment: Experiment,
    read: Vectors,
    body: Tensor,
    problem: Problem,
    round_: int,
    step: int = 0,
    table: Tensor | None = None,
) -> tuple[Tables, list[Tensor | Outer], Tensor]:
    """Each user's gradient of its own loss in one step, exact; nothing mixes users.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, seed.
    read : Vectors
        What the step reads of the users' tables.
    body : Tensor
        ``(P,)``, the same for all, or ``(C, P)``.
    problem : Problem
        Stacked.
    round_ : int
        With the seed and each user, the key of all draws.
    step : int
        Which of the problem's steps.
    table : Tensor, optional
        What was read from, ``(R, D)``, the same for all; wanted where items are built.

    Returns
    -------
    tables : Tables
        Of the item rows.
    parts : list of (C, …)
        Of the body's parameters in their order, biases that follow one another as one; those of linear layers in
        factors where all have the same body.
    losses : (C,)
        Before the step.
    """
    model, c = experiment.model, len(read.events)
    parameters, taps = named(model, body), dict[str, Tap]()
    if body.dim() == 1:
        taps = {n: Tap(p.detach()) for n, p in parameters.items() if p.dim() == 2 and "weight" in n}
        parameters = {n: p.expand(c, *p.shape) for n, p in parameters.items()}
    own = {n: p.detach().requires_grad_() for n, p in parameters.items() if n not in taps}
    vectors = Vectors(*(part.detach().requires_grad_() if isinstance(part, Tensor) else part for part in read))  # type: ignore[arg-type]
    if isinstance(vectors.scored, Tensor) and vectors.scored.dim() == 2:
        same = vectors.scored.detach()
        alike = Tap(same) if model.head == "dot-product" else same.expand(c, -1, -1).requires_grad_()
        vectors = vectors._replace(scored=alike)
    losses = step_loss(experiment, vectors, own | taps, problem, step, round_)
    leaves = [part for part in vectors if isinstance(part, Tensor)]
    gradients = iter(torch.autograd.grad(losses.sum(), [*leaves, *own.values()]))
    of_read = Vectors(*(next(gradients) if isinstance(part, Tensor) else None for part in vectors))  # type: ignore[arg-type]
    of_own = dict(zip(own, gradients, strict=True))
    of_body = [taps[name].gradient if name in taps else of_own[name] for name in body_shapes(model)]
    if isinstance(vectors.scored, Tap):
        of_read = of_read._replace(scored=as_tensor(vectors.scored.gradient))
    return _of_rows(of_read, problem, step, table), _side_by_side(of_body), losses.detach()


def _of_rows(of_read: Vectors, problem: Problem, step: int, table: Tensor | None = None) -> Tables:
    """Gradients of item rows from those of the vectors that a step read."""
    if problem.mixture is not None and table is not None:
        return Tables.split(problem.mixture.gradient(_of_items(of_read, problem, step), table), problem.mixture.rows)
    n, (c, _, d) = problem.shared, of_read.events.shape
    width = 0 if problem.rows is None else problem.rows.shape[1] - n
    shared = of_read.scored.contiguous() if isinstance(of_read.scored, Tensor) else torch.zeros(c, 0, d)
    own, owner = torch.zeros(c * width, d), torch.arange(c).unsqueeze(-1)
    for rows, gradient in ((problem.events, of_read.events), (problem.private, of_read.private)):
        if rows is None or gradient is None:
            continue
        index = rows[:, step]
        apart = index >= n
        own += added(c * width, torch.where(apart, owner * width + index - n, c * width), gradient)
        # An item of the user's may be one of the shared rows too; with full softmax all are.
        shared.view(c * n, d).index_add_(0, (owner * n + index)[~apart], gradient[~apart])
    return Tables(shared, own.view(c, width, d))


def _side_by_side(parts: list[Tensor | Outer]) -> list[Tensor | Outer]:
    """The same numbers in the same order, vectors that follow one another as one: there are many, and small."""
    runs = ([*run] for _, run in groupby(enumerate(parts), lambda at: -1 if _is_vector(at[1]) else at[0]))
    return [run[0][1] if len(run) == 1 else torch.cat([part for _, part in run], dim=1) for run in runs]  # type: ignore[misc]


def _is_vector(part: Tensor | Outer) -> bool:
    return isinstance(part, Tensor) and part.dim() == 2


def _of_items(of_read: Vectors, problem: Problem, step: int) -> Tensor:
    """Gradients of all item vectors, ``(C, I, D)``, where these are no rows themselves."""
    c, _, d = of_read.events.shape
    whole, items = torch.zeros(c, problem.catalogue, d), torch.arange(problem.catalogue)
    if isinstance(of_read.scored, Tensor):
        whole.index_add_(1, items if problem.scored is None else problem.scored, of_read.scored)
    owner = torch.arange(c).unsqueeze(-1)
    for index, gradient in ((problem.events, of_read.events), (problem.private, of_read.private)):
        if index is not None and gradient is not None:
            place = (owner * problem.catalogue + index[:, step]).flatten()
            whole.view(-1, d).index_add_(0, place, gradient.flatten(0, 1))
    return whole


def added(rows: int, place: Tensor, values: Tensor) -> Tensor:
    """Vectors summed by place, ``(…), (…, D) → (rows, D)``; those whose place is `rows` are left out."""
    total = torch.zeros(rows + 1, values.shape[-1])
    total.index_add_(0, place.flatten(), values.flatten(0, -2))
    return total[:rows]


def as_tensor(part: Tensor | Outer) -> Tensor:
    """Gradients of one parameter, ``(C, …)``, multiplied out."""
    return part.whole() if isinstance(part, Outer) else part


def weighted(scale: Tensor, stacked: Tensor | Outer) -> Tensor:
    """Σ scale · part over C users, ``(C,), (C, …) → (…)``, or several such sums, ``(K, C), (C, …) → (K, …)``.

    Without a copy where two dimensions are merely swapped, as in the gradients of linear layers.
    """
    if isinstance(stacked, Outer):
        return stacked.weighted(scale)
    if stacked.dim() == 3 and not stacked.is_contiguous() and stacked.mT.is_contiguous():
        return weighted(scale, stacked.mT).mT
    return (scale @ stacked.flatten(1)).view(*scale.shape[:-1], *stacked.shape[1:])
