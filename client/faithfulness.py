"""How far importances of events can be trusted: what becomes of a recommendation when events have never been."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.past import Past, log_probability
from common.errors import UsageError
from common.models.schema import ModelConfig
from common.models.weights import Weights
from common.seeding import generator


def faithfulness(
    model: ModelConfig,
    weights: Weights,
    past: Past,
    targets: Tensor,
    importances: Mapping[str, Tensor],
    seed: int,
    *,
    draws: int = 5,
    most: int = 5,
    grid: int = 10,
) -> dict[str, Any]:
    """Deletion and insertion (Petsiuk et al., BMVC 2018): what becomes of an item when events have never been.

    Events go in the order of their importance, most important first, or come in that order; the shorter history is
    encoded anew. One event always stays. Curves are over the share of the others that is gone, or there, from 0 to 1.

    Parameters
    ----------
    model, weights, past, targets
        As in `integrated_gradients`; histories of one event are left out.
    importances : Mapping of str to Tensor
        ``(C, L)`` each, any scale; among equals the last events count more.
    seed : int
        Of the random orders.
    draws : int
        Random orders, whose mean is the result's ``random``.
    most : int
        Events of the drops.
    grid : int
        Steps of the curves.

    Returns
    -------
    dict
        ``users``; by name, ``random`` included, ``deletion`` and ``insertion``: areas under the curves of the
        log-probability less that of the whole history (low, and high, is good), ``drop``: by how much it is lower
        without the first 1, 2, … `most` events, over users who have more, or None; ``beats_random``: names that do so
        in both areas; ``best``: the best name by each measure, of drops by their mean.
    """
    some = past.lengths > 1
    past, targets = past.pick(some), targets[some]
    if not len(targets):
        raise UsageError("faithfulness wants histories of two events at least")
    rng, spare = generator(seed, "explaining"), past.lengths - 1
    orders = {name: [values[some]] for name, values in importances.items()}
    orders["random"] = [torch.from_numpy(rng.random(tuple(past.items.shape))) for _ in range(draws)]
    whole = log_probability(model, weights, past, targets)

    def change(keep: Tensor, rows: Tensor) -> float:
        if not rows.any():
            return float("nan")
        left = log_probability(model, weights, past.pick(rows).only(keep[rows]), targets[rows])
        return float((left - whole[rows]).mean())

    curves: dict[str, list[NDArray[np.float64]]] = {}
    for name, values in orders.items():
        for each in values:
            place = _places(each, past.real)  # (C, L)
            steps = [(spare * (step / grid)).round().long().unsqueeze(1) for step in range(grid + 1)]
            everybody = past.lengths > 0
            gone = np.array([change(place >= step, everybody) for step in steps])
            there = np.array([change(place <= step, everybody) for step in steps])
            drops = np.array([-change(place >= k, spare >= k) for k in range(1, most + 1)])
            areas = (float((curve[1:] + curve[:-1]).mean() / 2) for curve in (gone, there))
            curves.setdefault(name, []).append(np.array([*areas, *drops]))
    means = {name: np.mean(found, axis=0) for name, found in curves.items()}
    deletion, insertion = ({name: float(mean[i]) for name, mean in means.items()} for i in (0, 1))
    drop = {name: [None if np.isnan(x) else float(x) for x in mean[2:]] for name, mean in means.items()}
    ahead = [
        name for name in importances if deletion[name] < deletion["random"] and insertion[name] > insertion["random"]
    ]
    best = {
        "deletion": min(deletion, key=deletion.__getitem__),
        "insertion": max(insertion, key=insertion.__getitem__),
        "drop": max(means, key=lambda name: float(np.nansum(means[name][2:]))),
    }
    return {
        "users": len(targets),
        "deletion": deletion,
        "insertion": insertion,
        "drop": drop,
        "beats_random": ahead,
        "best": best,
    }


def _places(importance: Tensor, real: Tensor) -> Tensor:
    """Place of each event in the order of importance, from 0, ``(C, L)``; of equals the last comes first."""
    backwards = importance.masked_fill(~real, -torch.inf).flip(1)
    return backwards.argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)
