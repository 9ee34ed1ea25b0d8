"""The command `hushrec`: verbs only. Torch and Flower are imported by the verbs that need them: help comes at once."""

import os
import shlex
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from click.exceptions import ClickException, NoArgsIsHelpError
from click.exceptions import UsageError as BadCommandLine

from common.config import Experiment
from common.errors import HushrecError, Interrupted, TooFewNodes, UsageError
from simulations import cli_ask as ask
from simulations.cli_data import app as data_app
from simulations.cli_deploy import app as deploy_app
from simulations.terminal import AsJson, Config, Overrides, Screen, hush, print_json, read_experiment

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
app.add_typer(deploy_app, name="deploy")


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hushrec {version('hushrec')}")
        raise typer.Exit


@app.callback()
def _hushrec(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Federated, privacy-preserving recommendation: every user is one Flower client.

    Exit codes: 0 done, 1 failed, 2 bad use, configuration or data, 3 privacy budget spent, 4 too few nodes (resumable),
    130 stopped and resumable.
    """


@app.command()
def run(
    config: Annotated[Path | None, typer.Argument(help="An experiment's YAML file.", show_default=False)] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/NAME-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a run directory that was stopped or killed.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also say where a round's time went.")] = False,
    engine: Annotated[
        Literal["vectorized", "sequential", "ray", "deployment"] | None,
        typer.Option(help="Instead of runtime.engine; `deployment` is what --superlink implies."),
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Run on the nodes of this SuperLink (see [cyan]hushrec deploy[/])."),
    ] = None,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="Certificate of the authority that vouches for the SuperLink.")
    ] = None,
) -> None:
    """Train, validate and test an experiment, or resume one.

    [dim]hushrec run configs/quickstart.yaml federation.rounds=50 --out runs/first[/]
    """
    if resume and config and "=" in str(config):  # with --resume no YAML is named, so it is the first override
        config, overrides = None, [str(config), *(overrides or [])]
    if (config is None) == (resume is None):
        raise UsageError("name an experiment's YAML file, or --resume DIR; one of the two")
    if resume and out:
        raise UsageError("--out: a resumed run stays in its own directory; leave it away")
    if (engine == "deployment") > (superlink is not None):
        raise UsageError("--engine deployment: say where, --superlink HOST:PORT, and with which --ca")
    if superlink and engine not in {None, "deployment"}:
        raise UsageError(f"--engine {engine} runs here, --superlink elsewhere; leave one of them away")
    if engine and engine != "deployment":
        overrides = [*(overrides or []), f"runtime.engine={engine}"]
    from simulations import rundir

    experiment = read_experiment(config, overrides) if config else rundir.reopen(resume or Path(), overrides or [])
    place = None if superlink is None else (superlink, authority)
    if place and not (resume and rundir.result(resume)):
        from simulations.deployment.remote import reach

        reach(*place)
    folder = resume or rundir.create(experiment, out, data_here=superlink is None)
    result = rundir.result(folder) or _train(experiment, folder, resume is not None, quiet, as_json, place)
    if as_json:
        print_json(result)
    else:
        from simulations.report import render, render_phases

        render(Screen(), result)
        if profile:
            render_phases(Screen(), result["phases"])


@app.command()
def show(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved experiment and what it would cost, without training."""
    from common.loading import dump

    experiment = read_experiment(config, overrides)
    if not as_json:
        typer.echo(dump(experiment))
    from common.data.catalogue import Catalogue
    from common.data.itemrows import table_rows
    from common.data.prepare import describe, prepare
    from simulations.forecast import forecast, render

    kept = describe(experiment.data)["kept"]
    rows = table_rows(experiment, Catalogue.open(prepare(experiment.data)))
    cost = forecast(experiment, kept["users"], kept["items"], kept["events"] / kept["users"], rows)
    from common.privacy.card import planned

    privacy = planned(experiment, kept["users"], int(cost["parameters"]))
    if as_json:
        print_json({"experiment": experiment.model_dump(mode="json"), "forecast": cost, "privacy": privacy})
    else:
        Screen().print(render(cost))
        if privacy["epsilon"] is not None:
            from simulations.report import render_card

            render_card(Screen(), privacy, "Privacy, when the run is over")


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check an experiment's YAML; all faults at once, each with file, line and key."""
    experiment = read_experiment(config, overrides)
    typer.echo(f"{config}: a valid experiment, {experiment.name!r}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of an experiment, for editors."""
    from common.wording import json_schema

    print_json(json_schema())


app.command()(ask.evaluate)
app.command()(ask.recommend)


@app.command()
def certify(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prove that every engine computes the same, and the same as centralised training; exit 1 where it does not."""
    from simulations.certify import certify as make
    from simulations.report import render_checks

    checks = make(read_experiment(config, overrides), Screen(stderr=True).print)
    passed = all(check.passed for check in checks)
    if as_json:
        print_json({"checks": [{**check._asdict(), "passed": check.passed} for check in checks], "passed": passed})
    else:
        render_checks(Screen(), checks)
    if not passed:
        raise typer.Exit(1)


@app.command()
def pooled(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train the same model on everybody's data in one pool, to see what federation costs."""
    from simulations import pooled as loop
    from simulations.report import render_pooled

    result = loop.train(read_experiment(config, overrides), Screen(stderr=True).print)
    if as_json:
        print_json(result)
    else:
        render_pooled(Screen(), result)


@app.command()
def bench(
    workload: Annotated[
        str, typer.Option(help="Such as ml-1m-1step, beauty-5step, population-1000000; or attention, by length.")
    ] = "ml-1m-1step",
    engines: Annotated[
        str, typer.Option(help="The first is compared with the others.")
    ] = "vectorized,naive,centralised",
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each engine; they take turns.")] = 3,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Worker processes of the vectorized engine; by default one a core, 0 trains in its main process.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure clients per second of several engines, in turn, and their ratios; or what attention costs."""
    from simulations.report import render_attention, render_bench

    if workload == "attention":
        from simulations.bench_attention import bench_attention

        costs = bench_attention(repeats, Screen(stderr=True).print)
        print_json(costs) if as_json else render_attention(Screen(), costs)
        return
    from simulations.bench import bench as measure

    workers = (os.cpu_count() or 1) if workers is None else workers
    found = measure(workload, _items(engines), repeats, workers, Screen(stderr=True).print)
    if as_json:
        print_json(found)
    else:
        render_bench(Screen(), found)


def main() -> None:
    """Entry point: a fault that people can mend is one line and an exit code, never a traceback."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    # Threads of OpenMP wait by spinning; on a busy machine they then starve one another, and a round takes fifty times
    # as long. Read by libgomp when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    code = _exit_code()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # Where Ray does not come up, Flower leaves a thread behind that would keep this process for ever.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code() -> int:
    code: object = 0
    try:
        code = app(standalone_mode=False)
    except (Interrupted, TooFewNodes) as stop:
        code = stop.exit_code
        typer.echo(str(stop), err=True)
    except HushrecError as fault:
        code = _explain(str(fault), fault.exit_code)
    except NoArgsIsHelpError as fault:
        code = fault.exit_code
        fault.show()
    except ClickException as fault:
        verb = fault.ctx.command_path if isinstance(fault, BadCommandLine) and fault.ctx else "hushrec"
        code = _explain(f"{fault.format_message().rstrip('.')} (see {verb} --help)", fault.exit_code)
    except MemoryError as fault:
        code = _explain(f"out of memory: {fault}; lower model.dim, data.items or federation.cohort", 1)
    except OSError as fault:
        if fault.filename is None:  # a write to stdout failed, as on a full disk
            hush(sys.stdout.fileno())
        code = _explain(f"{fault.filename or 'standard output'}: {fault.strerror}", 1)
    except SystemExit:  # click's answer where the reader of stdout, such as `head`, has seen enough
        hush(sys.stdout.fileno())
    return code if isinstance(code, int) else 0


def _explain(text: str, exit_code: int) -> int:
    for line in text.splitlines():
        typer.echo(f"error: {line}", err=True)
    return exit_code


def _train(
    experiment: Experiment,
    folder: Path,
    resume: bool,
    quiet: bool,
    as_json: bool,
    place: tuple[str, Path | None] | None,
) -> dict[str, Any]:
    screen = Screen(stderr=True, quiet=quiet)
    try:
        if place:
            from simulations.deployment.remote import run as run_remotely

            return run_remotely(experiment, folder, screen, *place, resume)
        from simulations.runner import run as run_experiment

        return run_experiment(experiment, folder, screen, resume)
    except (Interrupted, KeyboardInterrupt, TooFewNodes) as stop:
        if as_json:
            print_json({"run_dir": str(folder), "status": "stopped"})
        why = str(stop) or "stopped at once"
        kind = TooFewNodes if isinstance(stop, TooFewNodes) else Interrupted
        command = f"hushrec run --resume {shlex.quote(str(folder))}"
        if place:
            from simulations.deployment.remote import resumption

            command = resumption(folder, *place)
        raise kind(f"{why}; go on with: {command}") from stop


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
