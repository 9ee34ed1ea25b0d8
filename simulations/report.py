"""The table at the end of a run, and what its numbers mean."""

from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = ("hr@10", "ndcg@10", "mrr")
_NAMES = {
    "popularity": "popularity ranker",
    "random": "random ranker",
    "ceiling": "best possible (the data's law is known)",
}


def render(console: Console, result: dict[str, Any]) -> None:
    """Print a run's result, as it stands in `result.json`, for people."""
    table = Table(title="Test: each user's last item, ranked against the whole catalogue", title_justify="left")
    table.add_column("")
    for name in SHOWN:
        table.add_column(name.upper(), justify="right")
    table.add_row("[bold]hushrec, federated", *(_cell(result["test"][name], bold=True) for name in SHOWN))
    for baseline, figures in result["baselines"].items():
        table.add_row(_NAMES[baseline], *(_cell(figures[name]) for name in SHOWN))
    console.print(table)
    sampled = {name: figure for name, figure in result["test"].items() if "|" in name}
    if sampled:
        _render_sampled(console, sampled)
    console.print(
        "HR@10: share of users whose next item is among the first ten. NDCG@10: the same, worth more the higher it\n"
        "stands. MRR: mean of 1/rank. In brackets the 95 % interval over users.",
        style="dim",
        highlight=False,
    )
    ceiling = result["baselines"].get("ceiling")
    if ceiling and ceiling["hr@10"]["value"]:
        share = result["test"]["hr@10"]["value"] / ceiling["hr@10"]["value"]
        console.print(f"That is {share:.0%} of the HR@10 that the best possible ranker reaches.", highlight=False)
    console.print(
        f"{result['users']:,} users, one client each; {result['rounds']} rounds, validation chose round "
        f"{result['best_round']}; {result['seconds']:.0f} s, {result['clients_per_second']:,.0f} clients/s, "
        f"{result['peak_rss_mb']:,.0f} MB at most;\na client received {_size(result['bytes_down_per_client'])} "
        f"and sent {_size(result['bytes_up_per_client'])} a round. All files: {result['run_dir']}",
        highlight=False,
        soft_wrap=True,
    )


def _render_sampled(console: Console, figures: dict[str, Any]) -> None:
    """Figures against sampled negatives: never in one table with full ones."""
    table = Table(title="Against sampled negatives: for comparison with old papers only", title_justify="left")
    for name in figures:
        table.add_column(name.upper(), justify="right")
    table.add_row(*(_cell(figure) for figure in figures.values()))
    console.print(table)


def _cell(figure: dict[str, float | None], bold: bool = False) -> str:
    if figure["value"] is None:
        return "–"
    value = f"{figure['value']:.4f}"
    return f"{f'[bold]{value}[/]' if bold else value} [dim]({figure['low']:.4f} – {figure['high']:.4f})[/]"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def render_evaluation(console: Console, figures: dict[str, Any]) -> None:
    """Print what `hushrec evaluate` found."""
    table = Table(
        title=f"{figures['split'].capitalize()}: {figures['users']:,} users, full ranking", title_justify="left"
    )
    table.add_column("metric")
    table.add_column("value (95 % interval)", justify="right")
    for name, figure in figures["metrics"].items():
        table.add_row(name.upper(), _cell(figure))
    meanings = {
        "coverage@10": "share of the catalogue in anybody's top 10",
        "long_tail@10": "share of top-10 places for the 80 % least popular items",
        "worst_tenth_ndcg@10": "NDCG@10 of the tenth with the shortest histories",
    }
    for name, meaning in meanings.items():
        table.add_row(meaning, f"{figures[name]:.4f}")
    console.print(table)


def render_items(console: Console, items: list[dict[str, Any]]) -> None:
    """Print recommendations."""
    table = Table()
    for name in ("", "item", "title", "genres", "score"):
        table.add_column(name, justify="right" if name == "score" else "left")
    for place, item in enumerate(items, 1):
        title = "" if item["title"] == item["item"] else item["title"]
        table.add_row(str(place), item["item"], title, ", ".join(item["genres"]), f"{item['score']:.2f}")
    console.print(table)


def render_data(console: Console, facts: dict[str, Any]) -> None:
    """Print what a data set holds."""
    table = Table(title="As read, and after the filters", title_justify="left")
    for name in ("", "as read", "kept"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("users", "items", "events"):
        table.add_row(name, f"{facts[name]:,}", f"{facts['kept'][name]:,}")
    table.add_row("events a user, mean", f"{facts['mean_length']:.1f}", "")
    table.add_row("density", f"{facts['density']:.4%}", "")
    tied = facts["tied_last_pair_share"]
    table.add_row("users whose last two events share a time", "no times" if tied is None else f"{tied:.0%}", "")
    console.print(table)
