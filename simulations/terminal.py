"""What all verbs of the command line share: common arguments, and how they read and print."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.config import Experiment
from common.files import json_text

Config = Annotated[Path, typer.Argument(help="An experiment's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Overrides by dotted key, such as [cyan]federation.rounds=50 model.dim=32[/].", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else on stderr.")]


class Screen(Console):
    """A console whose reader, such as `head`, may leave before the end; the run goes on without it."""

    def on_broken_pipe(self) -> None:
        """Say no more."""
        self.quiet = True
        hush(self.file.fileno())


def hush(descriptor: int) -> None:
    """Let everything that is still written there vanish, or Python would complain about it once more on leaving."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def read_experiment(config: Path, overrides: list[str] | None) -> Experiment:
    """Read and validate an experiment; errors as in `common.loading.load`."""
    from common.loading import load

    return load(config, overrides or [])


def note(text: str) -> None:
    """Say something beside the result, if there is anything to say."""
    if text:
        typer.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print one JSON value for a program to read."""
    typer.echo(json_text(value, indent=2))
