"""Who watches a run: a progress bar on a terminal, lines elsewhere, silence on request."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Observer = Callable[[dict[str, Any]], None]
LINE_SECONDS = 10.0
"""Without a terminal, a line at most so often; validations always."""
_WIDE = 100  # columns of a terminal with room for long labels


@contextmanager
def watching(console: Console, rounds: int) -> Iterator[Observer]:
    """An observer of the round loop.

    Parameters
    ----------
    console : Console
        Where to; `quiet` says nothing.
    rounds : int
        Rounds of the whole run.

    Yields
    ------
    callable
        Takes each line of `metrics.jsonl`.
    """
    if console.is_terminal and not console.quiet:
        with _bar(console) as progress:
            task = progress.add_task("training", total=rounds, loss="–", ndcg="–", speed="–")
            yield _on_bar(progress, task)
    else:
        yield _in_lines(console, rounds)


def _bar(console: Console) -> Progress:
    quality = "validation NDCG@10" if console.width >= _WIDE else "NDCG@10"
    return Progress(
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn(f"[bold]{quality} {{task.fields[ndcg]}}"),
        TextColumn("{task.fields[speed]} users/s"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
    )


def _on_bar(progress: Progress, task: TaskID) -> Observer:
    warn = _warner(progress.console)

    def observe(record: dict[str, Any]) -> None:
        warn(record)
        if record["kind"] == "train":
            progress.update(task, completed=record["round"], loss=_number(record.get("loss")), speed=_speed(record))
        elif record["kind"] == "validation":
            progress.update(task, ndcg=_number(record["ndcg@10"], 4))

    return observe


def _in_lines(console: Console, rounds: int) -> Observer:
    warn, said, training = _warner(console), monotonic(), ""

    def observe(record: dict[str, Any]) -> None:
        nonlocal said, training
        warn(record)
        quality = ""
        if record["kind"] == "validation":
            hr, ndcg = _number(record["hr@10"], 4), _number(record["ndcg@10"], 4)
            quality = f"  validation HR@10 {hr}  NDCG@10 {ndcg}"
        elif record["kind"] == "train":
            training = f"loss {_number(record.get('loss'))}  {_speed(record)} users/s"
        if quality or monotonic() - said > LINE_SECONDS:
            console.print(f"round {record['round']}/{rounds}  {training}{quality}", highlight=False, soft_wrap=True)
            said = monotonic()

    return observe


def _warner(console: Console) -> Observer:
    """Say each reason for which updates were left out once; `metrics.jsonl` has them all."""
    known: set[str] = set()

    def warn(record: dict[str, Any]) -> None:
        for reason, count in record.get("reasons", {}).items():
            if reason not in known:
                text = f"round {record['round']}: left out {count} update(s): {reason}; later ones are not shown"
                console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
        known.update(record.get("reasons", {}))
        if record["kind"] == "void":
            console.print(
                f"round {record['round']}: {record.get('lost', 'too many')} nodes did not answer; it is repeated",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )

    return warn


def _speed(record: dict[str, Any]) -> str:
    return f"{record['clients'] / record['seconds']:,.0f}" if "seconds" in record else "–"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
