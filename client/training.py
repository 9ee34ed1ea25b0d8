"""Local training of a whole cohort at once; a device calls it with its one user.

In general each user of a chunk has its own copy of the weights, stacked along C. Nothing mixes users, so the gradient
of the summed loss holds every user's own gradient, and one user's broken numbers stay its own.

One local step is special: all users still stand at the global weights, so one pass with shared weights gives the
weighted sum of their updates exactly, at the price of centralised training. Single updates are then computed only if
asked for.
"""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.gradients import Stack, Tables, added, as_tensor, own_gradients, weighted
from client.problem import Problem
from client.rows import Ints
from client.step import read_vectors, step_loss
from common.config import Experiment
from common.models.personal import Kept, bodies, kept_columns, stays
from common.models.weights import Weights, body_shapes, named
from common.privacy.mechanism import clip_factors, norms
from common.privacy.precondition import preconditioned
from common.privacy.schema import UserLevel
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
    clip : float, optional
        Bound on the L2 norm of each user's whole update; longer ones are scaled down to it.
    own : Kept, optional
        What these users have of the parameters that stay on the device, ``(C, K)``; no update changes those.
    """

    def __init__(
        self,
        experiment: Experiment,
        weights: Weights,
        problems: tuple[Problem, Problem],
        round_: int,
        clip: float | None = None,
        own: Kept | None = None,
    ):
        self._experiment, self._weights, self._round, self._clip = experiment, weights, round_, clip
        if experiment.federation.on_device and own is None:
            raise ValueError("federation.on_device: what these users keep is not told, and would be sent")
        self._kept = own
        self._shared, self._own = problems
        trained = self._own.windows.trained  # (C, S)
        self.users: Ints = self._own.windows.users
        """Index of each user, ``(C,)``."""
        self.events: Ints = -(-trained.sum(-1) // (experiment.federation.local.epochs or trained.shape[1]))
        """Targets that one pass trained on, ``(C,)``; the mean over passes that differ, rounded up."""
        by_events = experiment.federation.weighting == "events"
        self.expected: NDArray[np.float32] = (self.events if by_events else np.ones_like(self.events)).astype(
            np.float32
        )
        """Importance that the server will give each user, unless something happens to a reply, ``(C,)``."""
        self.counts: Ints = self._own.counts
        """Item rows that each user sends, ``(C,)``."""
        self.whole = self._own.rows is None
        """Whether these are the whole table."""
        # Alone, a user's sum is its update, which the stacked pass gives without doing the work twice; a clip needs it.
        shared = trained.shape[1] == 1 and len(self.users) > 1 and clip is None and own is None
        self._sum = self._shared_step() if shared else None
        if self._sum is None:
            self.losses = self._stacked[1]
            """Mean loss of each user over its local steps, each before its step, ``(C,)``."""

    @cached_property
    def sound(self) -> NDArray[np.bool_]:
        """Whether a user's update is finite and not absurdly large, ``(C,)``; else it is worth nothing."""
        if self._sum is not None:
            return np.ones(len(self.users), dtype=bool)
        sound: NDArray[np.bool_] = np.isfinite(self.losses) & (self.norms <= LARGEST)  # NaN is not at most anything
        if self._kept is not None:  # so is what stays
            sound &= torch.linalg.vector_norm(self.kept, dim=1).numpy() <= LARGEST
        return sound

    @property
    def facts(self) -> dict[str, NDArray[np.generic]]:
        """What each user says beside its update, ``(C,)`` each."""
        said: dict[str, NDArray[np.generic]] = {"events": self.events, "loss": self.losses}
        return said if self._clip is None else said | {"below": (self.norms <= self._clip).astype(np.int64)}

    @property
    def kept(self) -> Tensor:
        """What training has made of the parameters that stay on the device, ``(C, K)``."""
        if self._kept is None or self._stacked[3] is None:
            raise ValueError("nothing stays on the device")
        return self._stacked[3]

    @property
    def norms(self) -> NDArray[np.float64]:
        """L2 norm of each whole update as trained, before any clip, ``(C,)``; computes the single updates."""
        norms: NDArray[np.float64] = self._stacked[2].numpy()
        return norms

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
        tables, parts, factors = self._stacked[0]
        body = torch.cat([as_tensor(part[i : i + 1]).flatten() for part in parts])
        table = torch.cat([each[i] for each in tables])[: self.counts[i]]
        return Weights(table * factors[i], body * factors[i])

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
        tables, parts, factors = self._stacked[0]
        chosen = np.flatnonzero(importance)  # the others' numbers may not even be finite
        scale, union = torch.from_numpy(importance[chosen]), self._shared.rows
        if len(chosen) < len(importance):
            here = torch.from_numpy(chosen)
            tables, parts, factors = tables.of(here), [part[here] for part in parts], factors[here]
        scale = scale * factors
        body = torch.cat([weighted(scale, part).flatten() for part in parts])
        shared = weighted(scale, tables.shared)
        if union is None or self._own.rows is None:
            return None, Weights(shared, body)
        n = self._own.shared
        used = np.arange(n, self._own.rows.shape[1]) < self.counts[chosen, None]  # (C, R − N)
        place = np.where(used, np.searchsorted(union[n:], self._own.rows[chosen][:, n:]), len(union) - n)
        own = added(len(union) - n, torch.from_numpy(place), tables.own * scale.view(-1, 1, 1))
        return union, Weights(torch.cat([shared, own]), body)

    def _shared_step(self) -> Weights | None:
        """Weighted sum of all updates, of the shared problem's rows.

        None where something isn't finite or is too large, since one user would spoil everybody's.
        """
        here = Weights(self._shared_rows().requires_grad_(), self._weights.body.detach().requires_grad_())
        vectors = read_vectors(here.table, self._shared, 0)
        parameters = named(self._experiment.model, here.body)
        losses = step_loss(self._experiment, vectors, parameters, self._shared, 0, self._round)
        self.losses = losses.detach().numpy()
        if not np.isfinite(self.losses).all():
            return None
        gradients = torch.autograd.grad((losses * torch.from_numpy(self.expected)).sum(), here)
        lr = self._experiment.federation.local.lr
        total = Weights(*(gradient.mul_(-lr) for gradient in gradients))
        return total if torch.hypot(*map(torch.linalg.vector_norm, total)) <= LARGEST else None

    def _shared_rows(self) -> Tensor:
        """The rows of the shared problem, ``(R, D)``."""
        table, rows = self._weights.table.detach(), self._shared.rows
        return table if rows is None else table[torch.from_numpy(rows)]

    @cached_property
    def _stacked(self) -> tuple[Stack, NDArray[np.float32], Tensor, Tensor | None]:
        """All single updates; the losses; the norms before any clip, float64; what stays on the device."""
        # With one step nobody's weights ever differ from the others', so no copies are made, only gradients.
        stack, losses = self._one_step() if self._one else self._several_steps()
        kept = None
        with torch.no_grad():
            if self._kept is not None:
                stack, kept = self._held_back(stack, self._kept)
            stack = self._mapped(stack)
            measured = norms(*stack.tables, *stack.parts) * stack.factors.abs()
            if self._clip is not None:
                stack = stack._replace(factors=stack.factors * clip_factors(measured, self._clip).float())
        return stack, losses, measured, kept

    def _held_back(self, stack: Stack, own: Kept) -> tuple[Stack, Tensor]:
        """Updates without what stays on the device, and that: after all steps, or one of its own learning rate."""
        body = torch.cat([as_tensor(part).flatten(1) for part in stack.parts], dim=1)  # (C, P)
        federation = self._experiment.federation
        columns = kept_columns(self._experiment.model, federation.on_device)
        # After one step this is a gradient, after several the change that they have made.
        kept = own.values + body[:, columns] * (-federation.on_device_lr if self._one else 1.0)
        body[:, columns] = 0
        return stack._replace(parts=[body]), kept

    @property
    def _one(self) -> bool:
        """Whether there is one local step."""
        return bool(self._own.windows.lengths.shape[1] == 1)

    def _bodies(self) -> Tensor:
        """The body that training starts from, the same for all ``(P,)``, or ``(C, P)``."""
        if self._kept is None:
            return self._weights.body
        patterns = self._experiment.federation.on_device
        return bodies(self._experiment.model, patterns, self._weights.body, self._kept.values)

    def _mapped(self, stack: Stack) -> Stack:
        """Updates in the coordinates in which they are clipped and released."""
        privacy = self._experiment.privacy
        if self._clip is None or not isinstance(privacy, UserLevel) or privacy.precondition is None:
            return stack
        tables, parts = preconditioned(privacy.precondition, self._weights.table, stack.tables, stack.parts)
        return stack._replace(tables=Tables(*tables), parts=parts)

    def _one_step(self) -> tuple[Stack, NDArray[np.float32]]:
        """Each user's own gradient at the shared weights."""
        # What a user reads is gathered from the shared table; where its gradients belong is told apart afterwards.
        rows = self._shared_rows()
        read = read_vectors(rows, self._shared, 0)
        body, own = self._bodies(), self._own
        tables, parts, losses = own_gradients(self._experiment, read, body, own, self._round, table=rows)
        # The step itself, not a difference of weights, which would lose its last digits.
        factors = torch.full((len(self.users),), -self._experiment.federation.local.lr)
        return Stack(tables, parts, factors), losses.numpy()

    def _several_steps(self) -> tuple[Stack, NDArray[np.float32]]:
        """Train a copy of the weights per user."""
        model, local, learns = self._experiment.model, self._experiment.federation.local, self._own.windows.trained > 0
        c, table, rows = len(self.users), self._weights.table, self._own.rows
        origin = table.expand(c, -1, -1) if rows is None else table[torch.from_numpy(rows)]  # (C, R, D)
        start = Weights(origin, self._bodies().expand(c, -1))
        here = Weights(*(part.clone(memory_format=torch.contiguous_format) for part in start))
        # Leaves that share the stacked body's memory: steps are made in place, and no gradient has to be put together.
        leaves, begins = ([w.table, *named(model, w.body).values()] for w in (here, start))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        parameters = dict(zip(body_shapes(model), leaves[1:], strict=True))
        rates = [local.lr]
        for name in parameters:
            own = stays(name, self._experiment.federation.on_device)
            rates.append(self._experiment.federation.on_device_lr if own else local.lr)
        losses = torch.zeros(learns.shape)  # (C, S)
        for step in range(learns.shape[1]):
            vectors = read_vectors(leaves[0], self._own, step)
            per_user = step_loss(self._experiment, vectors, parameters, self._own, step, self._round)  # (C,)
            gradients = torch.autograd.grad(per_user.sum(), leaves)
            losses[:, step] = per_user.detach()
            with torch.no_grad():
                active = torch.from_numpy(learns[:, step]).float()  # (C,)
                for leaf, gradient, begin, lr in zip(leaves, gradients, begins, rates, strict=True):
                    if local.prox:
                        pull = local.prox * active.view(-1, *[1] * (leaf.dim() - 1))
                        leaf.addcmul_(pull, leaf - begin, value=-lr)
                    leaf.sub_(gradient, alpha=lr)
        with torch.no_grad():
            change = Weights(*(part.detach().sub_(begin) for part, begin in zip(here, start, strict=True)))
        mean_losses = losses.sum(-1).numpy() / np.maximum(learns.sum(-1), 1).astype(np.float32)
        tables = Tables.split(change.table, self._own.shared)
        return Stack(tables, [change.body], torch.ones(c)), mean_losses
