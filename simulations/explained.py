"""What `hushrec recommend --explain` says: which past events and which features speak for each recommendation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from client.explaining import Explanation, explain
from client.past import domains_of
from common.data import itemrows
from common.errors import UsageError
from common.models.items import mixture_of
from simulations.heatmap import bars, heat_map
from simulations.inference import Person, Trained

_MEANING = (
    "Importance: what an event adds to the item's log-probability, as the only event (beyond what the others add so) "
    "and as one more; the mean of both."
)
_MISSED = "Integrated gradients{whence} miss {gap:.3f} of {shares:.3f}: rely on the bars."
FEATURES = 5
"""Features that are told of an item."""
GAP = 0.05
"""Share of all that gradients say, for and against, from which on their gap is warned of. Not of the change that they
explain: that is near 0 where events cancel."""


def reasons(trained: Trained, person: Person, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Explain recommendations.

    Parameters
    ----------
    trained : Trained
        The run.
    person : Person
        Who is recommended to.
    items : list of dict
        What was recommended, from `Trained`.

    Returns
    -------
    list of dict
        The items, each with ``because``: past events in time order, each with ``item``, ``title``, ``importance`` (what
        it adds to the log-probability of the item) and, beside it, ``gradients`` and ``attention``; ``gap``, by how
        much the sum of ``gradients`` is wrong; and, where items are made of features, ``features``: those that say
        most, by name and importance, which are parts of ``gradients``.
    """
    experiment, catalogue = trained.device.experiment, trained.device.catalogue
    ids, titles = catalogue.item_ids(), catalogue.titles()
    numbers, past = {name: number for number, name in enumerate(ids)}, person.past
    targets = torch.tensor([numbers[item["item"]] for item in items])
    mixture = mixture_of(experiment, catalogue.folder)
    often = past.pick(torch.zeros(len(items), dtype=torch.int64))._replace(domains=domains_of(trained.device.sequences))
    found = explain(experiment.model, person.weights, often, targets, mixture)
    events = past.items[0, : int(past.lengths[0])].tolist()
    own = catalogue.items if experiment.model.items == "both" else 0
    named = _features(found, catalogue.folder, own) if found.parts is not None else {}
    told = []
    for row, item in enumerate(items):
        because = []
        for place, event in enumerate(events):
            kinds = {"importance": found.combined, "gradients": found.gradients, "attention": found.attention}
            told_by = {name: round(float(part[row, place]), 4) for name, part in kinds.items() if part is not None}
            because.append({"item": ids[event], "title": titles[event], **told_by})
        gap = round(float(found.gap[row]), 4)
        told.append({**item, "because": because, "gap": gap} | ({"features": named[row]} if row in named else {}))
    return told


def _features(found: Explanation, folder: Path, own: int) -> dict[int, list[dict[str, Any]]]:
    """The features of past events that speak most for each explained item."""
    if found.parts is None:
        return {}
    names = np.array(row_names(folder))
    rows = found.parts.rows.numpy() - own  # rows of items come first, where there are such
    batch, values = found.parts.events[:, 0].numpy(), found.parts.values.numpy()
    told: dict[int, list[dict[str, Any]]] = {}
    for row in range(len(found.combined)):
        here = (batch == row) & (rows >= 0)
        kinds, place = np.unique(names[rows[here]], return_inverse=True)
        sums = np.bincount(place, values[here], minlength=len(kinds))
        best = np.argsort(-np.abs(sums))[:FEATURES]
        told[row] = [{"feature": str(kinds[i]), "importance": round(float(sums[i]), 4)} for i in best]
    return told


def row_names(folder: Path) -> list[str]:
    """What each feature row of a prepared folder stands for; numbers of one dense feature have one name."""
    known = itemrows.load(folder)
    if known is None:
        raise itemrows.unknown_features(folder)
    fitted = json.loads((folder / itemrows.FITTED).read_text())["columns"]
    names: list[str] = []
    for feature, size in zip(fitted, known.groups, strict=True):
        values = [f"{feature['name']}: {value}" for value in feature.get("vocabulary", [])]
        more = f"{feature['name']}: rare" if values else feature["name"]
        names += values[:size] + [more] * (size - len(values))
    return names


def render(console: Console, items: list[dict[str, Any]]) -> None:
    """Print why the first of some recommendations is one."""
    if not items:
        return
    first = items[0]
    titles = [reason["title"] for reason in first["because"]]
    bars(console, titles, [reason["importance"] for reason in first["because"]], f"Why {first['title']}")
    if first.get("features"):
        said = ", ".join(f"{each['feature']} {each['importance']:+.3f}" for each in first["features"])
        console.print(Padding(Text(f"By features of all events: {said}"), (0, 1)))
    shares = sum(abs(reason["gradients"]) for reason in first["because"])
    if first["gap"] > GAP * shares:
        whence = ", hence features," if first.get("features") else " (in --json)"
        console.print(Padding(Text(_MISSED.format(whence=whence, gap=first["gap"], shares=shares), "yellow"), (0, 1)))
    console.print(Padding(Text(_MEANING, "dim"), (0, 1)))


def draw(path: Path, items: list[dict[str, Any]]) -> None:
    """Draw a heat map of some recommendations over the past events; errors as in `heat_map`."""
    if not items:
        raise UsageError(f"{path}: nothing is recommended, so there is nothing to draw")
    titles = [reason["title"] for reason in items[0]["because"]]
    values = [[reason["importance"] for reason in item["because"]] for item in items]
    heat_map(path, titles, [item["title"] for item in items], values)
