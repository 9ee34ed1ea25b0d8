"""Pictures of explanations: a heat map of recommendations over past events, and bars for a terminal."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.errors import UsageError
from common.files import atomic, explained

SUFFIXES = (".png", ".svg")
"""Kinds of files that `heat_map` writes."""
_ITEMS, _EVENTS, _TITLE = 10, 20, 34
_DARK = 0.6
"""Share of the scale from which a cell is so dark that its number is white."""
_TOLD = 0.15
"""Share of the scale from which a cell's number is written into it."""


def heat_map(path: Path, titles: Sequence[str], recommendations: Sequence[str], importance: ArrayLike) -> None:
    """Draw which past events speak for which recommended items, and against them.

    Parameters
    ----------
    path : Path
        File to write, by its suffix a PNG or an SVG.
    titles : sequence of str
        Past events in time order, n; the 20 that matter most are drawn, the oldest on the left.
    recommendations : sequence of str
        Recommended items, best first, m; ten are drawn. What is not drawn is told by its number.
    importance : array_like
        Of each event for each item, ``(m, n)`` finite numbers, as in `client.explaining.Explanation`.

    Raises
    ------
    UsageError
        Where the suffix is another, shapes disagree, nothing is to be drawn, or Matplotlib is missing.
    StateError
        Where the file cannot be written.
    """
    require_picture(path)
    values = _checked(importance, len(recommendations), len(titles))[:_ITEMS]
    shown = _strongest(values)
    values, rows, columns = values[:, shown], recommendations[:_ITEMS], [titles[place] for place in shown]
    left = _left(len(titles) - len(columns), "weaker event"), _left(len(recommendations) - len(rows), "recommendation")
    try:
        figures, canvas = import_module("matplotlib.figure"), import_module("matplotlib.backends.backend_agg")
        context = import_module("matplotlib").rc_context
    except ImportError:
        raise UsageError("this needs Matplotlib: pip install 'hushrec[explain]'") from None
    with (
        warnings.catch_warnings(),
        context({"svg.hashsalt": "hushrec", "font.size": 9}),
        explained(path),
        atomic(path) as temporary,
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in place of a rare letter will do
        figure = figures.Figure(figsize=(3.8 + 0.46 * len(columns), 2.9 + 0.36 * len(rows)), layout="constrained")
        canvas.FigureCanvasAgg(figure)
        _draw(figure, list(map(_short, rows)), list(map(_short, columns)), values, left)
        kind = path.suffix.lower()[1:]
        figure.savefig(temporary, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)


def require_picture(path: Path) -> None:
    """Refuse a path that no heat map can be written to, before anything is computed; errors as in `heat_map`."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a heat map is a {' or a '.join(SUFFIXES)} file; name one of these")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: cannot be a file; name one in a folder that exists")


def bars(console: Console, titles: Sequence[str], importance: ArrayLike, heading: str, width: int = 24) -> None:
    """Print how much each past event speaks for a recommendation, the latest first; against it, in red.

    Parameters
    ----------
    console : Console
        Where to.
    titles : sequence of str
        Past events in time order, n; the 20 that matter most are shown, the others counted.
    importance : array_like
        ``(n,)`` finite numbers.
    heading : str
        What is explained, such as the recommended item's title.
    width : int
        Characters of the longest bar.
    """
    values = _checked(np.asarray(importance)[None], 1, len(titles))
    shown, values = _strongest(values), values[0]
    largest = float(np.abs(values).max()) or 1.0
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("latest first", no_wrap=True)
    table.add_column("importance", no_wrap=True, min_width=width)
    table.add_column("", justify="right", no_wrap=True)
    room = max(8, min(_TITLE, console.width - width - 19))  # what numbers, bars and gaps leave to titles
    for place in reversed(shown):
        bar = Text(_bar(abs(values[place]) / largest, width), "red" if values[place] < 0 else "green")
        title = Text(_short(titles[place], room))
        table.add_row(str(len(titles) - place), title, bar, f"{values[place]:+.3f}")
    console.print(Padding(Text(heading, "bold"), (0, 1)))
    console.print(table)
    if weaker := _left(len(titles) - len(shown), "weaker event"):
        console.print(Padding(Text(weaker, "dim"), (0, 1)))


def _strongest(values: NDArray[np.float64]) -> list[int]:
    """Places in time order of the events whose |importance| for any item ``(m, n)`` is largest; ties to the last."""
    strength = np.abs(values).max(axis=0)[::-1]
    back = np.argsort(-strength, kind="stable")[:_EVENTS]
    return sorted((len(strength) - 1 - back).tolist())


def _left(many: int, what: str) -> str:
    return f"{many} {what}{'s' if many > 1 else ''} not shown" if many else ""


def _draw(figure: Any, rows: list[str], columns: list[str], values: NDArray[np.float64], left: tuple[str, ...]) -> None:
    """Rows are recommendations, columns events; one scale for all cells, two-sided where any is negative.

    What there is besides stands in `left`.
    """
    largest, signed = float(np.abs(values).max()) or 1.0, bool((values < 0).any())
    digits = 1 if largest >= 1 else 2 if largest >= 0.1 else 3
    axes, scale = figure.subplots(1, 2, width_ratios=[max(len(columns), 3), 0.25])
    image = axes.imshow(
        values, cmap="RdBu" if signed else "Blues", vmin=-largest if signed else 0.0, vmax=largest, aspect="auto"
    )
    axes.set_xticks(range(len(columns)), columns, rotation=50, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(rows)), [f"{title}  {place}" for place, title in enumerate(rows, 1)], parse_math=False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)  # gaps between cells
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if abs(value) >= _TOLD * largest:
            shade = "white" if abs(value) > _DARK * largest else "0.2"
            axes.text(column, row, _figure(value, digits), ha="center", va="center", fontsize=7, color=shade)
    figure.suptitle("What speaks for each recommendation", x=0.01, ha="left", fontsize=10, fontweight="bold")
    told = ("Importance of past events, the latest on the right", *filter(None, left))
    figure.supxlabel("\n".join(told), x=0.01, ha="left", fontsize=9, color="0.35")
    bar, ends = figure.colorbar(image, cax=scale), [-largest, 0, largest] if signed else [0, largest]
    bar.outline.set_visible(False)
    bar.set_ticks(ends, labels=[_figure(end, digits) for end in ends])
    scale.tick_params(length=0, labelsize=8)
    scale.set_title("for", color="0.35", fontsize=8)
    if signed:
        scale.set_xlabel("against", color="0.35", fontsize=8, labelpad=7)


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _bar(share: float, width: int) -> str:
    """Eighths of a character make a bar of a share of the width smooth."""
    eighths = int(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _short(title: str, room: int = _TITLE) -> str:
    title = " ".join(title.split())
    return title if len(title) <= room else title[: room - 1].rstrip() + "…"


def _checked(importance: ArrayLike, rows: int, columns: int) -> NDArray[np.float64]:
    values = np.asarray(importance, dtype=np.float64)
    if values.shape != (rows, columns) or not values.size or not np.isfinite(values).all():
        raise UsageError(
            f"importance: {values.shape}, expected finite numbers of {rows} items and {columns} events, at least one"
        )
    return values
