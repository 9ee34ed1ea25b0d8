"""Whether explanations find what is known to have caused an event: synthetic data tell, no other data can."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.past import Past, past_of
from common.data.law import Law
from common.data.sequences import Ints, Split
from common.sources import SyntheticData
from simulations.inference import Trained

FOUND = 3
"""A cause is found where it is among so many events that are named first."""


def known_causes(
    trained: Trained, split: Split, users: Ints, explain: Callable[[Past, Tensor], Mapping[str, Tensor]]
) -> dict[str, Any] | None:
    """How often the true cause of a held-out event is among the first three that explain its item.

    Parameters
    ----------
    trained : Trained
        The run.
    split : str
        ``validation`` or ``test``.
    users : (n,) int64
        Who have a held-out event and a history before it.
    explain : callable
        Importances of events ``(C, L)`` by name, from C histories and the items to be explained ``(C,)``.

    Returns
    -------
    dict or None
        ``users`` who have more than three events and a cause among those that the model sees; the share of them whose
        cause is ``found``, by name: also by ``chance``, and ``law``, by who knows the law of the data, hence the most
        that can be found. None where causes are not known, or nobody has one.
    """
    experiment, sequences = trained.device.experiment, trained.device.sequences
    causes = sequences.optional("causes")
    if causes is None or not isinstance(experiment.data, SyntheticData):
        return None
    stops, goals = sequences.stops(users, split)
    past = past_of(experiment.model, sequences, users, stops)
    held = sequences.validation if split == "validation" else sequences.test
    cause = causes[held[users]].astype(np.int64)
    cause = np.where(cause < 0, -1, cause - (stops - sequences.starts(users) - past.lengths.numpy()))  # in the window
    some = torch.from_numpy((cause >= 0) & (past.lengths.numpy() > FOUND))
    if not some.any():
        return None
    past, goal, there = past.pick(some), torch.from_numpy(goals)[some], torch.from_numpy(cause)[some].unsqueeze(1)
    law = Law.of(experiment.data).blame(past.items.numpy(), past.lengths.numpy(), goal.numpy())
    told = {**explain(past, goal), "law": torch.from_numpy(law)}
    found = {name: values.masked_fill(~past.real, -torch.inf).topk(FOUND).indices for name, values in told.items()}
    shares = {name: float((first == there).any(1).double().mean()) for name, first in found.items()}
    return {"users": len(goal), "found": {**shares, "chance": float((FOUND / past.lengths.double()).mean())}}
