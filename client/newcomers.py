"""Items that training has never seen, held out of it (`data.cold`) or later: a place for one of them in every list."""

import torch
from torch import Tensor

from common.config import Experiment
from common.data.holdout import cold_of


def new_items(experiment: Experiment, catalogue: int, later: int = 0) -> Tensor:
    """Numbers of those in the catalogue, ascending, then of those that came later, which follow it; ``(n,)`` int64."""
    return torch.cat([torch.tensor(cold_of(experiment.data, catalogue)), torch.arange(catalogue, catalogue + later)])


def lifted(experiment: Experiment, scored: Tensor, later: int = 0) -> Tensor:
    """Lift all new items by so much that a user's best one stands at `evaluation.new_place` at the latest, in place.

    Among themselves they stay as they were. Nothing is known of how popular a new item will be, so its score says who
    might like it, not how many: where it stands among the others is a policy, and this is one.

    Parameters
    ----------
    experiment : Experiment
        `evaluation.new_place`, `data.cold`.
    scored : Tensor
        Scores of all items, −inf where one is not to be recommended, ``(B, I)``.
    later : int
        How many of the items, the last ones, came after training.
    """
    place = experiment.evaluation.new_place
    new = new_items(experiment, scored.shape[1] - later, later)
    if place is None or not len(new) or scored.shape[1] - len(new) < place:
        return scored
    # Half way between the scores that it has to pass and not to pass.
    bounds = scored.index_fill(1, new, -torch.inf).topk(place).values[:, -2:].mean(-1)  # (B,)
    missing = bounds - scored[:, new].amax(-1)
    missing = torch.where(missing.isfinite(), missing.clamp(min=0), 0)
    return scored.index_add_(1, new, missing.unsqueeze(-1).expand(-1, len(new)))
