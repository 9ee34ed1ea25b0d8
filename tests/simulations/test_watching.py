"""A line in, a line out: what is recommended, to whom, and what a bad line does not disturb."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from client.evaluation import final_scores
from client.online import Session
from common.data.catalogue import Catalogue
from common.loading import parse
from common.models.inputs import Moments
from simulations import rundir, watching
from simulations.inference import Trained
from simulations.offer import Offer
from simulations.runner import run
from simulations.terminal import Screen
from simulations.watching import Watch, watch
from tests.support import world
from tests.support.processes import TINY

TITLES = ["Heat (1995)", "Up, Up (2009)", "Alien (1979)", "Aliens (1986)", "Big", "big", None, "7 Samurai", "Ärger"]
ITEMS = 20

SEQUENCES = SimpleNamespace(target=-1, behaviour_names=(), domain_names=(), domains=None)


def catalogue(titles=True):
    ids = [f"i{n}" for n in range(ITEMS)]
    made = Catalogue(world.NOWHERE, 1, ITEMS, "digest")
    columns = {"item": ids} | ({"title": [*TITLES, *ids[len(TITLES) :]]} if titles else {})
    made.__dict__["table"] = pl.DataFrame(columns)
    return made


def opened(experiment, weights, titles=True):
    """Of a finished run, what watching looks at."""
    device = SimpleNamespace(experiment=experiment, catalogue=catalogue(titles), sequences=SEQUENCES)
    return SimpleNamespace(device=device, offered=weights, offer=Offer(device))


def asked(lines, k=10, users=watching.USERS, memory_mb=1024, titles=True, **model):
    """Answers to some lines, each an object or the text itself."""
    experiment = world.experiment(model=model)
    experiment = experiment.model_copy(update={"runtime": SimpleNamespace(memory_mb=memory_mb)})
    weights = world.weights(experiment.model, ITEMS)
    trained = opened(experiment, weights, titles)
    out = io.StringIO()
    watch(trained, (line if isinstance(line, str) else json.dumps(line) for line in lines), k, out, users)
    assert out.getvalue().count("\n") == len(out.getvalue().splitlines())
    return [json.loads(line) for line in out.getvalue().splitlines()]


def names(answer):
    assert answer.keys() == {"items", "ms"}
    assert answer["ms"] >= 0
    return [item["item"] for item in answer["items"]]


def expected(history, k=10, times=None, facts={}, **model):  # noqa: B006
    """Of a full pass, by numbers."""
    config = world.experiment(model=model).model
    window, n = torch.tensor([history[-config.max_length :]]), torch.tensor([min(len(history), config.max_length)])
    known = None if times is None else Moments(torch.tensor([times]), n, **facts)
    scored = final_scores(config, world.weights(config, ITEMS), window, n, known)[0]
    scored[history] = -torch.inf
    return [f"i{n}" for n in scored.topk(min(k, ITEMS)).indices.tolist() if scored[n] > -torch.inf]


def say(*numbers, **rest):
    return [{"item": f"i{n}", **rest} for n in numbers]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_each_event_is_answered_with_what_a_full_pass_recommends():
    history = [3, 1, 4, 1, 5, 9, 2, 6, 8, 3]  # longer than the window
    for n, answer in enumerate(asked(say(*history)), start=1):
        assert names(answer) == expected(history[:n])
        scores = [item["score"] for item in answer["items"]]
        assert scores == sorted(scores, reverse=True)


def test_what_the_history_has_is_left_out_and_no_more():
    answers = asked(say(*range(ITEMS)), k=1000)
    for n, answer in enumerate(answers, start=1):
        assert set(names(answer)) == {f"i{item}" for item in range(n, ITEMS)}
    assert names(answers[-1]) == []


def test_k():
    assert [len(names(answer)) for answer in asked(say(1, 2), k=3)] == [3, 3]


def test_times_count():
    model = {"attention": {"kind": "time-aware", "buckets": 30}}
    near, far = [5, 6, 10], [5, 6, 10**9]
    for times in (near, far):
        lines = [{"item": f"i{n}", "time": time} for n, time in zip([3, 1, 4], times, strict=True)]
        assert names(asked(lines, **model)[-1]) == expected([3, 1, 4], times=times, **model)
    missing, fine = asked([{"item": "i1"}, {"item": "i1", "time": -5}], **model)
    assert missing == {"error": 'line 1: the model looks at times; say "time", in seconds'}
    assert names(fine) == expected([1], times=[-5], **model)


def test_behaviours_and_ratings_count():
    model = {"inputs": [{"kind": "behaviour", "names": ["view", "buy"]}, {"kind": "rating"}]}
    lines = [{"item": "i3", "behaviour": "buy", "rating": 4.5}, {"item": "i1", "behaviour": "view"}]
    known = {"behaviours": torch.tensor([[1, 0]]), "ratings": torch.tensor([[4.5, float("nan")]])}
    assert names(asked(lines, **model)[1]) == expected([3, 1], times=[0, 0], facts=known, **model)
    bad = [{"item": "i1"}, {"item": "i1", "behaviour": ["buy"]}, {"item": "i1", "behaviour": "buy", "rating": "high"}]
    missing, listed, worded = (answer["error"] for answer in asked(bad, **model))
    assert missing == 'line 1: the model looks at behaviours; say "behaviour", one of view, buy'
    assert listed == missing.replace("1", "2")
    assert worded == 'line 3: "rating" must be a number'


@pytest.mark.parametrize(
    ("name", "number"),
    [("i3", 3), ("Alien (1979)", 2), ("aliens (1986)", 3), ("heat", 0), ("samurai", 7), ("I6", 6), ("ÄRGER", 8)],
)
def test_items_are_found_by_id_or_title(name, number):
    (answer,) = asked([{"item": name}])
    assert names(answer) == expected([number])
    assert catalogue().find(name) == number


def test_whole_names_are_found_without_a_search(monkeypatch):
    experiment = world.experiment()
    weights = world.weights(experiment.model, ITEMS)
    one = Watch(opened(experiment, weights).offer, Session(experiment.model, weights), 3)
    monkeypatch.setattr(Catalogue, "find", lambda *_: pytest.fail("searched"))
    assert [one._find(name) for name in ("i4", "HEAT (1995)", "up, up (2009)", "7 Samurai")] == [4, 0, 1, 7]


def test_titles_come_along_where_there_are_some():
    (answer,) = asked(say(19), k=100)
    titles = {item["item"]: item["title"] for item in answer["items"]}
    assert (titles["i0"], titles["i6"], titles["i8"]) == ("Heat (1995)", "i6", "Ärger")
    (answer,) = asked(say(19), k=100, titles=False)
    assert all(item["item"] == item["title"] for item in answer["items"])
    (answer,) = asked([{"item": "I19"}], titles=False)
    assert answer["error"].startswith("line 1: no item 'I19'; did you mean 'i19'")


# --- several people, new beginnings ----------------------------------------------------------------------------------


def test_several_people_by_turns():
    a, b, nobody = [3, 1, 4], [1, 5, 9], [2, 6, 5]
    lines = [[*say(x, user="a"), *say(y, user=7), *say(z)] for x, y, z in zip(a, b, nobody, strict=True)]
    answers = asked(sum(lines, []))
    for n in range(3):
        for history, answer in zip((a, b, nobody), answers[3 * n :], strict=False):
            assert names(answer) == expected(history[: n + 1])


def test_a_reset_begins_anew_for_one_person():
    lines = [*say(1, 2, user="a"), *say(1, 2, user="b"), {"reset": True, "user": "a"}]
    answers = asked([*lines, *say(3, user="a"), *say(3, user="b"), {"reset": True, "item": "i5", "user": "b"}])
    assert names(answers[4]) == []
    assert [names(answer) for answer in answers[5:]] == [expected([3]), expected([1, 2, 3]), expected([5])]
    assert names(asked([{"reset": True}])[0]) == []
    assert names(asked([*say(1), {"reset": False, "item": "i2"}])[1]) == expected([1, 2])


@pytest.mark.parametrize("bound", ["users", "memory_mb"])
def test_whoever_was_away_for_longest_is_forgotten(bound):
    model = world.experiment().model
    room = Session(model, world.weights(model, ITEMS)).nbytes * 2.5 / 2**20
    lines = [*say(1, user="a"), *say(1, user="b"), *say(2, user="a"), *say(1, user="c")]
    answers = asked([*lines, *say(3, user="a"), *say(2, user="b")], **{bound: {"users": 2, "memory_mb": room}[bound]})
    assert names(answers[4]) == expected([1, 2, 3])
    assert names(answers[5]) == expected([2])


# --- bad lines -------------------------------------------------------------------------------------------------------

BAD = {
    "{": "not JSON: ",
    "[" * 100_000: "not JSON: ",
    '{"item": ' + "9" * 5000 + "}": "not JSON: ",
    "[1]": "not a JSON object",
    "null": "not a JSON object",
    "{}": 'name an "item"',
    '{"user": "a"}': 'name an "item"',
    '{"reset": false}': 'name an "item"',
    '{"reset": 1, "item": "i1"}': '"reset" must be',
    '{"items": "i1"}': "unknown key 'items'; a line may have item, time,",
    '{"item": "i99"}': "no item 'i99'; did you mean 'i9'",
    '{"item": "\\ud800"}': "no item '\\ud800'",
    '{"item": ""}': "no item ''",
    '{"item": "Alien"}': "may be one of 2",
    '{"item": "BIG"}': "may be one of 2",
    '{"item": null}': '"item" must be',
    '{"item": true}': '"item" must be',
    '{"item": 1.0}': '"item" must be',
    '{"item": "i1", "user": ["a"]}': '"user" must be',
    '{"item": "i1", "time": "noon"}': '"time" must be',
    '{"item": "i1", "time": 1.5}': '"time" must be',
    '{"item": "i1", "time": NaN}': '"time" must be',
    '{"item": "i1", "time": 9223372036854775807}': '"time" must be',
    '{"reset": true, "item": "nothing"}': "no item 'nothing'",
}


@pytest.mark.parametrize(("line", "why"), BAD.items(), ids=[line[:40] for line in BAD])
def test_a_bad_line_is_named_and_changes_nothing(line, why):
    first, bad, last = asked([*say(1), "", "  \n", line, *say(2)])
    assert bad.keys() == {"error"}
    assert bad["error"].startswith("line 4: ")
    assert why in bad["error"]
    assert names(first) == expected([1])
    assert names(last) == expected([1, 2])


def test_a_fault_of_our_own_is_no_bad_line(monkeypatch):
    monkeypatch.setattr(Watch, "answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(say(1))


def test_an_answer_is_out_before_the_next_line_is_read():
    flushed = []

    class Out(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue().count("\n"))

    def lines():
        for n in range(3):
            assert flushed == list(range(1, n + 1))
            yield json.dumps({"item": f"i{n}"})

    experiment = world.experiment()
    watch(opened(experiment, world.weights(experiment.model, ITEMS)), lines(), 3, Out())
    assert flushed == [1, 2, 3]


# --- a real run ------------------------------------------------------------------------------------------------------


def test_a_finished_run_recommends_what_it_does_to_a_history(tmp_path: Path):
    experiment = parse(TINY, overrides=["federation.rounds=1"])
    run(experiment, rundir.create(experiment, tmp_path / "run"), Screen(quiet=True))
    trained, out = Trained(tmp_path / "run"), io.StringIO()
    history = [str(n % 7) for n in range(20)]  # longer than the window of 16
    watch(trained, [json.dumps({"item": int(item)}) for item in history], 5, out)
    for n, line in enumerate(out.getvalue().splitlines(), start=1):
        items, by_history = json.loads(line)["items"], trained.top(trained.stranger(history[:n]), 5)
        assert [item["item"] for item in items] == [item["item"] for item in by_history]
        scores = [item["score"] for item in by_history]
        assert [item["score"] for item in items] == pytest.approx(scores, abs=2e-4)


def test_what_was_merely_looked_at_may_be_recommended():
    """Where purchases are predicted."""
    experiment = world.experiment(model={"inputs": [{"kind": "behaviour", "names": ["buy", "view"]}]})
    weights = world.weights(experiment.model, ITEMS)
    watching = Watch(opened(experiment, weights).offer, Session(experiment.model, weights), ITEMS, target="buy")

    def left_out(item, behaviour):
        items = watching.answer(json.dumps({"item": item, "behaviour": behaviour}))["items"]
        return {f"i{n}" for n in range(ITEMS)} - {each["item"] for each in items}

    assert left_out("i3", "view") == set()
    assert left_out("i4", "buy") == {"i4"}
    assert left_out("i4", "view") == {"i4"}
    assert left_out("i3", "buy") == {"i3", "i4"}
