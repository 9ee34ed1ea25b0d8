"""Damaged checkpoints, models, ledgers and accounts: one line says so, or the state is the one that was written."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from server import checkpoint as checkpoints
from server.checkpoint import State, load, load_model, save, save_model
from server.ledger import LEDGER_FILE, UPDATE
from tests.fuzz.books import BOOKS, ledger, outcome, paid
from tests.fuzz.mutations import Damage
from tests.support import world

ITEMS = 7
EXPERIMENT = world.experiment()
UNCHECKED = "safetensors has no checksum, and neither has the checkpoint: changed finite numbers pass"
UNSIGNED = "a line has no checksum: changed digits pass, and what was spent is counted wrongly"


def weights(seed=0):
    return world.weights(EXPERIMENT.model, ITEMS, seed)


def state():
    moments = {"table.exp_avg": weights(2).table, "table.step": torch.tensor(3.0), "body.exp_avg": weights(2).body}
    return State(weights(), moments, 12, weights(1), 10, 0.25, 2, 0.5)


def facts(found):
    """All of a state, so that two can be compared to the bit."""
    parts = [*found.weights, *found.optimizer.values(), *(found.best or ())]
    numbers = [(part.dtype, tuple(part.shape), part.numpy().tobytes()) for part in parts]
    said = (found.round, found.best_round, found.best_value, found.stale, found.clip)
    return numbers, list(found.optimizer), json.dumps(said)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save(path, state(), EXPERIMENT)
    return path


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, weights(), EXPERIMENT)
    return path


def resumed(path):
    found = outcome(load, path, EXPERIMENT)
    return None if found is None else facts(found)


def used(path):
    found = outcome(load_model, path, EXPERIMENT, ITEMS)
    return None if found is None else [part.numpy().tobytes() for part in found]


READERS = {"checkpoint": resumed, "model": used}


@pytest.fixture(params=READERS)
def file(request):
    """One of both, how it is read, and what is read from it."""
    path = request.getfixturevalue(request.param)
    read = READERS[request.param]
    return path, read, read(path)


def sizes(content):
    """Where the header ends."""
    return 8 + struct.unpack("<Q", content[:8])[0]


# --- checkpoints and models ------------------------------------------------------------------------------------------


def test_any_damage_is_named_or_read(file):
    """Nothing but a StateError or a state comes out, and what is read is finite and of the right shapes."""
    path, read, _ = file
    content, damage, refused = path.read_bytes(), Damage(0), 0
    for _ in range(200):
        path.write_bytes(damage.any(content))
        refused += read(path) is None
    assert refused >= 100


def test_every_cut_is_named(file):
    path, read, _ = file
    content, damage = path.read_bytes(), Damage(1)
    for _ in range(100):
        path.write_bytes(content[: damage.below(len(content))])
        assert read(path) is None
        path.write_bytes(content + damage.rng.bytes(1 + damage.below(50)))
        assert read(path) is None


def test_a_flipped_bit_of_the_frame_is_named_or_without_consequence(file):
    """Of the length and of the list of tensors; names and facts in it are told apart below."""
    path, read, whole = file
    content, damage, accepted = path.read_bytes(), Damage(2), 0
    for place in range(8):
        for bit in range(8):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << bit
            path.write_bytes(spoilt)
            assert read(path) is None
    for _ in range(200):
        spoilt = bytearray(content)
        spoilt[8 + damage.below(sizes(content) - 8)] ^= 1 << damage.below(8)
        path.write_bytes(spoilt)
        accepted += read(path) is not None
    assert accepted < 200
    path.write_bytes(content)
    assert read(path) == whole


PARTS = [("model", "header"), pytest.param("checkpoint", "header")]
PARTS += [pytest.param(kind, "numbers") for kind in READERS]


@pytest.mark.parametrize(("kind", "where"), PARTS)
def test_no_flipped_bit_passes_unseen(kind, where, request):
    path, read = request.getfixturevalue(kind), READERS[kind]
    content, damage, whole, unseen = path.read_bytes(), Damage(3), read(path), 0
    border = sizes(content)
    for _ in range(150):
        spoilt = bytearray(content)
        place = 8 + damage.below(border - 8) if where == "header" else border + damage.below(len(content) - border)
        spoilt[place] ^= 1 << damage.below(8)
        path.write_bytes(spoilt)
        unseen += read(path) not in (None, whole)
    assert unseen == 0


@pytest.mark.parametrize("bit", [0, 22, 30, 31])
def test_one_bit_of_one_weight(model, bit):
    """The lowest, the highest of the fraction, one of the exponent, and the sign."""
    content = bytearray(model.read_bytes())
    content[-4 + bit // 8] ^= 1 << bit % 8
    model.write_bytes(content)
    assert used(model) is None


def rewritten(path, change_tensors=lambda tensors: tensors, **told):
    """The same file with other tensors or facts, as if somebody had edited it."""
    content = path.read_bytes()
    before = json.loads(json.loads(content[8 : sizes(content)])["__metadata__"]["hushrec"])
    del before["sha256"]
    changed = change_tensors(load_file(path))
    save_file(changed, path, metadata={"hushrec": checkpoints.sealed(changed, before | told)})


ODD = ["x", None, [], {}, -1, 1.5, False, 10**400, float("nan"), "12", [12]]


@pytest.mark.parametrize("name", ["format", "experiment"])
@pytest.mark.parametrize("value", ODD)
def test_odd_facts_of_origin_are_named(checkpoint, name, value):
    rewritten(checkpoint, **{name: value})
    assert resumed(checkpoint) is None


@pytest.mark.parametrize("name", ["round", "best_round", "stale", "best_value"])
@pytest.mark.parametrize("value", ["x", None, [], {}])
def test_odd_facts_are_named(checkpoint, name, value):
    rewritten(checkpoint, **{name: value})
    assert resumed(checkpoint) is None


CHANGES = {
    "narrower": lambda t: t | {"weights.table": t["weights.table"][:, :-1].contiguous()},
    "shorter": lambda t: t | {"weights.body": t["weights.body"][:-1].contiguous()},
    "another best": lambda t: t | {"best.body": torch.zeros(2)},
    "integers": lambda t: t | {"weights.body": t["weights.body"].long()},
    "double precision": lambda t: t | {"weights.table": t["weights.table"].double()},
    "a scalar": lambda t: t | {"weights.table": torch.tensor(1.0)},
    "nothing": lambda t: t | {"weights.body": torch.zeros(0)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_named(checkpoint, change):
    rewritten(checkpoint, CHANGES[change])
    assert resumed(checkpoint) is None


def test_names_that_were_swapped_in_a_model_are_named(model):
    """Where their shapes differ; equal ones would take a checksum."""
    names = list(load_file(model))
    for one in names:
        for other in names:
            tensors = load_file(model)
            tensors[one], tensors[other] = tensors[other], tensors[one]
            if tensors[one].shape != tensors[other].shape:
                path = model.with_name("swapped.safetensors")
                save_file(tensors, path, metadata={"hushrec": checkpoints.sealed(tensors, {})})
                assert used(path) is None


def test_an_old_header_with_new_numbers(tmp_path, checkpoint, model):
    """Two files' halves in one, as after a write that was no atomic one."""
    parts, damage = [checkpoint.read_bytes(), model.read_bytes()], Damage(4)
    path = tmp_path / "both"
    for _ in range(60):
        place = damage.below(min(map(len, parts)))
        for first, second in (parts, parts[::-1]):
            path.write_bytes(first[:place] + second[place:])
            for found in (outcome(load, path, EXPERIMENT), outcome(load_model, path, EXPERIMENT, ITEMS)):
                assert found is None or path.read_bytes() in parts


# --- ledgers and accounts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("book", BOOKS)
def test_a_damaged_book_is_named_or_read(book, tmp_path):
    paid(tmp_path)
    (read, name), damage, refused = BOOKS[book], Damage(5), 0
    content = (tmp_path / name).read_bytes()
    for _ in range(300):
        (tmp_path / name).write_bytes(damage.any(content))
        refused += read(tmp_path) is None
    assert refused >= 150


@pytest.mark.parametrize("book", BOOKS)
def test_a_line_that_is_cut_off_is_named(book, tmp_path):
    paid(tmp_path)
    read, name = BOOKS[book]
    content = (tmp_path / name).read_bytes()
    for end in range(1, len(content)):
        (tmp_path / name).write_bytes(content[:end])
        assert (read(tmp_path) is None) == (content[end - 1 : end] != b"\n")


@pytest.mark.parametrize("book", BOOKS)
def test_no_flipped_bit_of_a_book_passes_unseen(book, tmp_path):
    paid(tmp_path)
    read, name = BOOKS[book]
    content, damage, unseen = (tmp_path / name).read_bytes(), Damage(6), []
    whole = read(tmp_path)
    for _ in range(300):
        (tmp_path / name).write_bytes(damage.flipped(content, most=1))
        found = read(tmp_path)
        unseen += [found] if found not in (None, whole) else []
    assert not unseen


@pytest.mark.parametrize("book", BOOKS)
def test_a_deeply_nested_line_is_named(book, tmp_path):
    read, name = BOOKS[book]
    (tmp_path / name).write_bytes(b"[" * 100_000 + b"\n")
    assert read(tmp_path) is None


@pytest.mark.parametrize("value", ["x", None, [], {}])
def test_odd_participations_are_named(value, tmp_path):
    line = {"what": UPDATE, "round": 1, "attempt": 0, "participations": value}
    (tmp_path / LEDGER_FILE).write_text(json.dumps(line) + "\n")
    assert ledger(tmp_path) is None
