"""Local training of a whole cohort at once; a device calls it with its one user.

In general each user of a chunk has its own copy of the weights, stacked along C. Nothing mixes users, so the gradient
of the summed loss holds every user's own gradient, and one user's broken numbers stay its own.

One local step is special: all users still stand at the global weights, so one pass with shared weights gives the
weighted sum of their updates exactly, at the price of centralised training. Single updates are then computed only if
asked for.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.batches import chunks, windows
from client.problem import Problem, pose
from client.rows import Ints
from common.config import Experiment
from common.data.sequences import Sequences
from common.models.encoder import dropout_sites, encode
from common.models.losses import Candidates, build_loss
from common.models.weights import Weights, body_shapes, named
from common.seeding import keep_mask, uniform_bits
from common.wire import LARGEST


class Updates:
    """What the training of one chunk changed, local − global, for each of its C users.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, local training, seed.
    weights : Weights
        The global weights that training starts from; they must not change while updates are asked for.
    problems : tuple of Problem
        The chunk's shared and stacked problem.
    round_ : int
        With the seed and each user, the key of all draws.
    """

    def __init__(self, experiment: Experiment, weights: Weights, problems: tuple[Problem, Problem], round_: int):
        self._experiment, self._weights, self._round = experiment, weights, round_
        self._shared, self._own = problems
        trained = np.maximum(self._own.windows.lengths - 1, 0)  # (C, S)
        self.users: Ints = self._own.windows.users
        """Index of each user, ``(C,)``."""
        self.events: Ints = trained.sum(-1) // (experiment.federation.local.epochs or trained.shape[1])
        """Targets that one pass trained on, ``(C,)``."""
        by_events = experiment.federation.weighting == "events"
        self.expected: NDArray[np.float32] = (self.events if by_events else np.ones_like(self.events)).astype(
            np.float32
        )
        """Importance that the server will give each user, unless something happens to a reply, ``(C,)``."""
        self.counts: Ints = self._own.counts
        """Item rows that each user sends, ``(C,)``."""
        self.whole = self._own.rows is None
        """Whether these are the whole table."""
        # Alone, a user's sum is its update, which the stacked pass gives without doing the work twice.
        self._sum = self._shared_step() if trained.shape[1] == 1 and len(self.users) > 1 else None
        if self._sum is None:
            self.losses = self._stacked[1]
            """Mean loss of each user over its local steps, each before its step, ``(C,)``."""

    @cached_property
    def sound(self) -> NDArray[np.bool_]:
        """Whether a user's update is finite and not absurdly large, ``(C,)``; else it is worth nothing."""
        if self._sum is not None:
            return np.ones(len(self.users), dtype=bool)
        (table, body), losses = self._stacked
        norms = torch.hypot(torch.linalg.vector_norm(table, dim=(1, 2)), torch.linalg.vector_norm(body, dim=1))
        sound: NDArray[np.bool_] = np.isfinite(losses) & (norms <= LARGEST).numpy()  # NaN is not at most anything
        return sound

    def __len__(self) -> int:
        """Number of users."""
        return len(self.users)

    def rows(self, i: int) -> NDArray[np.int32]:
        """Catalogue indices of the rows that the i-th user sends, ``(R,)``."""
        count = self.counts[i]
        index: Ints = np.arange(count) if self._own.rows is None else self._own.rows[i, :count]
        return index.astype(np.int32)

    def one(self, i: int) -> Weights:
        """Change of the i-th user's rows ``(R, D)`` and of the body ``(P,)``."""
        (table, body), _ = self._stacked
        return Weights(table[i, : self.counts[i]], body[i])

    def summed(self, importance: NDArray[np.float32]) -> tuple[Ints | None, Weights]:
        """Σ importance · update, importance ``(C,)``; 0 leaves a user out.

        Returns
        -------
        rows : (R,) int64, optional
            Catalogue indices of the sum's table rows; none for the whole table.
        weights : Weights
            ``(R, D)`` and ``(P,)``.
        """
        if self._sum is not None and np.array_equal(importance, self.expected):
            return self._shared.rows, self._sum
        (tables, bodies), _ = self._stacked
        chosen = np.flatnonzero(importance)  # the others' numbers may not even be finite
        if len(chosen) < len(importance):
            tables, bodies = tables[torch.from_numpy(chosen)], bodies[torch.from_numpy(chosen)]
        scale, union = torch.from_numpy(importance[chosen]), self._shared.rows
        body = scale @ bodies
        if union is None or self._own.rows is None:
            return None, Weights(torch.einsum("c,crd->rd", scale, tables), body)
        n = self._own.negatives
        table = torch.zeros(len(union), tables.shape[2])
        table[:n] = torch.einsum("c,crd->rd", scale, tables[:, :n])
        used = np.arange(n, tables.shape[1]) < self.counts[chosen, None]  # (C, R − N), rows of the user's own
        place = n + np.searchsorted(union[n:], self._own.rows[chosen][:, n:][used])
        table.index_add_(0, torch.from_numpy(place), (tables[:, n:] * scale.view(-1, 1, 1))[torch.from_numpy(used)])
        return union, Weights(table, body)

    def _shared_step(self) -> Weights | None:
        """Weighted sum of all updates, of the shared problem's rows.

        None where something isn't finite or is too large, since one user would spoil everybody's.
        """
        table, body = self._weights
        rows = table if self._shared.rows is None else table[torch.from_numpy(self._shared.rows)]
        here = Weights(rows.detach().requires_grad_(), body.detach().requires_grad_())
        losses = _loss(
            self._experiment, here.table, named(self._experiment.model, here.body), self._shared, 0, self._round
        )
        self.losses = losses.detach().numpy()
        if not np.isfinite(self.losses).all():
            return None
        gradients = torch.autograd.grad((losses * torch.from_numpy(self.expected)).sum(), here)
        lr = self._experiment.federation.local.lr
        total = Weights(*(gradient.mul_(-lr) for gradient in gradients))
        return total if torch.hypot(*map(torch.linalg.vector_norm, total)) <= LARGEST else None

    @cached_property
    def _stacked(self) -> tuple[Weights, NDArray[np.float32]]:
        """Updates ``(C, R, D)`` and ``(C, P)`` by training a copy of the weights per user, and the losses."""
        model, local, lengths = self._experiment.model, self._experiment.federation.local, self._own.windows.lengths
        c, table, rows = len(self.users), self._weights.table, self._own.rows
        origin = table.expand(c, -1, -1) if rows is None else table[torch.from_numpy(rows)]  # (C, R, D)
        start = Weights(origin, self._weights.body.expand(c, -1))
        here = Weights(*(part.clone(memory_format=torch.contiguous_format) for part in start))
        # Leaves that share the stacked body's memory: steps are made in place, and no gradient has to be put together.
        leaves, begins = ([w.table, *named(model, w.body).values()] for w in (here, start))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        parameters = dict(zip(body_shapes(model), leaves[1:], strict=True))
        losses = torch.zeros(lengths.shape)  # (C, S)
        for step in range(lengths.shape[1]):
            per_user = _loss(self._experiment, leaves[0], parameters, self._own, step, self._round)  # (C,)
            gradients = torch.autograd.grad(per_user.sum(), leaves)
            losses[:, step] = per_user.detach()
            with torch.no_grad():
                active = torch.from_numpy(lengths[:, step] > 1).float()  # (C,)
                for leaf, gradient, begin in zip(leaves, gradients, begins, strict=True):
                    if local.prox:
                        pull = local.prox * active.view(-1, *[1] * (leaf.dim() - 1))
                        leaf.addcmul_(pull, leaf - begin, value=-local.lr)
                    leaf.sub_(gradient, alpha=local.lr)
        with torch.no_grad():
            if lengths.shape[1] == 1:  # the step itself: a difference of weights would lose its last digits
                table, *rest = (gradient.mul(-local.lr) for gradient in gradients)
                change = Weights(table, torch.cat([part.flatten(1) for part in rest], dim=1))
            else:
                change = Weights(*(part.detach().sub_(begin) for part, begin in zip(here, start, strict=True)))
        return change, losses.sum(-1).numpy() / np.maximum((lengths > 1).sum(-1), 1).astype(np.float32)


def train(
    experiment: Experiment, weights: Weights, sequences: Sequences, users: Ints, round_: int
) -> Iterator[Updates]:
    """Train a cohort from the same global weights.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, local training, seed.
    weights : Weights
        The global weights, shared; left untouched.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64, distinct.
    round_ : int
        From 1; with the seed and each user, the key of all draws.

    Yields
    ------
    Updates
        Of one chunk of users; each user is in one chunk.
    """
    for chunk in plan(experiment, sequences, users, len(weights.table)):
        yield train_chunk(experiment, weights, sequences, chunk, round_)


def plan(experiment: Experiment, sequences: Sequences, users: Ints, catalogue: int) -> list[Ints]:
    """Users of each chunk that a cohort is trained in."""

    def bytes_per_user(width: int, steps: int) -> int:
        """An estimate: weights with gradients, activations, logits and masks, as stacked training needs them."""
        model, loss = experiment.model, experiment.loss
        scored = catalogue if loss.kind == "softmax" else getattr(loss, "negatives", 1)
        rows = catalogue if loss.kind == "softmax" else scored + 2 * width * steps
        body, activations = 12 * model.blocks * model.dim**2, width * model.dim * (12 + 2 * model.ffn) * model.blocks
        return 4 * (3 * rows * model.dim + 3 * body + 2 * activations + 3 * width * scored)

    return chunks(experiment, sequences, users, bytes_per_user)


def train_chunk(experiment: Experiment, weights: Weights, sequences: Sequences, users: Ints, round_: int) -> Updates:
    """Train one chunk of a plan; arguments as in `train`."""
    catalogue = len(weights.table)
    problems = pose(experiment, sequences, windows(experiment, sequences, users, round_), round_, catalogue)
    return Updates(experiment, weights, problems, round_)


def _loss(
    experiment: Experiment, table: Tensor, parameters: dict[str, Tensor], problem: Problem, step: int, round_: int
) -> Tensor:
    """Loss of each user in one local step, ``(C,)``; weights shared or stacked, as the problem is numbered."""
    model, (users, _, lengths) = experiment.model, problem.windows
    index = problem.events[:, step]  # (C, W + 1)
    w = index.shape[1] - 1
    mask = torch.from_numpy(np.arange(1, w + 1) < lengths[:, step, None])  # (C, W)
    masks = None
    if model.dropout:
        shape = (len(users), w, dropout_sites(model), model.dim)
        bits = uniform_bits(experiment.seed, f"dropout-{step}", round_, users, shape[1] * shape[2] * shape[3])
        masks = torch.from_numpy(keep_mask(bits, model.dropout)).view(shape)
    embedded = _gather(table, index)  # (C, W + 1, D), inputs and, one later, targets
    hidden = encode(model, parameters, embedded[:, :-1], masks)  # (C, W, D)
    positive = (hidden * embedded[:, 1:]).sum(-1)  # (C, W)
    if experiment.loss.kind == "softmax":
        negative = hidden @ table.mT  # (C, W, I)
    elif problem.private is not None:
        other = _gather(table, problem.private[:, step])
        negative = (hidden * other).sum(-1, keepdim=True) + problem.barred[:, step]  # (C, W, 1)
    elif table.dim() == 2:
        negative = (hidden @ table[: problem.negatives].T).add_(problem.barred)  # (C, W, N)
    else:
        negative = torch.baddbmm(problem.barred, hidden, table[:, : problem.negatives].mT)
    loss = build_loss(experiment.loss, problem.catalogue)
    return loss(Candidates(positive, negative), index[:, 1:], mask)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, shared ``(R, D)`` or each user's own ``(C, R, D)``, at ``(C, L)`` → ``(C, L, D)``."""
    if table.dim() == 2:
        return F.embedding(index, table)
    c, r, d = table.shape
    return F.embedding(index + torch.arange(c).unsqueeze(-1) * r, table.view(c * r, d))
