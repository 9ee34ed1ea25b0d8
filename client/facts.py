"""What is known of events beside their items, as far as a model looks at it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.sequences import Ints, Sequences
from common.errors import DataError
from common.models.inputs import Moments
from common.models.schema import BehaviourInput, ModelConfig

_FARTHEST = 10**11
"""Seconds; some three thousand years."""
Facts = dict[str, NDArray[np.generic]]
"""Values of the events at some places, by the fields of `Moments`."""


def facts_at(model: ModelConfig, sequences: Sequences, places: Ints) -> Facts | None:
    """Look up what a model wants to know.

    Parameters
    ----------
    model : ModelConfig
        Its inputs, and whether it looks at times.
    sequences : Sequences
        The histories.
    places : ndarray
        Of the events in `sequences.items`, any shape; negative at padding, where anything is said.

    Returns
    -------
    dict, optional
        ``times`` in seconds, ``behaviours`` by their places among the input's names, ``ratings``; of the shape of
        `places`. None where the model looks at items alone.

    Raises
    ------
    DataError
        Where the data does not tell it.
    """
    if not model.inputs and not model.timed:
        return None
    times = sequences.times[places]
    facts: Facts = {"times": times if sequences.per_second == 1 else times // sequences.per_second}
    for each in model.inputs:
        if isinstance(each, BehaviourInput):
            facts["behaviours"] = _rows(each, sequences)[_told(sequences, "behaviours")[places]]
        elif each.kind == "rating":
            facts["ratings"] = _told(sequences, "ratings")[places]
    return facts


def moments(facts: Facts | None, lengths: Tensor) -> Moments | None:
    """The same, ``(C, L)`` each, as a model takes it; lengths ``(C,)``."""
    if facts is None:
        return None
    return Moments(lengths=lengths, **{name: torch.from_numpy(values) for name, values in facts.items()})


def assumed(model: ModelConfig, sequences: Sequences, length: int) -> Facts | None:
    """What is assumed of one user's events of which nothing but the items is told, ``(1, L)`` each.

    A second lies between them, they are of the behaviour that is predicted, and without rating.
    """
    if not model.inputs and not model.timed:
        return None
    facts: Facts = {"times": np.arange(length)[None]}
    for each in model.inputs:
        if isinstance(each, BehaviourInput):
            facts["behaviours"] = np.full((1, length), _rows(each, sequences)[max(sequences.target, 0)])
        elif each.kind == "rating":
            facts["ratings"] = np.full((1, length), np.nan, dtype=np.float32)
    return facts


def assumptions(model: ModelConfig, sequences: Sequences) -> str:
    """The same in words, as far as the model looks at it; empty where it looks at items alone."""
    said = ["times a second apart"] * model.timed
    for each in model.inputs:
        if isinstance(each, BehaviourInput):
            said.append(f"behaviour {sequences.behaviour_names[max(sequences.target, 0)]!r}")
        elif each.kind == "rating":
            said.append("no rating")
    return f"assumed of these items: {', '.join(said)}" if said else ""


def require_facts(model: ModelConfig, sequences: Sequences, timed: bool) -> None:
    """Refuse data that does not tell what a model looks at.

    Raises
    ------
    DataError
        Naming what is missing.
    """
    if model.timed and not timed:
        looking = "model.attention time-aware" if model.intervals else "model.inputs hour, weekday and interval"
        raise DataError(f"{sequences.folder}: knows no times of events, which {looking} looks at")
    if model.timed and len(sequences.times) and abs(sequences.times[-1] // sequences.per_second) > _FARTHEST:
        raise DataError(f"{sequences.folder}: times are no seconds since 1970, perhaps thousandths; divide them")
    facts_at(model, sequences, np.zeros(0, dtype=np.int64))


def _told(sequences: Sequences, name: str) -> NDArray[np.generic]:
    values: NDArray[np.generic] | None = getattr(sequences, name)
    if values is None:
        raise DataError(f"{sequences.folder}: knows no {name} of events, which model.inputs looks at")
    return values


def _rows(config: BehaviourInput, sequences: Sequences) -> Ints:
    """Place of each behaviour of the data among an input's names."""
    unknown = [name for name in sequences.behaviour_names if name not in config.names]
    if unknown:
        every = ", ".join(sequences.behaviour_names)
        raise DataError(f"model.inputs behaviour: the data has {unknown[0]!r}, too; name all of {every}")
    return np.array([config.names.index(name) for name in sequences.behaviour_names], dtype=np.int64)
