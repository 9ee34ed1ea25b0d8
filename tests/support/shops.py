"""Two shops of which everything is known: features, domains, items that are held out of training."""

from pathlib import Path

import numpy as np
from rich.console import Console

from common.loading import parse
from simulations import rundir
from simulations.runner import run

ITEMS = 24
"""The first half are toys, the others games."""
TITLES = [f"Title {i}, The (19{60 + i})" for i in range(ITEMS)]


def name(item: int) -> str:
    """Id of an item, in a run with domains."""
    return f"{'toy' if item < ITEMS // 2 else 'game'}/i{item}"


def about(item: int) -> str:
    """What is known of an item, as in a file of features."""
    return f"{'red|small' if item % 3 else 'blue'},{1960 + item}"


def made(folder: Path, *overrides: str, domains: bool = True) -> Path:
    """Files and a finished run, in `run`."""
    rng = np.random.default_rng(0)
    shop = ["toy"] * (ITEMS // 2) + ["game"] * (ITEMS // 2)
    events = [f"u{u},i{i},{t},{shop[i]}" for u in range(60) for t, i in enumerate(rng.choice(ITEMS, 8, replace=False))]
    (folder / "events.csv").write_text("user,item,time,shop\n" + "\n".join(events) + "\n")
    ids = [name(i) if domains else f"i{i}" for i in range(ITEMS)]
    rows = [f"{id_},{about(i)}" for i, id_ in enumerate(ids)]
    (folder / "about.csv").write_text("item,colour,year\n" + "\n".join(rows) + "\n")
    text = f"""
name: shops
data:
  kind: table
  path: {folder}/events.csv
  columns: {{{"domain: shop" if domains else "time: time"}}}
  cold: 0.25
  features:
    source: {folder}/about.csv
    columns: [{{kind: categorical, name: colour, separator: "|"}}, {{kind: numeric, name: year}}]
model: {{dim: 8, blocks: 1, heads: 2, max_length: 6, items: both}}
federation: {{rounds: 3, cohort: 30, local: {{lr: 1}}, optimizer: {{kind: fedadam, lr: 0.05}}}}
evaluation: {{every: 3, new_place: 2, resamples: 100, sampled: 5}}
"""
    experiment = parse(text, overrides=overrides)
    run(experiment, rundir.create(experiment, folder / "run"), Console(quiet=True))
    return folder / "run"
