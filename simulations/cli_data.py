"""The verbs `hushrec data …`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from simulations.terminal import AsJson, Config, Overrides, Screen, note, print_json, read_experiment

app = typer.Typer(no_args_is_help=True, help="Prepare, describe and download data sets.")


@app.command("prepare")
def data_prepare(config: Config, overrides: Overrides = None) -> None:
    """Read, filter and split a data set into memory-mapped arrays; reused as long as nothing changes."""
    from common.data.prepare import bad_rows, prepare

    folder = prepare(read_experiment(config, overrides).data)
    note(bad_rows(folder))
    typer.echo(folder)


@app.command("describe")
def data_describe(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count users, items and events, as read and after the filters, and the items that each feature knows."""
    from common.data.itemrows import known
    from common.data.prepare import bad_rows, describe, prepare

    data = read_experiment(config, overrides).data
    folder = prepare(data)
    features = known(folder)
    facts = describe(data) | ({"features": features} if features else {})
    note(bad_rows(folder))
    if as_json:
        print_json(facts)
    else:
        from simulations.report import render_data

        render_data(Screen(), facts)
        for name, items in features.items():
            typer.echo(f" feature {name}: known of {items:,} of {facts['kept']['items']:,} items")


@app.command("download")
def data_download(
    name: Annotated[str, typer.Argument(help="ml-100k, ml-1m or ml-latest-small.")],
    to: Annotated[Path | None, typer.Option(help="Folder; by default $HUSHREC_DATA, else ./data.")] = None,
) -> None:
    """Fetch a MovieLens data set from its official address, and say under which terms."""
    from simulations.download import download, licence

    typer.echo(licence(name), err=True)
    typer.echo(download(name, to or Path(os.environ.get("HUSHREC_DATA") or "data")))
