"""The verbs that ask a finished run."""

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from common.errors import UsageError
from simulations.terminal import AsJson, Screen, note, print_json

RunDir = Annotated[Path, typer.Option("--run", help="Directory of a finished run.", show_default=False)]


def evaluate(
    folder: RunDir,
    split: Annotated[str, typer.Option(help="[cyan]validation[/] or [cyan]test[/].")] = "test",
    ranks: Annotated[Path | None, typer.Option(help="Write each user's ranks to this CSV file.")] = None,
    explanations: Annotated[
        int | None,
        typer.Option(min=1, metavar="USERS", help="Measure explanations for so many users instead (see --explain)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rank every user's held-out item with a finished run's model."""
    if split not in {"validation", "test"}:
        raise UsageError(f"--split {split}: must be validation or test")
    if explanations and ranks:
        raise UsageError("--explanations measures explanations; write --ranks without it")
    part: Literal["validation", "test"] = "validation" if split == "validation" else "test"
    if explanations is not None:
        from simulations.inference import Trained
        from simulations.trust import render, trust

        found = trust(Trained(folder), part, explanations)
        print_json(found) if as_json else render(Screen(), found)
        return
    from simulations.inference import evaluate as evaluate_run

    figures = evaluate_run(folder, part, ranks)
    if as_json:
        print_json(figures)
    else:
        from simulations.report import render_evaluation

        render_evaluation(Screen(), figures)


def recommend(
    folder: RunDir,
    user: Annotated[str | None, typer.Option(help="Somebody in the data.", show_default=False)] = None,
    history: Annotated[
        str | None, typer.Option(help="ITEM,ITEM,… in time order, by id or title, for anybody.", show_default=False)
    ] = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="Also say which past events speak for it (needs the `explain` extra).")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw them as a heat map, .png or .svg; implies --explain.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Answer events on standard input, one JSON line each, with lines.")
    ] = False,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many; of each domain, where there are several.")] = 10,
    domain: Annotated[
        str | None, typer.Option(help="Of this domain only; without it of each, one list after another.")
    ] = None,
    new: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also items that came after training: CSV, TSV, Parquet or JSON of features."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recommend items to a user; what the user had before is left out."""
    if (user is not None) + (history is not None) + watch != 1:
        raise UsageError("name --user ID, --history ITEM,ITEM,… or --watch; one of the three")
    if watch and (explained or picture):
        raise UsageError("--watch answers at once; explain with --user or --history")
    if new and (explained or picture):
        raise UsageError("--explain speaks of the catalogue's items; leave --new away")
    if picture:
        from simulations.heatmap import require_picture

        require_picture(picture)
    from client.facts import assumptions
    from simulations.inference import Trained
    from simulations.naming import listed

    trained = Trained(folder, domain, new)
    if watch:
        from simulations.watching import watch as answer

        with suppress(KeyboardInterrupt):  # as good an end as that of the lines
            answer(trained, io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace"), k, sys.stdout)
        return
    if user is not None:
        person = trained.known(user)
    else:
        catalogue = trained.device.catalogue
        person = trained.stranger(listed(history or "", [*catalogue.item_ids(), *catalogue.titles()]))
        note(assumptions(trained.device.experiment.model, trained.device.sequences))
    items = trained.top(person, k)
    if explained or picture:
        from simulations.explained import draw, reasons, render

        items = reasons(trained, person, items)
        if picture:
            draw(picture, items)
    if as_json:
        print_json({"user": user, "items": items})
        return
    from simulations.report import render_items

    render_items(Screen(), items)
    if explained or picture:
        render(Screen(), items)
