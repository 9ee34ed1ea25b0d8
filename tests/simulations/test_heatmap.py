"""Pictures of explanations: files that open, whatever titles hold, and bars that fit a terminal."""

import re
import sys
import warnings
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from common.errors import UsageError
from simulations.heatmap import bars, heat_map

PAST = ["Heat (1995)", "Up, Up (2009)", "Alien (1979)"]
NEXT = ["Big (1988)", "Jaws (1975)"]
VALUES = np.array([[0.5, -0.25, 1.0], [0.125, 2.0, -0.5]])


def printed(titles, values, width=80, longest=24):
    console = Console(file=StringIO(), width=width, color_system=None)
    bars(console, titles, values, "Why Big (1988)", longest)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


# --- bars -------------------------------------------------------------------------------------------------------------


def test_bars_by_hand():
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed(PAST, VALUES[0]).splitlines() if "█" in line]
    assert rows == [
        ["1", "Alien (1979)", "█" * 24, "+1.000"],
        ["2", "Up, Up (2009)", "█" * 6, "-0.250"],
        ["3", "Heat (1995)", "█" * 12, "+0.500"],
    ]


def test_what_speaks_against_is_red():
    console = Console(file=StringIO(), width=80, color_system="standard", force_terminal=True)
    bars(console, PAST, VALUES[0], "Why Big (1988)")
    assert f"\x1b[31m{'█' * 6}" in console.file.getvalue()
    assert f"\x1b[32m{'█' * 12}" in console.file.getvalue()


def test_the_strongest_events_have_bars_in_time_order():
    values = np.array([-100.0, *range(49)])
    values[7] = -80
    text = printed([f"film {i} of 50" for i in range(50)], values)
    rows = [line.split()[:3] for line in text.splitlines() if "█" in line]
    assert rows == [[str(50 - place), "film", str(place)] for place in [*range(49, 31, -1), 7, 0]]
    assert "-100.000" in text
    assert "█" * 24 in text
    assert "30 weaker events not shown" in text
    assert "1 weaker event not shown" in printed(["x"] * 21, np.ones(21))


def test_bars_of_nothing_and_of_odd_titles():
    assert "█" not in printed(PAST, np.zeros(3))
    assert "not shown" not in printed(["x"] * 20, range(20))
    text = printed(["[red]Heat[/red]", "x" * 200, "two\nlines"], VALUES[0])
    assert "[red]Heat[/red]" in text
    assert "x…" in text
    assert "two lines" in text
    assert "+0.500" in printed(PAST, VALUES[0], width=40, longest=10)


@pytest.mark.parametrize("values", [VALUES, VALUES[0, :2], [0.5, np.nan, 1], []])
def test_bars_of_what_is_not_one_number_an_event(values):
    with pytest.raises(UsageError, match="expected finite numbers"):
        printed(PAST, values)


# --- heat maps --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
    pytest.importorskip("matplotlib")

    def draw(name="map.svg", past=PAST, recommended=NEXT, values=VALUES):
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            heat_map(path, past, recommended, values)
        return path.read_bytes()

    return draw


def test_files_by_their_suffix(drawn, tmp_path):
    assert drawn("map.png").startswith(b"\x89PNG")
    assert drawn("map.PNG").startswith(b"\x89PNG")
    assert b"<svg" in drawn("map.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.PNG", "map.png", "map.svg"]


def test_a_heat_map_names_all_and_says_every_number_that_counts(drawn):
    text = drawn().decode()
    for title in [*PAST, *(f"{name}  {place}" for place, name in enumerate(NEXT, 1))]:
        assert f"<!-- {title} -->" in text
    for number in ("0.5", "1.0", "2.0", "−0.5"):
        assert f"<!-- {number} -->" in text
    assert "<!-- 0.1 -->" not in text, "too small to be told"
    assert "against" in text
    assert "against" not in drawn(values=np.abs(VALUES)).decode()


def test_the_strongest_events_and_the_best_items(drawn):
    values = np.zeros((12, 30))
    values[0, 15:], values[9, 3], values[3, 7], values[10, 1] = 0.5, -2, 1, 9
    text = drawn(past=[f"film {i}" for i in range(30)], recommended=[f"item {i}" for i in range(12)], values=values)
    named = re.findall(r"<!-- film (\d+) -->", text.decode())
    assert [*map(int, named)] == [3, 7, *range(12, 30)], "of those that say nothing the latest"
    assert b"item 9  10" in text
    assert b"item 10" not in text
    assert b"<!-- \xe2\x88\x922.0 -->" in text, "a scale of what is shown"
    assert b"10 weaker events not shown" in text
    assert b"2 recommendations not shown" in text
    assert b"not shown" not in drawn()


@pytest.mark.parametrize("events", [1, 5, 50])
@pytest.mark.parametrize("items", [1, 3, 14])
def test_all_that_is_written_is_within_the_picture(drawn, monkeypatch, items, events):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.text import Text as Written

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.touch()))
    values = -np.random.default_rng(0).gamma(1, 1, (items, events))
    for titles in ("a long title of thirty-four letters", "X"):
        drawn(past=[titles] * events, recommended=[titles] * items, values=values)
        figure = figures.pop()
        figure.draw_without_rendering()
        whole, said = figure.bbox.padded(1), [text for text in figure.findobj(Written) if text.get_text()]
        assert {"for", "against", "What speaks for each recommendation"} <= {text.get_text() for text in said}
        for text in said:
            box = text.get_window_extent()
            assert whole.contains(*box.min), text.get_text()
            assert whole.contains(*box.max), text.get_text()


def test_equal_pictures_are_equal_files(drawn):
    for name in ("map.svg", "map.png"):
        assert drawn(name) == drawn(name)


def test_odd_titles_and_values(drawn):
    titles = ["$100 & $x^", "千と千尋の神隠し", "<b>--> " + "long " * 40]
    assert "$100 &amp; $x^" in drawn(past=titles).decode()
    drawn("map.png", past=titles, values=np.zeros((2, 3)))
    drawn(past=["one"], recommended=["one"], values=[[3]])


def test_what_cannot_be_drawn(drawn, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"\.png or a \.svg"):
        drawn("map.gif")
    for values in (VALUES.T, VALUES[0], VALUES * np.inf):
        with pytest.raises(UsageError, match="expected finite numbers of 2 items and 3 events"):
            drawn(values=values)
    with pytest.raises(UsageError, match="at least one"):
        drawn(past=[], values=np.zeros((2, 0)))
    with pytest.raises(UsageError, match="name one in a folder that exists"):
        drawn("nowhere/map.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'hushrec\[explain\]'"):
        drawn()
    assert list(tmp_path.iterdir()) == []
