"""From the ranks of held-out items to figures: of everybody, of groups of users, and of each other way to rank."""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from client.device import Device
from client.evaluation import shelf_ranks
from common.data.holdout import cold_of, concerning
from common.data.sequences import Split
from common.metrics import Ranking, Ranks, summarise
from common.models.weights import Weights

RESERVED = re.compile(r"s\d+|cold|warm|new|personal|user|rank")
"""Marks of other figures, which a domain of that name does not take over."""


def marked(device: Device, weights: Weights, ranking: Ranking, split: Split) -> dict[str, Ranks]:
    """Ranks behind every figure, by the mark in its name: those of ``hr@10|cold`` by ``cold``; the main ones by none.

    Parameters
    ----------
    device : Device
        Whose users are ranked.
    weights : Weights
        The model.
    ranking : Ranking
        Of all users, ``(N,)`` each.
    split : str
        ``validation``, in which nobody's item is new, or ``test``.

    Returns
    -------
    dict of str to ndarray
        ``(N,)`` each, NaN for a user who is not of the group; groups are those of `data.cold` and the domains.
    """
    experiment, (full, sampled, personal) = device.experiment, ranking
    found = {"": full}
    if experiment.evaluation.sampled:
        found[f"s{experiment.evaluation.sampled}"] = sampled
    if np.isfinite(personal).any():
        found["personal"] = personal
    if experiment.data.cold and split == "test":
        cold = cold_targets(device)
        shelf, tested = np.full(len(full), np.nan), np.flatnonzero(cold & np.isfinite(full))
        shelf[tested] = shelf_ranks(experiment, weights, device.sequences, tested)
        found |= {"cold": np.where(cold, full, np.nan), "warm": np.where(cold, np.nan, full), "new": shelf}
    for name, inside in domain_targets(device, split).items():
        mark = f"domain {name}" if RESERVED.fullmatch(name) else name
        found[mark] = np.where(inside, full, np.nan)
    return found


def figures(device: Device, ranks: Mapping[str, Ranks]) -> dict[str, dict[str, float]]:
    """HR, NDCG and MRR with their intervals, from `marked` ranks; as `result.json` has them."""
    evaluation, seed = device.experiment.evaluation, device.experiment.seed
    cutoffs = sorted({10, *evaluation.cutoffs})
    return {
        f"{name}|{mark}" if mark else name: figure._asdict()
        for mark, some in ranks.items()
        for name, figure in summarise(some, cutoffs, evaluation.resamples, seed).items()
    }


def domain_names(device: Device) -> list[str]:
    """Of a catalogue with several domains, in each of which items are ranked for themselves; else none."""
    return [] if device.sequences.domains is None else list(device.sequences.domain_names)


def cold_targets(device: Device) -> NDArray[np.bool_]:
    """Whose test item no training has seen (see `data.cold`), ``(N,)``."""
    _, targets = device.sequences.stops(np.arange(len(device.sequences)), "test")
    return concerning(targets, cold_of(device.experiment.data, device.catalogue.items))


def domain_targets(device: Device, split: Split) -> dict[str, NDArray[np.bool_]]:
    """Whose held-out item is in which domain, ``(N,)`` by name; none where there is only one domain."""
    if device.sequences.domains is None:
        return {}
    _, targets = device.sequences.stops(np.arange(len(device.sequences)), split)
    found = np.where(targets >= 0, device.sequences.domains[np.maximum(targets, 0)], -1)
    return {name: found == number for number, name in enumerate(device.sequences.domain_names)}
