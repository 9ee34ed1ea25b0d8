"""A model as each user has it: with what stays on the device, and fine-tuned for the user if that is asked for."""

from typing import NamedTuple

import torch
from torch import Tensor

from client.cohort import train
from client.rows import Ints
from common.config import Experiment, LocalConfig
from common.data.sequences import Sequences
from common.models.personal import Kept, bodies, kept_columns
from common.models.weights import Weights
from common.privacy.schema import NoPrivacy

AFTERWARDS = 0
"""The round that keys the draws of fine-tuning; training's are from 1."""


class Personal(NamedTuple):
    """Users' own numbers in the body."""

    patterns: tuple[str, ...]
    """Which parameters these are."""
    kept: Kept
    """The numbers."""

    def bodies(self, experiment: Experiment, body: Tensor, users: Ints) -> Tensor:
        """Bodies of some of the users, ``(P,) → (C, P)``."""
        return bodies(experiment.model, self.patterns, body, self.kept.of(users).values)


def judged(experiment: Experiment) -> Experiment:
    """What a ranking is asked for: of ranks that nobody may be told, as under noised metrics, none are made."""
    if experiment.told_as_is:
        return experiment
    evaluation = experiment.evaluation.model_copy(update={"fine_tune": None, "sampled": None})
    return experiment.model_copy(update={"evaluation": evaluation})


def personal(
    experiment: Experiment, weights: Weights, sequences: Sequences, users: Ints, own: Kept | None
) -> Personal | None:
    """What users rank with, where that is not the global model.

    Parameters
    ----------
    experiment : Experiment
        `federation.on_device`, `evaluation.fine_tune`.
    weights : Weights
        The global ones, as they are trained.
    sequences : Sequences
        The histories, of which training events are used.
    users : ndarray
        ``(C,)`` int64.
    own : Kept, optional
        What stays on their devices.
    """
    tuning, kept = experiment.evaluation.fine_tune, experiment.federation.on_device
    mine = None if own is None else Personal(kept, own.of(users))
    if tuning is None or not len(users):
        return mine
    patterns = tuple(dict.fromkeys((*kept, *tuning.parameters)))
    columns = kept_columns(experiment.model, patterns)
    start = weights.body[columns].repeat(len(users), 1)  # (C, K)
    if mine is not None:
        start[:, torch.isin(columns, kept_columns(experiment.model, kept))] = mine.kept.values
    local = LocalConfig(steps=tuning.steps, predict=experiment.federation.local.predict)
    local = local.model_copy(update={"lr": 0.0})  # all other parameters stay where they are
    changed = {"local": local, "on_device": patterns, "on_device_lr": tuning.lr}
    federation = experiment.federation.model_copy(update=changed)
    copy = experiment.model_copy(update={"federation": federation, "privacy": NoPrivacy()})
    values = start.clone()
    order = {user: i for i, user in enumerate(users.tolist())}
    for trained in train(copy, weights, sequences, users, AFTERWARDS, own=Kept(users, start)):
        here = torch.tensor([order[user] for user in trained.users.tolist()])
        # Whose training comes to nothing is recommended to as before.
        values[here] = torch.where(trained.kept.isfinite().all(1, keepdim=True), trained.kept, start[here])
    return Personal(patterns, Kept(users, values))
