"""What people read fits a terminal of 80 columns, and no figure is ever wrapped, invented or `nan`."""

from io import StringIO

import pytest
from rich.console import Console

from simulations.report import render, render_data, render_evaluation, render_items


def figures(value, *names):
    low, high = (None, None) if value is None else (value - 0.01, value + 0.01)
    return {name: {"value": value, "low": low, "high": high} for name in names or ("hr@10", "ndcg@10", "mrr")}


def result(test=0.5, popularity=0.25, ceiling=None, **more):
    baselines = {"popularity": figures(popularity), "random": figures(0.0125)}
    return {
        "run_dir": "runs/a b",
        "rounds": 1200,
        "best_round": 800,
        "users": 12345,
        "items": 500,
        "users_tested": 12000,
        "test": figures(test),
        "baselines": baselines | ({} if ceiling is None else {"ceiling": figures(ceiling)}),
        "seconds": 61.4,
        "clients_per_second": 1234.5,
        "peak_rss_mb": 512.0,
        "bytes_up_per_client": 1500.0,
        "bytes_down_per_client": 2_345_678,
        "privacy": {"epsilon": None},
    } | more


def shown(draw, value, width=80):
    console = Console(file=StringIO(), width=width, color_system=None)
    draw(console, value)
    text = console.file.getvalue()
    assert "nan" not in text
    assert "None" not in text
    assert all(len(line) <= width for line in text.splitlines())
    return text


def cells(text, first):
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_result():
    text = shown(render, result(ceiling=0.625))
    assert "Test: each user's last item, ranked against the whole catalogue" in text
    for name in ("HR@10", "NDCG@10", "MRR"):
        assert cells(text, name) == [name, "0.5000", "0.4900", "–", "0.5100", "0.2500", "0.0125", "0.6250"]
    assert "hushrec reaches 80% of the best possible HR@10" in text
    assert "12,345, one client each; 12,000 of them tested" in text
    assert "1,200; validation chose round 800" in text
    assert "61 s, 1,234 clients/s, 512 MB of memory at most" in text
    assert "a client received 2.35 MB and sent 1.5 kB a round" in text
    assert "hushrec recommend --run 'runs/a b' --user ID" in text, "quoted for the shell"
    assert "sampled" not in text


def test_data_whose_law_is_unknown_has_no_best_possible():
    text = shown(render, result())
    assert "best possible" not in text
    assert cells(text, "MRR") == ["MRR", "0.5000", "0.4900", "–", "0.5100", "0.2500", "0.0125"]


def test_sampled_figures_stand_apart():
    sampled = figures(0.75, "hr@5|s99", "hr@10|s99", "ndcg@10|s99", "mrr|s99")
    text = shown(render, result(test=None) | {"test": figures(0.5) | sampled})
    full, below = text.split("Against sampled negatives: for comparison with old papers only")
    assert "0.7500" not in full
    assert cells(below, "HR@10|s99")[1] == "0.7500"


def test_a_model_that_is_no_better_than_popularity_says_so():
    assert "No better than the popularity ranker yet" in shown(render, result(test=0.25))
    assert "No better" not in shown(render, result(test=0.2501))


def test_nobody_was_tested():
    text = shown(render, result(test=None, popularity=None, ceiling=None, users_tested=0))
    assert cells(text, "MRR")[:3] == ["MRR", "–", "–"]
    assert "Nobody has a held-out event" in text


def test_a_long_run_directory_can_still_be_read():
    text = shown(render, result(run_dir="runs/" + "x" * 200))
    assert text.count("x") >= 400


def test_evaluation():
    found = {
        "split": "validation",
        "users": 1000,
        "metrics": figures(0.5, "hr@5", "mrr"),
        "coverage@10": 0.9,
        "long_tail@10": float("nan"),
        "worst_tenth_ndcg@10": 0.3,
    }
    text = shown(render_evaluation, found)
    assert "Validation: the held-out items of 1,000 users" in text
    assert cells(text, "HR@5") == ["HR@5", "0.5000", "0.4900", "–", "0.5100"]
    assert cells(text, "coverage@10")[1] == "0.9000"
    assert cells(text, "long_tail@10")[1] == "–"


ITEMS = [{"item": "i1", "title": "i1", "genres": [], "score": 1.25}]


def test_items():
    text = shown(render_items, ITEMS)
    assert cells(text, "1") == ["1", "i1", "1.25"]
    assert "title" not in text
    assert "genres" not in text


def test_films():
    film = {"item": "2", "title": "[Heat] (1995)", "genres": ["Crime", "Thriller"], "score": -0.5}
    text = shown(render_items, [*ITEMS, film])
    assert cells(text, "2") == ["2", "2", "[Heat]", "(1995)", "Crime,", "Thriller", "-0.50"], "brackets are no markup"


def test_nothing_to_recommend():
    assert "Nothing is left to recommend" in shown(render_items, [])


@pytest.mark.parametrize(("tied", "said"), [(None, "no times"), (0.44, "44%")])
def test_data(tied, said):
    facts = {"users": 943, "items": 1682, "events": 100_000, "mean_length": 106.04, "density": 0.063047}
    kept = {"users": 900, "items": 1600, "events": 99_000}
    text = shown(render_data, facts | {"tied_last_pair_share": tied, "kept": kept})
    assert cells(text, "events") == ["events", "100,000", "99,000"]
    assert "6.3047%" in text
    assert said in text
