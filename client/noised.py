"""Updates that devices have noised themselves: whole tables, and nothing said beside them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.rows import Ints
from client.training import Updates
from common.config import Experiment
from common.errors import UsageError
from common.models.weights import Weights, body_size
from common.privacy.devices import settle
from common.privacy.mechanism import clip_factors, norms
from common.privacy.noise import NoiseSource, noise_source
from common.privacy.schema import Local, on_device


class Noised:
    """What C devices send that trust nobody; the `common.wire.Pending` of this module.

    The noise lies on every coordinate, so all rows are sent, and neither losses nor counts are told. An update that
    came to nothing is noise alone: a refusal would tell of the user's events.

    Parameters
    ----------
    users : ndarray
        Index of each user, ``(C,)``.
    table, body : Tensor
        Noised changes, ``(C, I, D)`` and ``(C, P)``.
    clip : float, optional
        The server's bound on each whole update, where it adds user-level privacy on top.
    """

    def __init__(self, users: Ints, table: Tensor, body: Tensor, clip: float | None = None):
        self.users, self._table, self._body = users, table, body
        self.expected: NDArray[np.float32] = np.ones(len(users), dtype=np.float32)
        self.counts: Ints = np.full(len(users), table.shape[1])
        self.whole = True
        self.sound: NDArray[np.bool_] = np.ones(len(users), dtype=bool)
        self.facts: dict[str, NDArray[np.generic]] = {}
        if clip is not None:
            measured = norms(table.flatten(1), body)
            factors = clip_factors(measured, clip).float()
            table.mul_(factors.view(-1, 1, 1))
            body.mul_(factors.view(-1, 1))
            self.facts["below"] = (measured <= clip).numpy().astype(np.int64)

    @property
    def kept(self) -> Tensor:
        """Nothing stays with devices that send everything."""
        raise ValueError("nothing stays on the device")

    @property
    def norms(self) -> NDArray[np.float64]:
        """L2 norm of each whole update, noise included, ``(C,)``."""
        found: NDArray[np.float64] = norms(self._table.flatten(1), self._body).numpy()
        return found

    def __len__(self) -> int:
        """Number of users."""
        return len(self.users)

    def rows(self, i: int) -> NDArray[np.int32]:
        """All catalogue indices, ``(I,)``."""
        return np.arange(self._table.shape[1], dtype=np.int32)

    def one(self, i: int) -> Weights:
        """Change of the i-th user's table ``(I, D)`` and body ``(P,)``."""
        return Weights(self._table[i], self._body[i])

    def summed(self, importance: NDArray[np.float32]) -> tuple[None, Weights]:
        """Σ importance · update, importance ``(C,)``; whole tables have no rows to name."""
        scale = torch.from_numpy(importance)
        table = (scale @ self._table.flatten(1)).view(self._table.shape[1:])
        return None, Weights(table, scale @ self._body)


def add_own_noise(
    table: Tensor, body: Tensor, users: Ints, std: float, source: NoiseSource, round_: int, step: int
) -> None:
    """Add to each device's numbers its own noise, on every coordinate, in place.

    Parameters
    ----------
    table, body : Tensor
        ``(C, I, D)`` and ``(C, P)``.
    users : ndarray
        ``(C,)``.
    std : float
        Standard deviation.
    source, round_, step
        Where the noise is from; its key is (round, step, user).
    """
    rows = table[0].numel() if len(table) else 0
    for i, user in enumerate(users.tolist()):
        drawn = source.many(rows + body.shape[1], "device-noise", round_, step, user)
        table[i].view(-1).add_(drawn[:rows], alpha=std)
        body[i].add_(drawn[rows:], alpha=std)


def noised_locally(experiment: Experiment, updates: Updates, items: int, round_: int) -> Noised:
    """Clipped updates as local differential privacy sends them.

    Parameters
    ----------
    experiment : Experiment
        With local privacy.
    updates : Updates
        Of one chunk, clipped to C.
    items : int
        Size of the catalogue.
    round_ : int
        With the seed and each user, the key of the noise.
    """
    privacy, std = on_device(experiment.privacy), settle(experiment).noise_multiplier
    if not isinstance(privacy, Local):
        raise UsageError(f"privacy.kind {experiment.privacy.kind} is not local")
    table = torch.zeros(len(updates), items, experiment.model.dim)
    body = torch.zeros(len(updates), body_size(experiment.model))
    for i in np.flatnonzero(updates.sound).tolist():
        change = updates.one(i)
        table[i, torch.from_numpy(updates.rows(i)).long()] = change.table
        body[i] = change.body
    source = noise_source(privacy.rng, experiment.seed)
    add_own_noise(table, body, updates.users, std * privacy.clipping_norm, source, round_, 0)
    return Noised(updates.users, table, body)
