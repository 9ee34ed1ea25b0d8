"""Items that training has never seen (`data.cold`): a place for one of them in every list."""

import torch
from torch import Tensor

from common.config import Experiment
from common.data.holdout import cold_of


def new_items(experiment: Experiment, catalogue: int) -> Tensor:
    """Their catalogue indices, ascending, ``(n,)`` int64."""
    return torch.tensor(cold_of(experiment.data, catalogue))


def lifted(experiment: Experiment, scored: Tensor) -> Tensor:
    """Lift all new items by so much that a user's best one stands at `evaluation.new_place` at the latest, in place.

    Among themselves they stay as they were. Nothing is known of how popular a new item will be, so its score says who
    might like it, not how many: where it stands among the others is a policy, and this is one.

    Parameters
    ----------
    experiment : Experiment
        `evaluation.new_place`, `data.cold`.
    scored : Tensor
        Scores of all items, −inf where one is not to be recommended, ``(B, I)``.
    """
    place, new = experiment.evaluation.new_place, new_items(experiment, scored.shape[1])
    if place is None or not len(new) or scored.shape[1] - len(new) < place:
        return scored
    # Half way between the scores that it has to pass and not to pass.
    bounds = scored.index_fill(1, new, -torch.inf).topk(place).values[:, -2:].mean(-1)  # (B,)
    missing = bounds - scored[:, new].amax(-1)
    missing = torch.where(missing.isfinite(), missing.clamp(min=0), 0)
    return scored.index_add_(1, new, missing.unsqueeze(-1).expand(-1, len(new)))
