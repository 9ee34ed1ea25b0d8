"""Who watches a run: a progress bar on a terminal, lines elsewhere, silence on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Observer = Callable[[dict[str, Any]], None]
LINE_SECONDS = 10.0
"""Without a terminal, a line at most so often; validations always."""


@contextmanager
def watching(console: Console, rounds: int, done: int = 0) -> Iterator[Observer]:
    """An observer of the round loop.

    Parameters
    ----------
    console : Console
        Where to; `quiet` says nothing.
    rounds, done : int
        Rounds of the run, and how many a resumed one has behind it.
    """
    if console.is_terminal and not console.quiet:
        with _bar(console) as progress:
            task = progress.add_task("training", total=rounds, completed=done, loss="–", ndcg="–", speed="–")
            yield _on_bar(progress, task)
    else:
        yield _in_lines(console, rounds)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("[bold]validation NDCG@10 {task.fields[ndcg]}"),
        TextColumn("{task.fields[speed]} users/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _on_bar(progress: Progress, task: Any) -> Observer:
    def observe(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            progress.update(task, completed=record["round"], loss=_number(record.get("loss")), speed=_speed(record))
            _warn(progress.console, record)
        else:
            progress.update(task, ndcg=_number(record["ndcg@10"], 4))

    return observe


def _in_lines(console: Console, rounds: int) -> Observer:
    said = monotonic()

    def observe(record: dict[str, Any]) -> None:
        nonlocal said
        _warn(console, record)
        if record["kind"] == "validation":
            hr, ndcg = _number(record["hr@10"], 4), _number(record["ndcg@10"], 4)
            console.print(f"round {record['round']}/{rounds}  validation HR@10 {hr}  NDCG@10 {ndcg}", highlight=False)
        elif monotonic() - said > LINE_SECONDS:
            loss, speed = _number(record.get("loss")), _speed(record)
            console.print(f"round {record['round']}/{rounds}  loss {loss}  {speed} users/s", highlight=False)
        else:
            return
        said = monotonic()

    return observe


def _warn(console: Console, record: dict[str, Any]) -> None:
    for reason, count in record.get("reasons", {}).items():
        console.print(f"[yellow]round {record['round']}: left out {count} update(s): {reason}", highlight=False)


def _speed(record: dict[str, Any]) -> str:
    return f"{record['clients'] / record['seconds']:,.0f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
