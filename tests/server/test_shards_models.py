"""Models of every sort on nodes of several users: the same as in one process, since devices get all they need."""

import pytest

from common.config import Experiment, experiment_hash
from common.data.catalogue import Catalogue
from common.data.prepare import prepare
from common.errors import TooFewNodes
from server.roster import Roster
from tests.server.test_shards import USERS, alone, experiment, private, run, same, unsharded
from tests.support.network import Clock, Network

MODELS = {
    "time-aware": {"attention": {"kind": "time-aware", "buckets": 6}},
    "local": {"attention": {"kind": "local", "window": 2}},
    "target": {"head": "target"},
    "gru": {"encoder": "gru"},
    "convolution": {"encoder": "cnn-attention"},
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    return Clock.put(monkeypatch)


@pytest.fixture(scope="module")
def about(tmp_path_factory):
    """A table of what is known of the made-up items."""
    ids = Catalogue.open(prepare(experiment().data)).item_ids()
    path = tmp_path_factory.mktemp("about") / "items.csv"
    path.write_text("item,kind\n" + "".join(f"{item},{'abc'[i % 3]}\n" for i, item in enumerate(ids)))
    return path


def built(given, about, items, **data):
    """The same experiment with items that are built from features."""
    features = {"source": str(about), "columns": [{"kind": "categorical", "name": "kind"}]}
    whole = given.model_dump()
    whole["data"] |= {"features": features, **data}
    whole["model"] |= {"items": items}
    return Experiment.model_validate(whole)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shards", ["sum", "users"])
def test_shards_train_the_model_of_one_process(tmp_path, model, shards):
    given = experiment(federation={"shards": shards}, model=model)
    same(run(given, Network(given, tmp_path)), alone(unsharded(given)))


@pytest.mark.parametrize("items", ["features", "both"])
@pytest.mark.parametrize(
    "loss", [{"kind": "softmax"}, {"kind": "sampled-softmax", "negatives": 7}], ids=["full", "few"]
)
@pytest.mark.parametrize("cold", [0.0, 0.2])
def test_built_items_come_with_their_features(tmp_path, about, items, loss, cold):
    given = built(experiment(loss=loss), about, items, cold=cold)
    network = Network(given, tmp_path)
    got = run(given, network)
    same(got, alone(given), bound=3e-5)  # Adam makes steps of full length from rounding, where gradients are small
    known = Catalogue.open(prepare(given.data)).items
    rows = 3 if items == "features" else 3 + known
    assert got.outcome.weights.table.shape == (rows, 8)


@pytest.mark.parametrize("items", ["features", "both"])
def test_private_built_items_are_noised_on_every_row(tmp_path, about, items):
    given = built(private(USERS), about, items)
    got = run(given, Network(given, tmp_path))
    same(got, alone(given))
    assert (got.outcome.weights.table.abs().sum(1) > 0.01).all()
    assert got.outcome.card["epsilon"] > 0


def test_a_node_that_knows_other_features_stays_out(tmp_path, about):
    given = built(experiment(), about, "both")
    network = Network(given, tmp_path)
    other = about.with_name("others.csv")
    other.write_text(about.read_text().replace(",c", ",a"))
    strange = built(experiment(), other, "both")
    (tmp_path / "strange").mkdir()
    there = Network(strange, tmp_path / "strange")
    network.configs[2]["data-path"] = there.configs[2]["data-path"]
    network.restart()
    with pytest.raises(TooFewNodes, match="its catalogue is not version"):
        Roster.discover(network, experiment_hash(given), quorum=0.9)
