"""The verbs `hushrec deploy …`: a server and its nodes as separate processes, on this machine or on many."""

from pathlib import Path
from typing import Annotated

import typer

from simulations.terminal import AsJson, Config, Overrides, Screen, note, print_json, read_experiment

app = typer.Typer(no_args_is_help=True, help="Set up and run a server and its nodes, over real machines.")

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="What [cyan]hushrec deploy init[/] made.", show_default=False)
]


@app.command("init")
def deploy_init(
    config: Config,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.", show_default=False)],
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes share the users.", show_default=False)],
    overrides: Overrides = None,
    singles: Annotated[int, typer.Option(min=0, help="How many nodes have one user each, as devices do.")] = 0,
    host: Annotated[str, typer.Option(help="Name or address by which nodes call the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's only port.")] = 9443,
    node_port: Annotated[
        int, typer.Option(help="Port of the first node, for itself only; the next has the next.")
    ] = 9500,
) -> None:
    """Make a deployment's folder: certificates, keys, each node's own data, start scripts, units for systemd.

    [dim]hushrec deploy init configs/quickstart.yaml --out deployment --nodes 4 --singles 2[/]
    """
    experiment = read_experiment(config, overrides)
    from simulations.deployment.folder import init

    init(experiment, out, nodes, host, port, singles, node_port)
    note(f"see {out}/README.md: what is secret, what starts first")
    typer.echo(out)


@app.command("up")
def deploy_up(folder: Folder) -> None:
    """Start the server and all nodes on this machine, and wait until they are there; they outlive this command."""
    from simulations.deployment.processes import up

    up(folder, note)


@app.command("status")
def deploy_status(folder: Folder, as_json: AsJson = False) -> None:
    """Say which processes run."""
    from simulations.deployment.processes import status

    found = status(folder)
    if as_json:
        print_json({"processes": [each._asdict() for each in found]})
        return
    from rich.table import Table

    table = Table("process", "state", "pid", "users", box=None, header_style="dim")
    for each in found:
        table.add_row(each.name, each.state, str(each.pid or ""), f"{each.users:,}" if each.users else "")
    Screen().print(table)


@app.command("down")
def deploy_down(folder: Folder) -> None:
    """Stop the nodes and the server; does nothing where they are stopped."""
    from simulations.deployment.processes import down

    down(folder)


@app.command("check")
def deploy_check(
    data: Annotated[Path, typer.Argument(help="A node's data folder.", show_default=False)],
    catalogue: Annotated[
        str | None, typer.Option(help="Version that its catalogue must have.", show_default=False)
    ] = None,
) -> None:
    """Check a node's data before it takes part; exit 2 where it must not."""
    from simulations.deployment.folder import check

    known = check(data, catalogue)
    typer.echo(f"{data}: {known.users:,} user(s), catalogue {known.version}")
