"""How far the explanations of a run's recommendations can be trusted: `hushrec evaluate --explanations`."""

from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from client.evaluation import mask_seen, scores
from client.explaining import attention, ends, integrated_gradients
from client.faithfulness import faithfulness
from client.past import past_of
from common.data.sequences import Split
from common.errors import UsageError
from common.seeding import generator
from simulations.inference import Trained

STEPS = 32
"""Of integrated gradients."""
_NAMES = {
    "combined": "combined, as --explain shows it",
    "gradients": "integrated gradients",
    "attention": "attention rollout",
    "recent": "the latest events first",
    "random": "at random",
}
_MEANING = (
    "Events are taken away, or put in, most important first; the area under the curve of the first recommendation's "
    "log-probability, less that of the whole history. Deletion: the lower, the better; insertion: the higher."
)


def trust(trained: Trained, split: Split, users: int) -> dict[str, Any]:
    """Measure explanations by deletion and insertion, for what is recommended first to some users.

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
        ``recent`` and ``random``; of the global model, whatever stays on devices.

    Raises
    ------
    UsageError
        Where there is nobody, or the run's privacy mode lets no such figures be told.
    """
    device, experiment = trained.device, trained.device.experiment
    judges, stops = trained.judges, np.zeros(len(device.sequences), dtype=np.int64)
    stops[judges], targets = device.sequences.stops(judges, split)
    held = judges[(targets >= 0) & (stops[judges] > device.sequences.starts(judges))]
    if not len(held):
        raise UsageError(f"{trained.folder}: nobody has a {split} event and a history before it; nothing to explain")
    some = np.sort(generator(experiment.seed, "explained-users").permutation(held)[:users])
    first = torch.zeros(len(some), dtype=torch.int64)
    for where, scored in scores(experiment, trained.weights, device.sequences, some, stops[some]):
        masked = mask_seen(scored, device.sequences, some[where], stops[some][where])
        first[torch.from_numpy(where)] = masked.argmax(1)
    model, made = experiment.model, trained.built
    past = past_of(model, device.sequences, some, stops[some])
    importances = {
        "combined": ends(model, made, past, first),
        "gradients": integrated_gradients(model, made, past, first, STEPS).events,
        "attention": attention(model, made, past, first),
        "recent": torch.arange(past.items.shape[1]).float().expand(len(some), -1),
    }
    told = {name: values for name, values in importances.items() if values is not None}
    return faithfulness(model, made, past, first, told, experiment.seed)


def render(console: Console, found: dict[str, Any]) -> None:
    """Print what `trust` found."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("importance", "deletion", "insertion", "drop without 1, 3, 5"):
        table.add_column(name, justify="left" if name == "importance" else "right")
    for name, title in _NAMES.items():
        if name in found["deletion"]:
            drops = (found["drop"][name][k] for k in (0, 2, 4))
            figures = " ".join("–" if drop is None else f"{drop:.2f}" for drop in drops)
            table.add_row(title, f"{found['deletion'][name]:.3f}", f"{found['insertion'][name]:.3f}", figures)
    console.print(Padding(Text(f"Explanations of the first recommendation, {found['users']:,} users", "bold"), (0, 1)))
    console.print(table)
    best = found["best"]
    verdict = f"Most faithful: {_NAMES[best['deletion']]} by deletion, {_NAMES[best['insertion']]} by insertion."
    for line, style in ((verdict, "bold"), (_MEANING, "dim")):
        console.print(Padding(Text(line, style), (0, 1, 1, 1)))
