"""Items that are built from public features: training, ranking and new items, alone and in company."""

import numpy as np
import pytest
import torch

from client.cohort import train
from client.device import Device
from client.evaluation import of_items, rank, scores
from client.newcomers import new_items
from client.problem import shared_negatives
from common.config import Experiment
from common.data import folder as disk
from common.data import itemrows
from common.data.catalogue import Catalogue
from common.data.extract import extract
from common.data.holdout import cold_items
from common.data.prepare import intact, prepare
from common.data.sequences import Sequences
from common.errors import DataError
from common.models.items import mixture_of
from tests.support import world

ITEMS, USERS = 20, np.arange(9)
LENGTHS = [3, 4, 5, 6, 7, 8, 9, 11, 12]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    lines = [f"u{u},i{i},{t}" for u, n in enumerate(LENGTHS) for t, i in enumerate(rng.choice(ITEMS, n, replace=False))]
    known = {line.split(",")[1] for line in lines}
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    rows = [f"i{i},{'ab'[i % 2]}|{'cdef'[i % 4]},{'' if i == 3 else i * 1.5}" for i in range(ITEMS) if f"i{i}" in known]
    (folder / "about.csv").write_text("item,kinds,price\n" + "\n".join(rows) + "\n")
    return folder


def setup(files, items="both", loss="softmax", *, cold=0.0, draw=0, local=None, **model):
    columns = [{"kind": "categorical", "name": "kinds", "separator": "|"}, {"kind": "numeric", "name": "price"}]
    about, held = {"source": str(files / "about.csv"), "columns": columns}, {"cold": cold, "cold_seed": draw}
    return Experiment.model_validate(
        {
            "name": "built",
            "data": {"kind": "table", "path": str(files / "events.csv"), "features": about, **held},
            "model": {"dim": 8, "blocks": 1, "heads": 2, "max_length": 6, "dropout": 0.1, "items": items, **model},
            "loss": world.LOSSES[loss],
            "federation": {"local": local or {"steps": 1, "lr": 0.5}, "weighting": "uniform"},
        }
    )


def start(experiment):
    folder = prepare(experiment.data)
    table = itemrows.table_rows(experiment, Catalogue.open(folder))
    return Sequences.open(folder), world.weights(experiment.model, table)


def together(experiment, clip=None, users=USERS):
    sequences, weights = start(experiment)
    found = {}
    for updates in train(experiment, weights, sequences, users, 2, clip):
        found |= {int(user): updates.one(i) for i, user in enumerate(updates.users)}
    return found


EACH = pytest.mark.parametrize("items", ["features", "both"])
EACH_LOSS = pytest.mark.parametrize("loss", list(world.LOSSES))


# --- the mixture ------------------------------------------------------------------------------------------------------


@EACH
def test_vectors_are_what_the_matrix_makes_of_the_rows(files, items):
    experiment = setup(files, items)
    folder = prepare(experiment.data)
    known, mixture = itemrows.load(folder), mixture_of(experiment, folder)
    dense = np.zeros((len(known.offsets) - 1, known.size), dtype=np.float32)
    for item in range(len(dense)):
        here = slice(known.offsets[item], known.offsets[item + 1])
        dense[item, known.rows[here]] += known.weights[here]
    whole = np.concatenate([np.eye(len(dense)), dense], axis=1) if items == "both" else dense
    assert whole.shape == (mixture.items, mixture.rows)
    assert mixture.rows == itemrows.table_rows(experiment, Catalogue.open(folder))
    table = torch.randn(3, mixture.rows, 4, requires_grad=True)
    for given in (table, table[1]):
        expected = torch.from_numpy(whole).float() @ given
        made = mixture.vectors(given)
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
        pull = torch.randn_like(expected)
        theirs, ours = (torch.autograd.grad((each * pull).sum(), table)[0] for each in (expected, made))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        back = mixture.gradient(pull, table[0])
        torch.testing.assert_close(back, ours if given.dim() == 3 else ours[1], atol=1e-5, rtol=0)


def test_each_feature_has_rows_of_its_own(files):
    folder = prepare(setup(files).data)
    known = itemrows.load(folder)
    assert known.size == 6 + 2  # two kinds and four, then price and whether it is missing
    ids = Catalogue.open(folder).item_ids()
    here = slice(*known.offsets[ids.index("i3") : ids.index("i3") + 2])
    assert known.rows[here].tolist()[-1] == 7  # i3 has no price
    assert known.weights[here].tolist() == [0.5, 0.5, 1.0]


# --- training ---------------------------------------------------------------------------------------------------------


@EACH_LOSS
@EACH
@pytest.mark.parametrize("local", [{"steps": 1, "lr": 0.5}, {"steps": 3, "lr": 0.5}], ids=["one step", "three"])
def test_a_cohort_trains_as_each_user_alone(files, items, loss, local):
    experiment = setup(files, items, loss, local=local)
    whole = together(experiment)
    for user in USERS:
        alone = together(experiment, users=USERS[user : user + 1])[user]
        assert world.gap(whole[user], alone) < 1e-6
    assert max(float(update.table.abs().max()) for update in whole.values()) > 1e-3


@EACH_LOSS
@EACH
def test_a_step_with_a_clip_is_the_same_step(files, items, loss):
    """Own gradients at shared weights, against copies of the weights that are trained: 1e9 clips nothing."""
    experiment = setup(files, items, loss)
    clipped, plain = together(experiment, clip=1e9), together(experiment)
    for user in USERS:
        assert world.gap(clipped[user], plain[user]) < 1e-6


@EACH_LOSS
@EACH
def test_the_sum_of_all_is_the_sum_of_each(files, items, loss):
    experiment = setup(files, items, loss)
    sequences, weights = start(experiment)
    for updates in train(experiment, weights, sequences, USERS, 2):
        rows, total = updates.summed(updates.expected)
        assert rows is None
        expected = [sum(parts) for parts in zip(*(updates.one(i) for i in range(len(updates))), strict=True)]
        assert world.gap(total, type(total)(*expected)) < 1e-5


def test_own_rows_are_left_away_by_round_and_in_training_only(files):
    experiment = setup(files, "both", own_dropout=0.5)
    folder = prepare(experiment.data)
    first, again, second = (mixture_of(experiment, folder, round_).own for round_ in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert 0 < float(first.mean()) < 1
    assert bool(mixture_of(experiment, folder).own.all())
    mixture = mixture_of(experiment, folder, 1)
    gone = first.flatten() == 0
    untouched = mixture.gradient(torch.ones(1, mixture.items, 3), torch.ones(mixture.rows, 3))[0][: mixture.items][gone]
    assert not untouched.any()


# --- new items --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0, 5])
def test_cold_items_are_somebodys_last_event_at_most(files, draw):
    experiment = setup(files, cold=0.3, draw=draw)
    folder = prepare(experiment.data)
    sequences, items = Sequences.open(folder), Catalogue.open(folder).items
    cold = cold_items(items, 0.3, draw)
    assert cold.tolist() == new_items(experiment, items).tolist() != cold_items(items, 0.3, 5 - draw).tolist()
    assert items == Catalogue.open(prepare(setup(files).data)).items
    for user in USERS:
        events = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        assert not np.isin(events[:-1], cold).any()
    trained, _ = sequences.events(USERS, sequences.stops(USERS, "train")[0])
    assert not np.isin(trained, cold).any()
    _, targets = sequences.stops(USERS, "test")
    assert np.isin(targets, cold).any()
    assert not np.isin(sequences.stops(USERS, "validation")[1], cold).any()


def test_what_is_left_of_a_short_history_is_warm(tmp_path):
    """With fewer than three events all of a history is trained on, so a cold one may not end it."""
    cold = cold_items(10, 0.3, 0).tolist()
    warm = [i for i in range(10) if i not in cold]
    histories = {
        "all": [warm[0], *warm],  # so that all are known
        "long": [warm[0], warm[1], warm[2], cold[0]],
        "short": [warm[0], cold[1], cold[0]],
        "cold": [cold[0], cold[1], cold[2]],
        "two": [warm[3], cold[2]],
    }
    order = [*range(10)]
    lines = [f"first,{i},{t}" for t, i in enumerate(order)]
    lines += [f"{user},{i},{t}" for user, items in histories.items() for t, i in enumerate(items)]
    (tmp_path / "x.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    data = {"kind": "table", "path": str(tmp_path / "x.csv"), "cold": 0.3}
    folder = prepare(Experiment.model_validate({"name": "x", "data": data}).data)
    sequences, users = Sequences.open(folder), Sequences.open(folder).user_ids()
    assert Catalogue.open(folder).item_ids() == [str(i) for i in order]
    kept = {
        user: sequences.items[sequences.offsets[n] : sequences.offsets[n + 1]].tolist() for n, user in enumerate(users)
    }
    assert kept["long"] == histories["long"]
    assert kept["short"] == [warm[0]]
    assert kept["two"] == [warm[3]]
    assert "cold" not in kept


@EACH_LOSS
@pytest.mark.parametrize("draw", [0, 5])
def test_a_cold_item_leaves_no_trace_in_training(files, loss, draw):
    """It is no target and no negative, so its own row stays where it began."""
    experiment = setup(files, "both", loss, cold=0.3, draw=draw)
    items = Catalogue.open(prepare(experiment.data)).items
    cold = torch.tensor(cold_items(items, 0.3, draw))
    warm = torch.ones(items, dtype=torch.bool)
    warm[cold] = False
    assert torch.equal(mixture_of(experiment, prepare(experiment.data)).own.flatten().bool(), warm)
    for update in together(experiment).values():
        assert not update.table[:items][cold].any()
    assert any(update.table[:items][warm].any() for update in together(experiment).values())


def test_negatives_are_warm_and_as_before_without_cold_items():
    cold = np.array([0, 3, 4])
    loss = Experiment.model_validate(
        {"name": "x", "data": {"kind": "synthetic"}, "loss": {"kind": "sampled-softmax", "negatives": 9}}
    ).loss
    assert not np.isin(shared_negatives(loss, 0, 1, 12, cold), cold).any()
    assert len(shared_negatives(loss, 0, 1, 12, cold)) == 9
    few = shared_negatives(loss, 0, 1, 6, cold)
    assert few.tolist() == [1, 2, 5]
    none = np.zeros(0, dtype=np.int64)
    assert np.array_equal(shared_negatives(loss, 0, 1, 99, none), shared_negatives(loss, 0, 1, 99))


def test_a_new_item_is_scored_by_its_features(files):
    """Two items of the same features get the same score, if neither has a row of its own."""
    experiment = setup(files, "features")
    sequences, weights = start(experiment)
    made = of_items(experiment, weights, sequences).table
    assert made.shape == (Catalogue.open(sequences.folder).items, 8)
    for _, scored in scores(experiment, weights, sequences, USERS, sequences.ends(USERS)):
        assert scored.shape[1] == len(made)
    assert np.isfinite(rank(experiment, weights, sequences, USERS, "test").full).all()


# --- where features come from -----------------------------------------------------------------------------------------


def test_a_device_gets_its_items_features(files, tmp_path):
    experiment = setup(files)
    prepared = prepare(experiment.data)
    own = extract(prepared, range(2, 4), tmp_path / "own")
    assert Catalogue.open(own).version == Catalogue.open(prepared).version
    assert (
        Catalogue.open(own).version
        != Catalogue.open(
            prepare(setup(files, cold=0.0).data.model_copy(update={"features": type(experiment.data.features)()}))
        ).version
    )
    here, there = itemrows.load(own), itemrows.load(prepared)
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
    assert Device.open(experiment, own).rows == Device.open(experiment, prepared).rows


@pytest.mark.parametrize("name", ["feature_rows", "feature_weights", "feature_offsets"])
def test_damaged_features_are_told_and_made_anew(files, name):
    experiment = setup(files)
    folder = prepare(experiment.data)
    path = folder / f"{name}.npy"
    before = path.read_bytes()
    np.save(path, np.full(3, 10**6, dtype=np.load(path).dtype))
    with pytest.raises(DataError, match="do not fit"):
        itemrows.load(folder)
    assert not intact(folder)
    assert prepare(experiment.data) == folder
    assert path.read_bytes() == before


def test_features_that_a_folder_does_not_know(files):
    experiment = setup(files)
    bare = prepare(experiment.data.model_copy(update={"features": type(experiment.data.features)()}))
    assert "features" not in disk.read_manifest(bare)
    for ask, where in ((mixture_of, bare), (itemrows.table_rows, Catalogue.open(bare))):
        with pytest.raises(DataError, match=r"data\.features"):
            ask(experiment, where)


def test_a_model_of_features_needs_some():
    with pytest.raises(ValueError, match=r"model\.items both needs data\.features\.columns"):
        world.experiment(model={"items": "both"})
