"""What a user minimises, one loss per user; averaged inside the user, so no one's gradient hangs on another's length.

Every loss has the same signature and returns ``(C,)``. `candidates` says what each position is scored against.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.loss import LossConfig

Loss = Callable[["Candidates", Tensor, Tensor], Tensor]


class Candidates(NamedTuple):
    """Scores of what the next event could have been, for C users, L positions, N negatives."""

    positive: Tensor
    """Score of the event that came, ``(C, L)``; unused by `softmax`."""
    negative: Tensor
    """Scores of the negatives, ``(C, L, N)``, −inf where one is among the user's own training items; of the whole
    catalogue for `softmax`.
    """


def user_mean(per_position: Tensor, mask: Tensor) -> Tensor:
    """Mean over a user's real positions, ``(C, L) → (C,)``; zero for a user with none."""
    return torch.where(mask, per_position, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def softmax(candidates: Candidates, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue (Klenitskiy & Vasilev, RecSys 2023).

    Parameters
    ----------
    candidates : Candidates
        `negative` holds the logits of all items, ``(C, L, I)``.
    targets : Tensor
        Index of the event that came, ``(C, L)`` int64.
    mask : Tensor
        True at real positions, ``(C, L)``.
    """
    logits = candidates.negative
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return user_mean(flat.view(targets.shape), mask)


def sampled_softmax(candidates: Candidates, targets: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy over the target and the allowed negatives; arguments as in `softmax`."""
    logits = torch.cat([candidates.positive.unsqueeze(-1), candidates.negative], dim=-1)  # (C, L, 1 + N)
    return softmax(Candidates(candidates.positive, logits), torch.zeros_like(targets), mask)


def gbce_power(calibration: float, negatives: int, items: int) -> float:
    """The exponent β of gBCE (Petrov & Macdonald, RecSys 2023, equation 11) for a sampling rate α = N / (I − 1)."""
    alpha = min(1.0, negatives / max(1, items - 1))
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def binary(power: float) -> Loss:
    """Binary cross-entropy with the positive's sigmoid raised to `power`; 1 is plain BCE, less is gBCE."""

    def loss(candidates: Candidates, targets: Tensor, mask: Tensor) -> Tensor:
        negative = F.softplus(candidates.negative).sum(-1)  # (C, L); 0 at −inf
        return user_mean(power * F.softplus(-candidates.positive) + negative, mask)

    return loss


LOSSES: dict[str, Callable[[LossConfig, int], Loss]] = {
    "softmax": lambda config, items: softmax,
    "sampled-softmax": lambda config, items: sampled_softmax,
    "gbce": lambda config, items: binary(gbce_power(config.calibration, config.negatives, items)),  # type: ignore[union-attr]
    "bce": lambda config, items: binary(1.0),
}
"""Loss by ``loss.kind``; each entry takes the loss's section and the catalogue's size."""


def build_loss(config: LossConfig, items: int) -> Loss:
    """The loss that a configuration names, for a catalogue of so many items."""
    return LOSSES[config.kind](config, items)
