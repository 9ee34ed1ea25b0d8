"""A bar on a terminal, lines elsewhere, nothing on request."""

from io import StringIO

import pytest
from rich.console import Console

from simulations import progress
from simulations.progress import watching


def train(round_, **more):
    return {"round": round_, "kind": "train", "clients": 100, "loss": 1.23456, "seconds": 0.05} | more


def validation(round_, **more):
    return {"round": round_, "kind": "validation", "hr@10": 0.25, "ndcg@10": 0.123456, "seconds": 1.0} | more


def watched(*records, rounds=20, terminal=False, quiet=False, width=80):
    options = {"force_terminal": terminal, "color_system": None, "force_interactive": terminal}
    console = Console(file=StringIO(), width=width, quiet=quiet, **options)
    with watching(console, rounds) as observe:
        for record in records:
            observe(record)
    return console.file.getvalue()


def test_the_bar_shows_round_loss_quality_speed_and_time():
    text = watched(train(9), train(10), validation(10), terminal=True)
    last = next(line for line in reversed(text.replace("\r", "\n").splitlines()) if "round" in line)
    for part in ("round", "10/20", "━", "loss 1.235", "NDCG@10 0.1235", "2,000 users/s", "left"):
        assert part in last, last


@pytest.mark.parametrize(("width", "label"), [(80, " NDCG@10 "), (120, " validation NDCG@10 ")])
def test_the_bar_fits_the_terminal(width, label):
    text = watched(train(1000, clients=5000), validation(1000), rounds=2000, terminal=True, width=width)
    line = next(line for line in text.replace("\r", "\n").splitlines() if "0.1235" in line)
    assert label in line
    assert "1000/2000" in line, "nothing is cut off"
    assert "100,000 users/s" in line
    assert line.count("━") + line.count("╸") + line.count("╺") >= 4


def test_unknown_figures_are_a_dash():
    nothing = [train(2, clients=0, loss=None), validation(2, **{"hr@10": float("nan"), "ndcg@10": float("nan")})]
    assert "loss – NDCG@10 – 0 users/s" in watched(*nothing, terminal=True)
    assert watched(*nothing) == "round 2/20  loss –  0 users/s  validation HR@10 –  NDCG@10 –\n"


def test_lines_come_with_validations_and_now_and_then(monkeypatch):
    clock = iter([0, 1, 12, 12, 13, 30, 30])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    text = watched(train(1), train(2), train(3), validation(3))
    assert text.splitlines() == [
        "round 2/20  loss 1.235  2,000 users/s",
        "round 3/20  loss 1.235  2,000 users/s  validation HR@10 0.2500  NDCG@10 0.1235",
    ]


def test_lines_hold_no_escape_codes():
    assert "\x1b" not in watched(train(1, reasons={"[red]x": 1}), validation(1))


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_says_nothing(terminal):
    assert watched(train(1, reasons={"not finite": 3}), validation(1), terminal=terminal, quiet=True) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_each_reason_for_leaving_updates_out_is_said_once(terminal):
    reasons = {"refused: [no] events": 3}
    text = watched(
        train(1, reasons=reasons), train(2, reasons=reasons), train(3, reasons={"late": 1}), terminal=terminal
    )
    assert text.count("round 1: left out 3 update(s): refused: [no] events") == 1
    assert "round 2: left out" not in text
    assert "round 3: left out 1 update(s): late" in text


def test_a_bar_ends_well_when_the_run_does_not():
    with pytest.raises(KeyboardInterrupt), watching(Console(file=StringIO(), force_terminal=True), 5) as observe:
        observe(train(1))
        raise KeyboardInterrupt
