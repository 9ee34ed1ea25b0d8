"""How far the explanations of a run's recommendations can be trusted: `hushrec evaluate --explanations`."""

from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from client.evaluation import mask_seen, scores
from client.explaining import attention, ends, integrated_gradients
from client.faithfulness import faithfulness
from client.past import Past, apart, past_of
from common.data.sequences import Split
from common.errors import UsageError
from common.seeding import generator
from simulations.causes import known_causes
from simulations.inference import Trained

STEPS = 32
"""Of integrated gradients."""
_NAMES = {
    "combined": "combined (shown)",
    "gradients": "integrated gradients",
    "attention": "attention rollout",
    "recent": "the latest first",
    "random": "at random",
}
_MEANING = (
    "Events are taken away, or put in, most important first; the area under the curve of the first recommendation's "
    "log-probability, less that of the whole history. Deletion: the lower, the better; insertion: the higher. "
    "Loss: how much of it goes with the first 1, 3 and 5. Combined is what --explain shows."
)
_CAUSES = (
    "Cause: the event that did cause the next one, which these synthetic data know, is among the three that "
    "explain it best: of {users:,} users, the share. Who knows the law of the data finds {law:.3f}."
)


def trust(trained: Trained, split: Split, users: int) -> dict[str, Any]:
    """Measure explanations by deletion and insertion, for what is recommended first to some users.

    Where there are several domains, it is recommended in that of the held-out event.

    Parameters
    ----------
    trained : Trained
        The run.
    split : str
        ``validation`` or ``test``; histories end before the held-out event.
    users : int
        How many, drawn from those with a held-out event by the run's seed.

    Returns
    -------
    dict
        As `client.faithfulness.faithfulness`: ``gradients``, ``attention`` (where there is any), ``combined``,
        ``recent`` and ``random``; of the global model, whatever stays on devices. And ``causes``, as
        `simulations.causes.known_causes`.

    Raises
    ------
    UsageError
        Where there is nobody, or the run's privacy mode lets no such figures be told.
    """
    device, experiment = trained.device, trained.device.experiment
    judges, sequences = trained.judges, device.sequences
    stops, targets = sequences.stops(judges, split)
    held = judges[(targets >= 0) & (stops > sequences.starts(judges))]
    if not len(held):
        raise UsageError(f"{trained.folder}: nobody has a {split} event and a history before it; nothing to explain")
    some = np.sort(generator(experiment.seed, "explained-users").permutation(held)[:users])
    stops, targets = sequences.stops(some, split)
    model, made, past = experiment.model, trained.built, past_of(experiment.model, sequences, some, stops)
    first = torch.zeros(len(some), dtype=torch.int64)
    for where, scored in scores(experiment, trained.weights, sequences, some, stops):
        rivals = apart(scored, past.domains, torch.from_numpy(targets[where]))
        first[torch.from_numpy(where)] = mask_seen(rivals, sequences, some[where], stops[where]).argmax(1)

    def explain(past: Past, items: Tensor) -> dict[str, Tensor]:
        importances = {
            "combined": ends(model, made, past, items),
            "gradients": integrated_gradients(model, made, past, items, STEPS).events,
            "attention": attention(model, made, past, items),
            "recent": torch.arange(past.items.shape[1]).float().expand(len(items), -1),
        }
        return {name: values for name, values in importances.items() if values is not None}

    found = faithfulness(model, made, past, first, explain(past, first), experiment.seed)
    return found | {"causes": known_causes(trained, split, some, explain)}


def render(console: Console, found: dict[str, Any]) -> None:
    """Print what `trust` found."""
    causes = found["causes"] and found["causes"]["found"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("importance", "deletion", "insertion", "loss at 1, 3, 5", *(["cause"] if causes else [])):
        table.add_column(name, justify="left" if name == "importance" else "right")
    for name, title in _NAMES.items():
        if name in found["deletion"]:
            drops = (found["drop"][name][k] for k in (0, 2, 4))
            figures = " ".join("–" if drop is None else f"{drop:.2f}" for drop in drops)
            share = [f"{causes['chance' if name == 'random' else name]:.3f}"] if causes else []
            areas = (f"{found[area][name]:.3f}" for area in ("deletion", "insertion"))
            table.add_row(title, *areas, figures, *share)
    console.print(Padding(Text(f"Explanations of the first recommendation, {found['users']:,} users", "bold"), (0, 1)))
    console.print(table)
    best, lines = found["best"], [(_MEANING, "dim")]
    if causes:
        lines.append((_CAUSES.format(users=found["causes"]["users"], law=causes["law"]), "dim"))
    verdict = f"Most faithful: {_NAMES[best['deletion']]} by deletion, {_NAMES[best['insertion']]} by insertion."
    for line, style in ((verdict, "bold"), *lines):
        console.print(Padding(Text(line, style), (0, 1, 1, 1)))
