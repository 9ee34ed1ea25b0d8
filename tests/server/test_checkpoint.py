"""Checkpoints and models: to the bit and back, and one clear line for whatever is wrong with a file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import StateError
from common.models.shapes import parameter_shapes
from common.models.weights import Weights
from server import checkpoint
from server.checkpoint import State, load, load_model, load_newest, save, save_model
from tests.support import world

ITEMS = 7
EXPERIMENT = world.experiment()
OTHER = world.experiment(seed=1)


def weights(seed=0):
    return world.weights(EXPERIMENT.model, ITEMS, seed)


def state(**changed):
    moments = {"table.exp_avg": torch.randn(ITEMS, 8), "table.step": torch.tensor(3.0), "body.exp_avg": torch.randn(5)}
    whole = {"weights": weights(), "optimizer": moments, "round": 12, "best": weights(1), "best_round": 10}
    return State(**{**whole, "best_value": 0.1 + 0.2, "stale": 2, **changed})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, weights(), EXPERIMENT)
    return path


def one_line(path, call, *arguments, match):
    with pytest.raises(StateError, match=match) as caught:
        call(path, *arguments)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def rewritten(path, change, change_facts=lambda facts: facts):
    """The same file with other tensors or facts, as if somebody had edited it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["hushrec"])
    del facts["sha256"]
    changed = change(tensors)
    save_file(changed, path, metadata={"hushrec": checkpoint.sealed(changed, change_facts(facts))})


# --- there and back --------------------------------------------------------------------------------------------------


def test_a_state_comes_back_to_the_bit(path):
    before = state()
    save(path, before, EXPERIMENT)
    after = load(path, EXPERIMENT)
    assert world.same(after.weights, before.weights)
    assert world.same(after.best, before.best)
    assert after.optimizer.keys() == before.optimizer.keys()
    for name, value in before.optimizer.items():
        assert torch.equal(after.optimizer[name], value)
        assert after.optimizer[name].dtype == value.dtype
    assert (after.round, after.best_round, after.best_value, after.stale) == (12, 10, 0.1 + 0.2, 2)


def test_a_young_state_comes_back(path):
    save(path, State(weights()), EXPERIMENT)
    after = load(path, EXPERIMENT)
    assert (after.optimizer, after.round, after.best, after.best_value) == ({}, 0, None, float("-inf"))


def test_runtime_is_no_part_of_an_experiment(path):
    save(path, state(), EXPERIMENT)
    assert load(path, world.experiment(runtime={"engine": "sequential"})).round == 12


def test_what_is_loaded_is_ones_own(path):
    save(path, state(), EXPERIMENT)
    first = load(path, EXPERIMENT)
    first.weights.body.add_(1)
    assert world.same(load(path, EXPERIMENT).weights, weights())


def test_a_model_comes_back_to_the_bit(model):
    assert world.same(load_model(model, EXPERIMENT, ITEMS), weights())
    with safe_open(model, framework="pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in file.keys()} == parameter_shapes(  # noqa: SIM118
            EXPERIMENT.model, ITEMS
        )
        told = json.loads(file.metadata()["hushrec"])["experiment"]
    assert told == EXPERIMENT.model_dump(mode="json", exclude={"runtime"})


def test_runtime_changes_no_byte_of_a_model(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    save_model(one, weights(), EXPERIMENT)
    runtime = {"engine": "sequential", "threads": 7, "memory_mb": 64, "checkpoint_every": 3}
    save_model(other, weights(), world.experiment(runtime=runtime))
    assert one.read_bytes() == other.read_bytes()


# --- what is wrong with a file ---------------------------------------------------------------------------------------

GARBAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "noise": lambda content: b"noise" * 100,
    "a huge header": lambda content: b"\xff" * 8 + content[8:],
    "broken header": lambda content: content[:9] + b"[" + content[10:],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_damaged_file(path, model, kind):
    save(path, state(), EXPERIMENT)
    for file, call, arguments in ((path, load, (EXPERIMENT,)), (model, load_model, (EXPERIMENT, ITEMS))):
        file.write_bytes(GARBAGE[kind](file.read_bytes()))
        one_line(file, call, *arguments, match="not a file of hushrec, or a truncated one")


def test_no_file(path):
    one_line(path, load, EXPERIMENT, match="no such file")
    one_line(path, load_model, EXPERIMENT, ITEMS, match="no such file")


def test_a_folder(path):
    path.mkdir()
    one_line(path, load, EXPERIMENT, match="is a folder")


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"hushrec": "{half"}, {"hushrec": "[]"}, {"hushrec": "3"}])
def test_another_programs_file(path, metadata):
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    one_line(path, load, EXPERIMENT, match="not a file of hushrec")
    one_line(path, load_model, EXPERIMENT, ITEMS, match="not a file of hushrec|is missing")


def test_another_experiment(path):
    save(path, state(), EXPERIMENT)
    one_line(path, load, OTHER, match="belongs to another experiment")


def test_another_format(path):
    save(path, state(), EXPERIMENT)
    rewritten(path, lambda tensors: tensors, lambda facts: facts | {"format": 99})
    one_line(path, load, EXPERIMENT, match="format 99 is not 2")


@pytest.mark.parametrize("name", ["weights.table", "weights.body", "best.table", "best.body"])
def test_a_missing_tensor(path, name):
    save(path, state(), EXPERIMENT)
    rewritten(path, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    one_line(path, load, EXPERIMENT, match="incomplete checkpoint")


@pytest.mark.parametrize("name", ["round", "best_round", "best_value", "stale"])
def test_a_missing_fact(path, name):
    save(path, state(), EXPERIMENT)
    rewritten(path, lambda tensors: tensors, lambda facts: {k: v for k, v in facts.items() if k != name})
    one_line(path, load, EXPERIMENT, match="incomplete checkpoint")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "norm.bias"}, "'norm.bias' is missing"),
        (lambda t: t | {"position": torch.zeros(2, 8)}, r"'position' is \(2, 8\), the experiment wants \(6, 8\)"),
        (lambda t: t | {"item": torch.full((ITEMS, 8), torch.nan)}, "'item' holds numbers that are not finite"),
        (lambda t: t | {"norm.bias": torch.full((8,), torch.inf)}, "'norm.bias' holds numbers that are not finite"),
    ],
)
def test_a_model_that_does_not_fit(model, change, match):
    rewritten(model, change)
    one_line(model, load_model, EXPERIMENT, ITEMS, match=match)


def test_a_model_of_another_catalogue_or_size(model):
    one_line(model, load_model, EXPERIMENT, ITEMS + 1, match=r"'item' is \(7, 8\), the experiment wants \(8, 8\)")
    one_line(model, load_model, world.experiment(model={"dim": 4}), ITEMS, match="'item' is")


# --- nothing half-written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), KeyboardInterrupt(), checkpoint.SafetensorError("disk")]
)
def test_a_failed_write_leaves_the_file_before(path, monkeypatch, fault):
    save(path, state(), EXPERIMENT)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(before[:100])
        raise fault

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises((StateError, KeyboardInterrupt)) as caught:
        save(path, state(round=13), EXPERIMENT)
    if not isinstance(fault, KeyboardInterrupt):
        assert str(path) in str(caught.value)
        assert "free some space" in str(caught.value)
    assert path.read_bytes() == before
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == dict.fromkeys(
        [path.name, "checkpoint.1.safetensors"], before
    )


# --- the ones before -----------------------------------------------------------------------------------------------


def kept(path):
    return {file.name: load(file, EXPERIMENT).round for file in path.parent.iterdir()}


@pytest.mark.parametrize("links", [True, False])
def test_the_last_ones_are_kept(path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *given: (_ for _ in ()).throw(OSError(95, "no links")))
    three = world.experiment(runtime={"checkpoints": 3})
    for round_ in range(1, 6):
        save(path, state(round=round_), three)
    assert kept(path) == {"checkpoint.safetensors": 5, "checkpoint.1.safetensors": 4, "checkpoint.2.safetensors": 3}


def test_one_is_enough_for_who_says_so(path):
    one = world.experiment(runtime={"checkpoints": 1})
    for round_ in (1, 2):
        save(path, state(round=round_), one)
    assert kept(path) == {"checkpoint.safetensors": 2}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink()])
def test_an_older_one_serves_where_the_newest_is_damaged(path, damage, caplog):
    for round_ in (1, 2):
        save(path, state(round=round_), EXPERIMENT)
    assert load_newest(path, EXPERIMENT).round == 2
    damage(path)
    assert load_newest(path, EXPERIMENT).round == 1
    assert "going on from checkpoint.1.safetensors" in caplog.text
    assert str(path) in caplog.text


def test_without_any_whole_one_the_newest_ones_fault_is_told(path):
    save(path, state(), EXPERIMENT)
    save(path, state(), EXPERIMENT)
    for file in path.parent.iterdir():
        file.write_bytes(b"x")
    one_line(path, load_newest, EXPERIMENT, match="truncated")


def test_more_or_fewer_may_be_kept_than_before(path):
    three = world.experiment(runtime={"checkpoints": 3})
    for round_ in (1, 2, 3):
        save(path, state(round=round_), three)
    path.unlink()
    path.with_name("checkpoint.1.safetensors").unlink()
    one = world.experiment(runtime={"checkpoints": 1})
    assert load_newest(path, one).round == 1
    assert checkpoint.found(path) == [path.with_name("checkpoint.2.safetensors")]


def test_a_kill_before_the_new_file_costs_no_older_one(path):
    three = world.experiment(runtime={"checkpoints": 3})
    for round_ in (1, 2, 3):
        save(path, state(round=round_), three)
    for newer, older in ((1, 2), (0, 1)):  # what `save` does before it writes
        checkpoint._keep(checkpoint.versions(path, 3)[newer], checkpoint.versions(path, 3)[older])
    save(path, state(round=4), three)
    assert kept(path) == {"checkpoint.safetensors": 4, "checkpoint.1.safetensors": 3, "checkpoint.2.safetensors": 2}


def test_a_crash_between_the_copy_and_the_new_file_leaves_both_names(path):
    save(path, state(round=1), EXPERIMENT)
    checkpoint._keep(path, checkpoint.versions(path, 2)[1])
    save(path, state(round=2), EXPERIMENT)
    assert kept(path) == {"checkpoint.safetensors": 2, "checkpoint.1.safetensors": 1}


def test_no_folder(tmp_path):
    one_line(tmp_path / "none" / "c.safetensors", save, state(), EXPERIMENT, match="cannot be written|no such")


def test_shared_memory_is_written_apart(path):
    """Tensors that share memory or are views are no trouble, and what is written is what they were then."""
    size, dim = len(weights().body), EXPERIMENT.model.dim
    whole = torch.arange(float(size + 4))
    shared = Weights(whole[: 2 * dim].view(dim, 2).T, whole[4:])
    save(path, State(shared, best=shared), EXPERIMENT)
    whole.zero_()
    assert load(path, EXPERIMENT).weights.table.tolist() == [[*range(0, 2 * dim, 2)], [*range(1, 2 * dim, 2)]]
