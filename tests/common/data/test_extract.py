"""A device's own file holds one user and nobody else, and trains and ranks as that user does among all."""

import numpy as np
import pytest

from client.device import Device
from common.data.extract import extract
from common.data.prepare import prepare
from common.errors import DataError
from common.sources import SequencesData
from server.rounds import serve
from simulations.grid import InProcessGrid
from tests.support import world

ONE = world.experiment(
    data={"kind": "synthetic", "users": 12, "items": 20, "interests": 4, "mean_length": 6},
    federation={"rounds": 2, "cohort": 5, "local": {"steps": 2, "lr": 0.5}},
    runtime={"engine": "sequential"},
)


def test_it_holds_one_user_only(tmp_path):
    whole = Device.open(ONE, prepare(ONE.data))
    own = Device.open(ONE, extract(prepare(ONE.data), range(7, 8), tmp_path / "seven"))
    seven = np.array([7])
    assert len(own.sequences) == 1
    assert 7 in own.sequences
    assert 0 not in own.sequences
    assert own.catalogue.items == whole.catalogue.items
    for split in ("train", "validation", "test"):
        (here, target), (there, expected) = (d.sequences.stops(seven, split) for d in (own, whole))
        assert target == expected
        got, wanted = own.sequences.windows(seven, here, 9), whole.sequences.windows(seven, there, 9)
        assert all((a == b).all() for a, b in zip(got, wanted, strict=True))
    start, end = whole.sequences.offsets[7:9]
    assert (own.sequences.items == whole.sequences.items[start:end]).all()


def test_it_tells_nothing_of_others(tmp_path):
    """Of two populations with the same items, and one user who is the same, the files of this user are the same."""
    made = []
    for name, others in (("one", "b z y x\nc x y z\n"), ("two", "b x y\nbroken\nc z z y x\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.txt").write_text("a x y z x\n" + others)
        config = SequencesData(kind="sequences", path=str(tmp_path / name / "events.txt"))
        made.append(extract(prepare(config), range(1), tmp_path / f"own-{name}"))
    here, there = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in made)
    assert here == there
    assert not any(str(tmp_path).encode() in content for content in here.values())


def test_devices_with_their_own_files_train_the_same_model(tmp_path, monkeypatch):
    device = Device.open(ONE, prepare(ONE.data))
    together = serve(InProcessGrid(device, "sequential"), ONE, None, lambda record: None)
    folders = [extract(prepare(ONE.data), range(user, user + 1), tmp_path / str(user)) for user in range(12)]
    grid = InProcessGrid(device, "sequential")
    plain = grid._context

    def own(node):
        context = plain(node)
        context.node_config["data-path"] = str(folders[context.node_config["partition-id"]])
        return context

    monkeypatch.setattr(grid, "_context", own)
    apart = serve(grid, ONE, None, lambda record: None)
    assert all((a == b).all() for a, b in zip(together.weights, apart.weights, strict=True))
    assert np.array_equal(together.test[0], apart.test[0], equal_nan=True)


def test_a_stranger_is_refused(tmp_path):
    prepared = prepare(ONE.data)
    with pytest.raises(DataError, match="has no users 12 … 12; its are 0 … 11"):
        extract(prepared, range(12, 13), tmp_path / "x")
    with pytest.raises(DataError, match="exists already"):
        extract(prepared, range(1, 2), tmp_path)
    assert not (tmp_path / "x").exists()
