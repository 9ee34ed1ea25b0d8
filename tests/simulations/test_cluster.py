"""Workers on a Ray cluster, here one of two nodes with a core each on this machine; it is started once."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from client import batches
from client.device import Device
from common.data.catalogue import Catalogue
from common.data.prepare import prepare
from common.errors import StateError
from server.rounds import serve
from simulations.engines import play
from simulations.workers import Worker
from tests.support import world
from tests.support.leftovers import nobody_left
from tests.support.runs import tree

ray = pytest.importorskip("ray")
from simulations import cluster as module  # noqa: E402
from simulations.cluster import RayPool, _at_hand, _Member  # noqa: E402

DATA = {"kind": "synthetic", "users": 40, "items": 30, "interests": 4, "mean_length": 9, "max_length": 30}
CORES = 2


def placed(**runtime):
    experiment = world.experiment(
        data=DATA,
        loss=world.LOSSES["sampled-softmax"],
        model={"dropout": 0.2, "max_length": 11},
        federation={"rounds": 3, "cohort": 30, "optimizer": {"kind": "fedadam", "lr": 0.002}},
        evaluation={"every": 3, "sampled": 5},
        runtime=runtime,
    )
    return Device.open(experiment, prepare(experiment.data))


def played(device):
    return play(device, partial(serve, experiment=device.experiment, folder=None, observe=lambda line: None))


# --- where no cluster is needed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody.invalid:6379", "no address"])
def test_an_address_where_nobody_answers_is_one_line(address):
    device = placed()
    with pytest.raises(StateError, match=f"runtime.ray_address={address}: no Ray cluster answers there") as caught:
        RayPool(device.experiment, device.catalogue.folder, 1, address)
    assert "\n" not in str(caught.value)


@pytest.fixture
def files():
    """The prepared folder, and what travels of it."""
    folder = placed().catalogue.folder
    return SimpleNamespace(
        folder=folder,
        digest=Catalogue.open(folder).digest,
        content={path.name: path.read_bytes() for path in folder.iterdir()},
    )


def test_a_node_that_has_the_data_uses_its_own(files):
    with _at_hand(files.folder, files.digest, {}) as here:
        assert here == files.folder
    assert tree(files.folder) == files.content


@pytest.mark.parametrize("case", ["other data", "no folder", "no data"])
def test_a_node_that_has_not_gets_a_copy_for_a_moment(files, case, tmp_path):
    asked = {"other data": files.folder, "no folder": tmp_path / "nowhere", "no data": tmp_path}[case]
    digest = "another" if case == "other data" else files.digest
    with _at_hand(asked, digest, files.content) as here:
        assert here not in {files.folder, asked}
        assert tree(here) == files.content
    assert not here.exists()
    assert tree(files.folder) == files.content


def test_a_worker_needs_its_copy_no_longer(files, monkeypatch):
    device, used = placed(), []

    class Seen(Worker):
        def __init__(self, experiment, folder):
            used.append(Path(folder))
            super().__init__(experiment, folder)

    monkeypatch.setattr(module, "Worker", Seen)
    told = device.experiment.model_dump_json()
    member = _Member(told, "/nowhere", files.digest, files.content)
    assert not used[0].exists()
    weights, users = world.weights(device.experiment.model, device.catalogue.items), np.arange(40)
    own = Worker(told, str(files.folder))
    sent = weights.table.numpy(), weights.body.numpy()
    for task, arguments in (("solve", (users[:20], 1, None, None, None)), ("rank", (users, "test"))):
        found, wanted = member.work(sent, task, arguments), getattr(own, task)(weights, *arguments)
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_equal(one, two)


# --- two nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes():
    """Address of the cluster."""
    from ray.cluster_utils import Cluster

    with nobody_left():
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            nodes.add_node(num_cpus=CORES - 1)
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def run(two_nodes):
    """What a run whose workers are on the cluster gives, one in this process, and the pool that was used."""
    pools = []

    class Seen(RayPool):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pools.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RayPool", Seen)
        patch.setattr(batches, "CHUNK_USERS", 8)
        there = played(placed(workers=CORES, ray_address=two_nodes))
        here = played(placed())
    return SimpleNamespace(there=there, here=here, pools=pools)


def test_workers_land_on_both_nodes(run):
    (pool,) = run.pools
    assert len(pool.nodes) == CORES
    assert set(pool.nodes) == {node["NodeID"] for node in ray.nodes()}


def test_a_run_is_that_of_one_process(run):
    assert world.gap(run.there.weights, run.here.weights) < 1e-6
    for ranks, others in zip(run.there.test, run.here.test, strict=True):
        np.testing.assert_array_equal(ranks, others)
    assert all(len(np.unique(ranks)) > 3 for ranks in (run.there.test.full, run.there.test.sampled))


def test_afterwards_the_workers_are_gone_and_the_cluster_is_there(run):
    (pool,) = run.pools
    for _ in range(CORES):
        with pytest.raises(StateError, match="a worker on the Ray cluster is gone") as caught:
            pool.submit("rank", np.arange(3), "test").result()
        assert "\n" not in str(caught.value)
    assert [node["Alive"] for node in ray.nodes()] == [True] * CORES


@pytest.mark.usefixtures("run")
def test_more_workers_than_cores_are_refused_rather_than_waited_for(two_nodes, monkeypatch):
    monkeypatch.setattr(module, "STARTED", 1.0)
    device = placed()
    with pytest.raises(StateError, match=f"runtime.workers={CORES + 1}: they don't start .*too few of its cores"):
        RayPool(device.experiment, device.catalogue.folder, CORES + 1, two_nodes)


@pytest.mark.usefixtures("run")
def test_a_worker_that_cannot_start_says_why(two_nodes, files, tmp_path):
    device = placed()
    (tmp_path / "manifest.json").write_bytes(files.content["manifest.json"])
    broken = replace(device, catalogue=replace(device.catalogue, folder=tmp_path))
    with pytest.raises(StateError, match=r"runtime.workers=1: they don't start .*damaged.*items.npy") as caught:
        RayPool(device.experiment, broken.catalogue.folder, 1, two_nodes)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("run")
def test_what_workers_send_may_be_written_to(two_nodes):
    device = placed()
    pool = RayPool(device.experiment, device.catalogue.folder, 1, two_nodes)
    try:
        pool.load(world.weights(device.experiment.model, device.catalogue.items))
        numbers = pool.submit("solve", np.arange(3), 1, None, None, None).result()
    finally:
        pool.close()
    assert numbers.table.flags.writeable
    assert numbers.body.flags.writeable
