"""The ledger: on the disk before anything leaves, never taken back, and the end of a run that may spend no more."""

import json
import os
from functools import partial

import numpy as np
import pytest

from common.errors import BudgetSpent, Interrupted, StateError
from common.privacy.plan import settle
from server import checkpoint
from server import curator as curators
from server.checkpoint import load_model
from server.ledger import LEDGER_FILE, RANKING, UPDATE, Ledger
from server.rounds import CARD_FILE, CHECKPOINT_FILE, MODEL_FILE, serve
from simulations.engines import play
from tests.privacy import private
from tests.support import world
from tests.support.books import opened, seal

ITEMS, USERS = private.ITEMS, 12
HISTORIES = world.sequences(world.random_histories([4, 5, 6, 7, 8, 9] * 2, ITEMS))


def setup(rounds=4, every=None, **sections):
    """Noise 4, so that accounting is quick; checkpoints after every second round."""
    evaluation = {"every": rounds + 1 if every is None else every, **sections.pop("evaluation", {})}
    price = {} if "target_epsilon" in sections.get("privacy", {}) else {"noise_multiplier": 4.0}
    return private.experiment(
        federation={"rounds": rounds, "cohort": 4, **sections.pop("federation", {})},
        privacy={**price, "delta": 1e-5, **sections.pop("privacy", {})},
        evaluation=evaluation,
        runtime={"checkpoint_every": 2},
        **sections,
    )


def run(experiment, folder, **options):
    device = world.device(experiment, HISTORIES, ITEMS)
    serving = partial(serve, experiment=experiment, folder=folder, observe=lambda line: None, **options)
    return play(device, serving)


def lines(folder):
    return [opened(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]


def model(folder, experiment):
    return load_model(folder / MODEL_FILE, experiment, ITEMS)


# --- a line for each release, first of all ---------------------------------------------------------------------------


def test_a_line_by_hand(tmp_path):
    ledger = Ledger(tmp_path)
    assert not (tmp_path / LEDGER_FILE).exists()
    paid = [ledger.pay(UPDATE, 1, z=2.0), ledger.pay(RANKING, 1), ledger.pay(UPDATE, 2), ledger.pay(UPDATE, 1)]
    assert paid == [0, 0, 0, 1]
    assert lines(tmp_path) == ledger.lines
    assert lines(tmp_path)[0] == {"what": UPDATE, "round": 1, "attempt": 0, "z": 2.0}
    again = Ledger(tmp_path)
    assert again.lines == ledger.lines
    assert (again.count(UPDATE), again.count(RANKING)) == (3, 1)
    assert (again.attempts(UPDATE, 1), again.attempts(UPDATE, 2), again.attempts(RANKING, 2)) == (2, 1, 0)
    assert again.pay(UPDATE, 1) == 2


def test_an_account_in_memory_counts_the_same():
    ledger = Ledger(None)
    assert [ledger.pay(UPDATE, 1), ledger.pay(UPDATE, 1), ledger.pay(RANKING, 1)] == [0, 1, 0]
    assert ledger.count(UPDATE) == 2


@pytest.fixture
def order(monkeypatch, tmp_path):
    """What happens in which order: the ledger flushed, noise drawn, weights stepped; and the ledger at each."""
    happened, fsync, noise = [], os.fsync, curators.add_noise

    def on_disk():
        path = tmp_path / LEDGER_FILE
        return len(path.read_text().splitlines()) if path.exists() else 0

    def flushed(descriptor):
        fsync(descriptor)
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) == LEDGER_FILE:
            happened.append(("flushed", on_disk()))

    def noised(*given):
        happened.append(("noised", on_disk()))
        return noise(*given)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(curators, "add_noise", noised)
    return happened, on_disk


def test_the_line_is_on_the_disk_before_the_weights_change(order, tmp_path):
    happened, on_disk = order
    experiment = setup()
    made = private.strategy(experiment, USERS, folder=tmp_path)
    step = made.optimizer.step
    made.optimizer.step = lambda update: happened.append(("stepped", on_disk())) or step(update)
    for round_ in (1, 2):
        made.aggregate_train(round_, [])
    assert happened == [(what, n) for n in (1, 2) for what in ("flushed", "noised", "stepped")]
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]
    assert lines(tmp_path)[0] == {
        "what": UPDATE,
        "round": 1,
        "attempt": 0,
        "sampler": "poisson",
        "rate": 4 / USERS,
        "cap": None,
        "noise_multiplier": 4.0,
        "count_noise": None,
        "clipping_norm": 1.0,
    }


def test_the_line_of_a_ranking_is_on_the_disk_before_it_is_told(order, tmp_path, monkeypatch):
    happened, on_disk = order
    histogram = curators.noised_histogram
    monkeypatch.setattr(
        curators, "noised_histogram", lambda *given: happened.append(("told", on_disk())) or histogram(*given)
    )
    made = private.curator(setup(evaluation={"privacy": "noised"}), USERS, folder=tmp_path)
    made.figures(np.array([1.0, 2.0]), 2, 3, [10])
    assert happened == [("flushed", 1), ("told", 1)]
    assert lines(tmp_path) == [{"what": RANKING, "round": 3, "attempt": 0, "std": 30.0}]


def test_a_full_disk_releases_nothing(monkeypatch, tmp_path):
    def full(*given, **options):
        raise StateError("no space left on device")

    made = private.strategy(setup(evaluation={"privacy": "noised"}), USERS, folder=tmp_path)
    monkeypatch.setattr("common.privacy.lines.append_line", full)
    for attempt in (
        lambda: made.aggregate_train(1, []),
        lambda: made.curator.figures(np.array([1.0]), 1, 1, [10]),
    ):
        with pytest.raises(StateError, match="no space"):
            attempt()
    assert not any(part.any() for part in made.weights)
    assert made.curator.ledger.lines == []


def test_a_line_that_is_cut_off_by_a_full_disk_is_taken_out_again(monkeypatch, tmp_path):
    made = private.strategy(setup(), USERS, folder=tmp_path)
    made.aggregate_train(1, [])
    before, kept = [part.clone() for part in made.weights], (tmp_path / LEDGER_FILE).read_bytes()

    def broken(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StateError, match=LEDGER_FILE):
            made.aggregate_train(2, [])
    assert world.same(made.weights, before)
    assert (tmp_path / LEDGER_FILE).read_bytes() == kept
    made.aggregate_train(2, [])
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]


def test_a_new_ledger_is_in_its_folder_before_anything_is_released(monkeypatch, tmp_path):
    """Of a flushed file in a folder that was not, a power cut may leave nothing."""
    flushed, fsync = set(), os.fsync

    def note(descriptor):
        fsync(descriptor)
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", note)
    Ledger(tmp_path).pay(UPDATE, 1)
    assert flushed == {str(tmp_path / LEDGER_FILE), str(tmp_path)}


# --- a whole run, and its replay -------------------------------------------------------------------------------------


def test_a_run_pays_for_what_it_releases_and_its_card_says_so(tmp_path):
    experiment = setup(3, every=2, evaluation={"privacy": "noised", "noise": 60.0})
    outcome = run(experiment, tmp_path)
    paid = [(line["what"], line["round"], line["attempt"]) for line in lines(tmp_path)]
    updates = [(UPDATE, 1, 0), (UPDATE, 2, 0), (RANKING, 2, 0), (UPDATE, 3, 0), (RANKING, 3, 0)]
    assert paid[:5] == updates
    assert paid[5:] in ([(RANKING, 2, 1)], [(RANKING, 3, 1)])  # the test, by the model that validation chose
    assert outcome.card["epsilon"] == settle(experiment, USERS).cost(3, 3)
    assert outcome.card["epsilon_metrics"] == settle(experiment, USERS).cost(0, 3)
    assert json.loads((tmp_path / CARD_FILE).read_text()) == outcome.card


def test_a_round_that_is_run_again_pays_again_and_draws_other_noise(tmp_path):
    experiment = setup()
    first = private.strategy(experiment, USERS, folder=tmp_path)
    first.aggregate_train(1, [])
    again = private.strategy(experiment, USERS, folder=tmp_path)
    again.aggregate_train(1, [])
    assert [line["attempt"] for line in lines(tmp_path)] == [0, 1]
    assert again.curator.card(9)["rounds"] == 2
    one, other = private.flat(first.weights), private.flat(again.weights)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("adaptive", [None, {"noise": 4.0}])
def test_a_kill_between_ledger_and_checkpoint_can_only_over_count(adaptive, monkeypatch, tmp_path):
    experiment = setup(5, privacy={"adaptive": adaptive})
    save, saved, steps = checkpoint.save, [], []
    step = curators.add_noise
    monkeypatch.setattr(curators, "add_noise", lambda *given: steps.append(1) or step(*given))

    def dies(path, state, experiment):
        saved.append(state.round)
        if saved == [2, 4]:
            raise KilledError
        save(path, state, experiment)

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(KilledError):
        run(experiment, tmp_path)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    clip = checkpoint.load(tmp_path / CHECKPOINT_FILE, experiment).clip
    outcome = run(experiment, tmp_path, resume=True)
    paid = [(line["round"], line["attempt"]) for line in lines(tmp_path)]
    assert paid == [(1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1), (5, 0)]
    assert saved == [2, 4, 4, 5]
    assert outcome.rounds == 5
    assert outcome.card["rounds"] == len(paid) == len(steps)
    assert outcome.card["epsilon"] == settle(experiment, USERS).cost(7, 0)
    assert lines(tmp_path)[4]["clipping_norm"] == clip  # where an adaptive norm stood then
    assert (lines(tmp_path)[4]["clipping_norm"] == 1.0) == (adaptive is None)


def test_a_polite_stop_goes_on_where_it_was_and_pays_no_round_twice(tmp_path):
    experiment = setup(4, privacy={"adaptive": {"noise": 4.0}})
    whole = run(experiment, None)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        run(experiment, tmp_path, stopping=lambda: next(asked))
    outcome = run(experiment, tmp_path, resume=True)
    assert [(line["round"], line["attempt"]) for line in lines(tmp_path)] == [(n, 0) for n in (1, 2, 3, 4)]
    assert world.same(outcome.weights, whole.weights)
    assert outcome.card["epsilon"] == whole.card["epsilon"]


# --- a ledger that cannot be believed --------------------------------------------------------------------------------

GOOD = '{"what": "update", "round": 1, "attempt": 0, "noise_multiplier": 4.0, "rate": 0.25}'
BAD = {
    "no JSON": "hello",
    "half a line": GOOD[:30],
    "a blank line": "",
    "a number": "3",
    "a list": "[]",
    "nothing": "null",
    "another kind": GOOD.replace("update", "updates"),
    "no kind": GOOD.replace('"what": "update", ', ""),
    "a list as kind": GOOD.replace('"update"', "[]"),
    "no round": GOOD.replace('"round": 1, ', ""),
    "a round in words": GOOD.replace('"round": 1', '"round": "1"'),
    "a round in fractions": GOOD.replace('"round": 1', '"round": 1.5'),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("place", [1, 2])
def test_a_damaged_ledger_is_refused_by_file_and_line(fault, place, tmp_path):
    rows = [GOOD, GOOD, GOOD]
    rows[place - 1] = BAD[fault]
    (tmp_path / LEDGER_FILE).write_text("\n".join(map(seal, rows)) + "\n")
    with pytest.raises(StateError, match=rf"{LEDGER_FILE}:{place}: .*what was spent is unknown"):
        Ledger(tmp_path)


@pytest.mark.parametrize("end", [len(seal(GOOD)) - 1, len(seal(GOOD))])
def test_a_ledger_that_is_cut_off_is_refused(end, tmp_path):
    (tmp_path / LEDGER_FILE).write_text(seal(GOOD) + "\n" + seal(GOOD)[:end])
    with pytest.raises(StateError, match=LEDGER_FILE):
        Ledger(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / LEDGER_FILE).write_bytes(seal(GOOD).encode() + b"\n\xff\xfe\x00\n")
    with pytest.raises(StateError, match=f"{LEDGER_FILE}:2:"):
        Ledger(tmp_path)


def test_a_ledger_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(StateError, match=LEDGER_FILE):
        Ledger(tmp_path)


def test_an_empty_ledger_has_spent_nothing(tmp_path):
    (tmp_path / LEDGER_FILE).write_text("")
    assert Ledger(tmp_path).lines == []


def test_a_damaged_ledger_ends_a_run_before_it_asks_anybody(tmp_path):
    (tmp_path / LEDGER_FILE).write_text(seal(GOOD) + "\nhello\n")
    with pytest.raises(StateError, match=f"{LEDGER_FILE}:2:"):
        run(setup(), tmp_path, resume=True)
    assert not (tmp_path / MODEL_FILE).exists()


@pytest.mark.parametrize(
    ("privacy", "federation"),
    [
        ({"noise_multiplier": 3.0}, {}),
        ({}, {"cohort": 3}),
        ({"adaptive": {"noise": 4}}, {}),
        ({"cap": 4}, {}),
    ],
)
def test_a_ledger_of_other_terms_is_refused(privacy, federation, tmp_path):
    private.curator(setup(), USERS, folder=tmp_path).mean(1, [], private.zeros(setup()))
    private.curator(setup(), USERS, folder=tmp_path)  # the same ones go on
    with pytest.raises(StateError, match="other terms"):
        private.curator(setup(privacy=privacy, federation=federation), USERS, folder=tmp_path)


def test_a_ledger_of_rankings_of_other_noise_is_refused(tmp_path):
    little, much = (setup(evaluation={"privacy": "noised", "noise": noise}) for noise in (2.0, 200.0))
    private.curator(little, USERS, folder=tmp_path).figures(np.array([1.0]), 1, 1, [10])
    with pytest.raises(StateError, match="other terms"):
        private.curator(much, USERS, folder=tmp_path)


def test_a_ledger_for_other_users_is_refused(tmp_path):
    """The same cohort of a larger population is another rate."""
    private.curator(setup(), USERS, folder=tmp_path).mean(1, [], private.zeros(setup()))
    with pytest.raises(StateError, match="other terms"):
        private.curator(setup(), USERS + 1, folder=tmp_path)


@pytest.mark.parametrize("left", [0, 1])
def test_a_ledger_that_has_lost_lines_is_refused(left, tmp_path):
    """The checkpoint knows of two rounds; a ledger without them would let them be spent again, with the same noise."""
    experiment = setup(4)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        run(experiment, tmp_path, stopping=lambda: next(asked))
    rows = (tmp_path / LEDGER_FILE).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER_FILE).write_text("".join(rows[:left]))
    if not left:
        (tmp_path / LEDGER_FILE).unlink()
    with pytest.raises(StateError, match=LEDGER_FILE):
        run(experiment, tmp_path, resume=True)


# --- a budget --------------------------------------------------------------------------------------------------------


def cost(updates, rankings=0, **sections):
    return settle(setup(**sections), USERS).cost(updates, rankings)


@pytest.mark.parametrize("affordable", [1, 3])
def test_a_run_stops_before_it_exceeds_its_budget(affordable, tmp_path):
    budget = (cost(affordable) + cost(affordable + 1)) / 2
    experiment = setup(10, privacy={"budget": {"epsilon": budget}})
    with pytest.raises(BudgetSpent, match=f"spent after round {affordable} of 10") as stop:
        run(experiment, tmp_path)
    assert stop.value.exit_code == 3
    assert str(tmp_path) in str(stop.value)
    assert [line["round"] for line in lines(tmp_path)] == list(range(1, affordable + 1))
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["epsilon"] == cost(affordable) <= budget
    # What was paid for is kept: the model after the last paid round, to the bit.
    assert world.same(model(tmp_path, experiment), run(setup(affordable), None).weights)


def test_a_budget_of_exactly_the_plan_is_enough(tmp_path):
    outcome = run(setup(3, privacy={"budget": {"epsilon": cost(3)}}), tmp_path)
    assert outcome.rounds == 3
    assert outcome.card["epsilon"] == cost(3)


def test_a_budget_below_the_first_round_releases_nothing(tmp_path):
    experiment = setup(3, privacy={"budget": {"epsilon": cost(1) * 0.99}})
    with pytest.raises(BudgetSpent):
        run(experiment, tmp_path)
    assert not (tmp_path / LEDGER_FILE).exists()
    assert json.loads((tmp_path / CARD_FILE).read_text())["epsilon"] == 0


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_metrics_draw_on_the_same_budget(share, tmp_path):
    sections = {"every": 1, "evaluation": {"privacy": "noised", "noise": 20.0}}
    budget = share * cost(4, 5, **sections)
    with pytest.raises(BudgetSpent):
        run(setup(4, privacy={"budget": {"epsilon": budget}}, **sections), tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    count = Ledger(tmp_path).count
    assert card["epsilon"] == cost(count(UPDATE), count(RANKING), **sections) <= budget
    assert cost(count(UPDATE) + 1, count(RANKING) + 1, **sections) > budget  # not thrifty either


@pytest.mark.parametrize("rounds", [2, 5])
def test_a_ranking_that_is_too_dear_is_left_out(rounds, tmp_path):
    """Two rounds and one ranking are to be had, neither the second ranking nor the third round nor the test."""
    sections = {"every": 1, "evaluation": {"privacy": "noised", "noise": 8.0}}
    budget = (cost(2, 1, **sections) + min(cost(2, 2, **sections), cost(3, 1, **sections))) / 2
    with pytest.raises(BudgetSpent, match=f"spent after round 2 of {rounds}"):
        run(setup(rounds, privacy={"budget": {"epsilon": budget}}, **sections), tmp_path)
    assert [(line["what"], line["round"]) for line in lines(tmp_path)] == [(UPDATE, 1), (RANKING, 1), (UPDATE, 2)]
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["epsilon"] == cost(2, 1, **sections) <= budget


def test_a_target_is_a_budget_too(tmp_path):
    """Rounds that were run again after a kill have cost something: the plan's last rounds are no longer to be had."""
    experiment = setup(4, privacy={"target_epsilon": 0.5})
    made = private.curator(experiment, USERS, folder=tmp_path)
    for _ in range(2):
        made.mean(1, [], private.zeros(experiment))
    with pytest.raises(BudgetSpent, match="after round 2 of 4"):
        run(experiment, tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["rounds"] == 4
    assert 0.495 <= card["epsilon"] <= 0.5


def test_without_a_budget_nothing_ends_a_run():
    made = private.curator(setup(), USERS)
    for round_ in range(1, 6):  # more than were planned
        assert made.affords(UPDATE)
        made.mean(round_, [], private.zeros(setup()))
    assert made.affords(UPDATE)


def test_a_budget_may_have_a_delta_of_its_own():
    experiment = setup(10, privacy={"noise_multiplier": 8.0, "budget": {"epsilon": 1.0, "delta": 1e-9}})
    terms = settle(experiment, USERS)
    made = private.curator(experiment, USERS)
    n = 0
    while made.affords(UPDATE):
        made.mean(n := n + 1, [], private.zeros(experiment))
    strict = terms._replace(delta=1e-9)
    assert strict.cost(n, 0) <= 1.0 < strict.cost(n + 1, 0)
    assert terms.cost(n + 1, 0) < 1.0


def test_going_on_with_a_spent_run_keeps_its_model(tmp_path):
    """It ends again at once, with the same model; that of an older checkpoint is not what was paid for."""
    budget = (cost(3) + cost(4)) / 2
    experiment = setup(10, privacy={"budget": {"epsilon": budget}})
    with pytest.raises(BudgetSpent):
        run(experiment, tmp_path)
    kept = model(tmp_path, experiment)
    with pytest.raises(BudgetSpent):
        run(experiment, tmp_path, resume=True)
    assert len(lines(tmp_path)) == 3
    assert world.same(model(tmp_path, experiment), kept)
