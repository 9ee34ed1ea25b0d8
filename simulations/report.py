"""What people see at the end of a command, and what its numbers mean."""

import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.privacy.card import advice

_PARTS = {
    "s": "Against sampled negatives: for comparison with old papers only",
    "personal": "With what stays on each device, and is fine-tuned there",
    "cold": "Users whose last item no training has seen; by chance HR@10 would be ten in the catalogue",
    "warm": "All other users",
    "new": "Users whose last item no training has seen, ranked among such items alone: a shelf of what is new",
}
"""Figures beside the main ones, by how their names go on."""
_SAMPLED = re.compile(r"s\d+")
SHOWN = ("hr@10", "ndcg@10", "mrr")
_NAMES = {"ceiling": "best possible"}
_EXPLAINED = (
    "HR@10: share of users whose next item is among the first ten. NDCG@10: the same, worth more the higher the item "
    "stands. MRR: mean of 1/rank. The interval is over users."
)
_BEYOND_ACCURACY = {
    "coverage@10": "share of the catalogue in anybody's top 10",
    "long_tail@10": "share of top-10 places for the 80 % least popular items",
    "worst_tenth_ndcg@10": "NDCG@10 of the tenth with the shortest histories",
}

_PHASES = {
    "asking": "sampling users and writing their messages",
    "training": "local training of the cohort, or waiting for workers that do it",
    "answering": "carrying messages, and the clients' replies; under Ray and over a network training, too",
    "checking": "holding each reply against shapes, types, norms and sender",
    "summing": "one weighted sum of all updates",
    "stepping": "the server's optimiser",
    "rest": "copying weights, writing metrics",
}


def render(console: Console, result: dict[str, Any]) -> None:
    """Print a run's result, as it stands in `result.json`, for people."""
    baselines = result["baselines"]
    table = _table()
    table.add_column("")
    table.add_column("hushrec", justify="right", style="bold")
    table.add_column("95 % interval", style="dim")
    for name in baselines:
        table.add_column(_NAMES.get(name, name), justify="right")
    for name in SHOWN:
        figure = result["test"][name]
        others = (_number(figures[name]["value"]) for figures in baselines.values())
        table.add_row(_label(name), _number(figure["value"]), _interval(figure), *others)
    _print(console, f"Test: each user's last item, ranked against {_rivals(result)}", table)
    _print_parts(console, result["test"])
    for line, style in ((_verdict(result), "bold"), (_EXPLAINED, "dim")):
        if line:
            console.print(Padding(Text(line, style), (0, 1, 1, 1)))
    console.print(_facts(result))
    if result["privacy"]["epsilon"] is not None:
        render_card(console, result["privacy"])


def _print_parts(console: Console, figures: dict[str, Any]) -> None:
    """Groups of users, and other ways to rank, by the marks in figures' names."""
    parts: dict[str, dict[str, Any]] = {}
    for name, figure in figures.items():
        metric, _, mark = name.partition("|")
        if mark and metric in SHOWN:
            parts.setdefault(mark, {})[name] = figure
    for mark, part in parts.items():
        sort = "s" if _SAMPLED.fullmatch(mark) else mark
        _print(console, _PARTS.get(sort, f"Users whose last item is one of {mark}, ranked among these"), _figures(part))


def _rivals(figures: dict[str, Any]) -> str:
    return "its domain's catalogue" if figures.get("domains") else "the whole catalogue"  # older results do not say


def _verdict(result: dict[str, Any]) -> str:
    reached = result["test"]["hr@10"]["value"]
    others = {name: figures["hr@10"]["value"] for name, figures in result["baselines"].items()}
    if reached is None:
        return "Nobody has a held-out event to test on: the histories are too short for this split."
    if reached <= others.get("popularity", -1.0):
        return "No better than the popularity ranker yet: more rounds or another learning rate may help."
    if others.get("ceiling"):
        share = reached / others["ceiling"]
        return f"The law of this data is known: hushrec reaches {share:.0%} of the best possible HR@10."
    return ""


def _facts(result: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 1), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows = {
        "users": f"{result['users']:,}, one client each; {result['users_tested']:,} of them tested",
        "rounds": f"{result['rounds']:,}; validation chose round {result['best_round']:,}",
        "speed": f"{result['seconds']:,.0f} s, {result['clients_per_second']:,.0f} clients/s"
        + (f", {result['peak_rss_mb']:,.0f} MB of memory at most" if result["peak_rss_mb"] else ""),  # not of nodes
        "traffic": f"a client received {_size(result['bytes_down_per_client'])}"
        + (
            f" and sent {_size(result['bytes_up_per_client'])} a round" if result["bytes_up_per_client"] else " a round"
        ),
        "files": result["run_dir"],
        "next": f"hushrec recommend --run {shlex.quote(result['run_dir'])} --user ID",
    }
    for name, fact in rows.items():
        grid.add_row(name, Text(fact))
    return grid


def render_card(console: Console, facts: dict[str, Any], heading: str = "Privacy card") -> None:
    """Print a privacy card, `common.privacy.card.card`, and what a person should know about it."""
    grid = Table.grid(padding=(0, 2, 0, 1), pad_edge=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    metrics = facts["epsilon_metrics"]
    rows = {
        "spent": f"epsilon {facts['epsilon']:.3f} at delta {facts['delta']:.2g}, of which metrics alone "
        + ("are not accounted for" if metrics is None else f"{metrics:.3f}"),
        "protected": f"{facts['unit']}; {facts['relation']}",
        "from": facts["adversary"],
        "mechanism": f"clip {facts['clipping_norm']:g}, noise multiplier {facts['noise_multiplier']:.4g}, "
        + _sampling(facts)
        + f", {facts['rounds']:,} rounds, {facts['users']:,} users",
        "account": facts["accountant"],
        "noise/clip": f"{facts['noise_over_clip']:.2f} on the mean update; signal to noise at most "
        + _ratio(facts["snr"]),
        "clipped": "not told" if facts["clipped_share"] is None else f"{facts['clipped_share']:.0%} of updates",
        "randomness": facts["rng"],
    }
    for name, fact in rows.items():
        grid.add_row(name, Text(fact))
    _print_heading(console, heading)
    console.print(grid)
    for line in advice(facts):
        console.print(Padding(Text(line, "yellow"), (0, 1)))
    if facts.get("on_device"):
        render_card(console, facts["on_device"], "What devices add against the server itself")


def _sampling(facts: dict[str, Any]) -> str:
    often = f"; nobody takes part more than {facts['participations']:,} times" if "participations" in facts else ""
    amplified = facts["sampling_rate"] < 1 or not often
    return (f"{facts['sampler']} sampling at {facts['sampling_rate']:.3g}" if amplified else "no sampling") + often


def _ratio(value: float | None) -> str:
    return "without noise" if value is None else f"{value:.2g}"


def render_phases(console: Console, phases: dict[str, float]) -> None:
    """Print where the time of a round went, `phases` of a run's result."""
    table, total = _table(), sum(phases.values())
    for name in ("phase", "a round", "share", ""):
        table.add_column(name, justify="right" if name in {"a round", "share"} else "left")
    for name, seconds in phases.items():
        table.add_row(name, f"{seconds * 1e3:,.2f} ms", f"{seconds / (total or 1):.1%}", _PHASES.get(name, ""))
    table.add_section()
    table.add_row("whole round", f"{total * 1e3:,.2f} ms", "", "mean of all training rounds; ranking is not in it")
    _print(console, "Where a round's time went", table)


def render_evaluation(console: Console, figures: dict[str, Any]) -> None:
    """Print what `hushrec evaluate` found."""
    table = _figures({name: figure for name, figure in figures["metrics"].items() if "|" not in name})
    table.add_section()
    for name, meaning in _BEYOND_ACCURACY.items():
        table.add_row(name, _number(figures[name]), meaning)
    what = f"{figures['split'].capitalize()}: the held-out items of {figures['users']:,} users"
    _print(console, f"{what}, ranked against {_rivals(figures)}", table)
    _print_parts(console, figures["metrics"])


def render_items(console: Console, items: list[dict[str, Any]]) -> None:
    """Print recommendations, each domain's counted anew; columns of which nothing is known are left away."""
    if not items:
        console.print("Nothing is left to recommend: the whole catalogue is in the history.")
        return
    titled = any(item["title"] != item["item"] for item in items)
    columns = {
        "domain": [item.get("domain", "") for item in items],
        "title": [item["title"] * titled for item in items],
        "genres": [", ".join(item["genres"]) for item in items],
        "new": ["new" * item.get("new", False) for item in items],
    }
    told = {name: column for name, column in columns.items() if any(column)}
    table = _table()
    table.add_column("", justify="right", style="dim")
    table.add_column("item", no_wrap=True)
    for name in told:
        table.add_column(name, style="dim" if name in {"genres", "new"} else None)
    table.add_column("score", justify="right")
    place, domain = 0, items[0].get("domain")
    for row, item in enumerate(items):
        if item.get("domain") != domain:  # the next list
            place, domain = 0, item["domain"]
            table.add_section()
        place += 1
        about = (column[row] for column in told.values())
        table.add_row(*map(Text, (str(place), item["item"], *about, f"{item['score']:.2f}")))
    console.print(table)


def render_data(console: Console, facts: dict[str, Any]) -> None:
    """Print what a data set holds."""
    table = _table()
    for name in ("", "as read", "kept"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("users", "items", "events"):
        table.add_row(name, f"{facts[name]:,}", f"{facts['kept'][name]:,}")
    table.add_row("events a user, mean", f"{facts['mean_length']:.1f}", "")
    table.add_row("density", f"{facts['density']:.4%}", "")
    tied = facts["tied_last_pair_share"]
    table.add_row("users whose last two events share a time", "no times" if tied is None else f"{tied:.0%}", "")
    _print(console, "As read, and what the filters keep", table)


def render_checks(console: Console, checks: Sequence[Any]) -> None:
    """Print a parity certificate, `simulations.certify.Check` by check."""
    table = _table()
    for name in ("check", "measured", "bound", ""):
        table.add_column(name, justify="right" if name in {"measured", "bound"} else "left")
    for check in checks:
        measured = "–" if check.measured is None else f"{check.measured:.1e}"
        verdict = Text("passed", "green") if check.passed else Text("BROKEN", "bold red")
        table.add_row(check.name, measured, *(("–", "") if check.bound is None else (f"{check.bound:.0e}", verdict)))
        if check.note:
            table.add_row(Text(f"  {check.note}", "dim"))
    _print(console, "Parity certificate: largest differences", table)


def render_pooled(console: Console, result: dict[str, Any]) -> None:
    """Print what training on a pool of everybody's data gave."""
    table = _table()
    for name in ("test", "pooled data"):
        table.add_column(name, justify="right" if name != "test" else "left")
    for name in SHOWN:
        table.add_row(_label(name), _number(result["test"][name]))
    _print(console, "Centralised training, no federation", table)
    console.print(f" {result['steps']:,} steps; validation chose step {result['best_step']:,}")


def render_bench(console: Console, found: dict[str, Any]) -> None:
    """Print what `hushrec bench` measured."""
    table = _table()
    for name in ("engine", "clients/s", "a round", "around training", "memory"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for result in found["results"]:
        overhead = "–" if result["overhead_share"] is None else f"{result['overhead_share']:.0%}"
        seconds, memory = f"{result['round_seconds'] * 1e3:,.0f} ms", f"{result['peak_rss_mb']:,.0f} MB"
        table.add_row(result["engine"], f"{result['clients_per_second']:,.0f}", seconds, overhead, memory)
    _print(console, f"{found['results'][0]['workload']}: medians", table)
    for names, ratio in found["ratios"].items():
        console.print(Padding(Text(f"{names}: {ratio:.2f} times as many clients a second"), (0, 1)))


def render_attention(console: Console, costs: list[dict[str, Any]]) -> None:
    """Print what `hushrec bench --workload attention` measured."""
    table = _table()
    table.add_column("attention")
    for length in costs[0]["milliseconds"]:
        table.add_column(f"{length:,} events", justify="right")
    for cost in costs:
        figures = cost["milliseconds"].values()
        table.add_row(cost["kind"], *("–" if each is None else f"{each:,.1f} ms" for each in figures))
    _print(console, "Forward and backward pass of four histories, two heads of 32, one thread", table)


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False)


def _print(console: Console, heading: str, table: Table) -> None:
    _print_heading(console, heading)
    console.print(table)


def _print_heading(console: Console, heading: str) -> None:
    console.print(Padding(Text(heading, "bold"), (0, 1)))


def _figures(figures: dict[str, Any]) -> Table:
    table = _table()
    table.add_column("metric")
    table.add_column("value", justify="right", style="bold")
    table.add_column("95 % interval", style="dim")
    for name, figure in figures.items():
        table.add_row(_label(name), _number(figure["value"]), _interval(figure))
    return table


def _label(name: str) -> str:
    metric, bar, rest = name.partition("|")
    return metric.upper() + bar + rest


def _interval(figure: dict[str, float | None]) -> str:
    return "" if None in figure.values() else f"{_number(figure['low'])} – {_number(figure['high'])}"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
