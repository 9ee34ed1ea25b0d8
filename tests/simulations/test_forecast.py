"""Traffic by hand for small experiments, and what a person is shown."""

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.loading import parse
from simulations.forecast import expected_rows, forecast, render

# dim 2, one block, ffn 1, length 3. Body: position 3·2; block 4 norm vectors 8, qkv 3·4, out 4 + 2, up 4 + 2,
# down 4 + 2; last norm 4; together 6 + 8 + 12 + 6 + 6 + 6 + 4 = 48 numbers. Item table: 100·2.
TINY = """
name: tiny
data: {kind: synthetic}
model: {dim: 2, blocks: 1, max_length: 3}
federation: {rounds: 20, cohort: 4}
evaluation: {every: 10}
"""
BODY, TABLE = 48, 200


def made(*overrides):
    return parse(TINY, overrides=overrides)


def test_softmax_moves_everything_both_ways():
    found = forecast(made(), users=10, items=100, mean_length=5)
    size = (BODY + TABLE) * 4
    assert found == {
        "users": 10,
        "items": 100,
        "parameters": BODY + TABLE,
        "cohort": 4,
        "bytes_down_per_client": size,
        "bytes_up_per_client": size,
        "rounds_per_pass": 2.5,
        "passes": 8.0,
        "bytes_training": 20 * 4 * 2 * size,
        "bytes_evaluation": (2 * 10 + 10) * size,  # two validations and the test
        "bytes_total": 20 * 4 * 2 * size + 30 * size,
    }


def test_shared_negatives_move_their_rows_with_ids():
    found = forecast(made("loss={kind: gbce, negatives: 7}"), users=10, items=100, mean_length=5)
    assert found["bytes_down_per_client"] == (BODY + TABLE) * 4
    assert found["bytes_up_per_client"] == BODY * 4 + (3 + 7) * (2 * 4 + 4)


@pytest.mark.parametrize(
    ("overrides", "length", "rows"),
    [
        (["loss.kind=softmax"], 10, 100),
        (["loss={kind: gbce, negatives: 7}"], 5, 3 + 7),  # the whole training part fits a window
        (["loss={kind: gbce, negatives: 7}"], 12, 4 + 7),  # a window of 3 positions has 4 events
        (["loss={kind: gbce, negatives: 7}", "federation.local.steps=2"], 12, 4 + 7),  # the same window twice
        (["loss={kind: gbce, negatives: 7}", "federation.local={steps: 2, window: random}"], 12, 8 + 7),
        (["loss={kind: gbce, negatives: 7}", "federation.local={steps: 9, window: random}"], 12, 10 + 7),
        (["loss={kind: gbce, negatives: 7}", "federation.local.epochs=2"], 12, 10 + 7),
        (["loss={kind: sampled-softmax, negatives: 99}"], 12, 100),  # no more than there are
        (["loss.kind=bce"], 12, 4 + 3),
        (["loss.kind=bce", "federation.local.steps=2"], 12, 4 + 2 * 3),
        (["loss.kind=bce", "federation.local.epochs=2"], 12, 10 + 2 * 9),
        (["loss.kind=bce"], 2, 0),  # nothing is left to train on
        (["loss.kind=bce"], 1, 0),
    ],
)
def test_expected_rows(overrides, length, rows):
    assert expected_rows(made(*overrides), items=100, mean_length=length) == rows


def test_a_small_population_takes_part_as_a_whole():
    found = forecast(made(), users=3, items=100, mean_length=5)
    assert (found["cohort"], found["rounds_per_pass"], found["passes"]) == (3, 1, 20)


def test_validation_on_some_users_costs_less_but_the_test_ranks_all():
    found = forecast(made("evaluation.users=4"), users=10, items=100, mean_length=5)
    assert found["bytes_evaluation"] == (2 * 4 + 10) * found["bytes_down_per_client"]
    assert forecast(made("evaluation.users=99"), 10, 100, 5) == forecast(made(), 10, 100, 5)


@pytest.mark.parametrize(("users", "items"), [(0, 5), (5, 0)])
def test_nobody_and_nothing_are_refused(users, items):
    with pytest.raises(ValueError, match="needs users and items"):
        forecast(made(), users, items, 5)


losses = st.sampled_from(["{kind: softmax}", "{kind: bce}", "{kind: gbce, negatives: 9}"])


@given(losses, st.integers(1, 500), st.integers(1, 500), st.floats(1, 1000))
def test_more_of_anything_never_costs_less(loss, users, items, length):
    experiment = made(f"loss={loss}")
    total = forecast(experiment, users, items, length)["bytes_total"]
    assert forecast(experiment, users + 1, items, length)["bytes_total"] >= total
    assert forecast(experiment, users, items + 1, length)["bytes_total"] > total
    assert forecast(experiment, users, items, length + 1)["bytes_total"] >= total


def test_render_explains_every_number_in_human_units():
    found = forecast(made(), users=12_345, items=103, mean_length=5)
    table = render(found)
    console = Console(file=StringIO(), width=200)
    console.print(table)
    shown = console.file.getvalue()
    assert table.row_count == len(found)
    assert all(key.replace("_", " ") in shown for key in found)
    assert "12,345" in shown
    assert "1.0 kB" in shown, "1,016 bytes down: 48 + 206 numbers"
    assert "3,086.25" in shown, "rounds per pass"
    assert "estimate" in shown


def test_a_run_without_rounds_costs_its_test_only():
    found = forecast(made("federation.rounds=0"), users=10, items=100, mean_length=5)
    assert found["bytes_total"] == 10 * found["bytes_down_per_client"]
