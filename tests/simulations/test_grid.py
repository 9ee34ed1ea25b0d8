"""The in-process Grid: both engines give the same, trouble stays with one client, and Flower is where we left it."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from client import device as devices
from client.device import Device
from common.data.prepare import prepare
from common.wire import METRICS, UPDATE
from server.rounds import serve
from simulations import grid as module
from simulations.grid import BROKEN, FIRST_NODE, InProcessGrid
from tests.support import world

ITEMS, USERS = 20, 6
HISTORIES = world.random_histories([2, 4, 6, 8, 9, 12], ITEMS)
ENGINES = ["vectorized", "sequential"]


@pytest.fixture
def here(monkeypatch):
    """An experiment, weights, and a Grid of each engine whose devices hold histories in memory."""
    experiment = world.experiment(loss=world.LOSSES["sampled-softmax"])
    device = world.device(experiment, world.sequences(HISTORIES), ITEMS)
    monkeypatch.setattr(devices, "_open", lambda experiment, path: device)
    weights = world.weights(experiment.model, ITEMS)
    return SimpleNamespace(experiment=experiment, weights=weights, device=device)


def ask(here, kind, users=range(USERS), **config):
    config = {"split": "test", **config} if kind == "evaluate" else config
    return world.ask(kind, here.experiment, here.weights, users, **config)


def users_of(replies):
    said = [reply.content.metric_records[METRICS] for reply in replies]
    return [facts["user" if "user" in facts else "first"] for facts in said]


# --- both engines ----------------------------------------------------------------------------------------------------


def run(engine, loss, local, dropout, optimizer):
    """From a folder on disk, over several rounds, through the whole server."""
    experiment = world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": dropout},
        federation={"rounds": 4, "cohort": 5, "local": local, "optimizer": optimizer},
        evaluation={"every": 2, "sampled": 5},
        runtime={"engine": engine},
    )
    grid = InProcessGrid(Device.open(experiment, prepare(experiment.data)), engine)
    return serve(grid, experiment, None, lambda line: None)


FEDAVG, FEDADAM = {"kind": "fedavg"}, {"kind": "fedadam", "lr": 0.01}
RUNS = pytest.mark.parametrize(("local", "dropout"), [({"steps": 1}, 0.2), ({"epochs": 2, "lr": 0.2}, 0.0)])
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)


@EACH_LOSS
@RUNS
@pytest.mark.parametrize(("optimizer", "bound"), [(FEDAVG, 1e-6), (FEDADAM, 1e-5)])
def test_sequential_and_vectorized_runs_are_the_same(loss, local, dropout, optimizer, bound):
    one, other = (run(engine, loss, local, dropout, optimizer) for engine in ENGINES)
    assert world.gap(one.weights, other.weights) < bound
    assert (one.rounds, one.best_round) == (other.rounds, other.best_round)
    for a, b in zip(one.test, other.test, strict=True):
        np.testing.assert_array_equal(a, b)


@EACH_LOSS
@RUNS
@pytest.mark.parametrize("engine", ENGINES)
def test_one_engine_gives_the_same_bits_each_time(loss, local, dropout, engine):
    one, other = (run(engine, loss, local, dropout, FEDADAM) for _ in range(2))
    assert world.same(one.weights, other.weights)
    for a, b in zip(one.test, other.test, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_replies_come_in_the_order_of_the_messages_whatever_their_kinds(here, engine):
    sent = [
        *ask(here, "train", [4, 1]),
        *ask(here, "query", [2]),
        *ask(here, "train", [3]),
        *ask(here, "evaluate", [5]),
    ]
    replies = InProcessGrid(here.device, engine).send_and_receive(sent)
    assert users_of(replies) == [4, 1, 2, 3, 5]
    assert [UPDATE in reply.content.array_records for reply in replies] == [True, True, False, True, False]
    for message, reply in zip(sent, replies, strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.message_type == message.metadata.message_type


@pytest.mark.parametrize("engine", ENGINES)
def test_no_message_no_reply(here, engine):
    assert InProcessGrid(here.device, engine).send_and_receive([]) == []


def test_nodes_are_in_the_order_of_the_users(here):
    assert InProcessGrid(here.device, "vectorized").get_node_ids() == range(FIRST_NODE, FIRST_NODE + USERS)


# --- trouble stays with one client -----------------------------------------------------------------------------------


def test_a_client_that_raises_costs_its_own_reply_only(here, monkeypatch):
    app = module.client_app

    def fragile(message, context):
        if message.metadata.dst_node_id == FIRST_NODE + 3:
            raise OSError("the battery is empty")
        return app(message, context)

    grid = InProcessGrid(here.device, "sequential")
    expected = grid.send_and_receive(ask(here, "train"))
    monkeypatch.setattr(module, "client_app", fragile)
    replies = grid.send_and_receive(ask(here, "train"))
    assert [reply.has_error() for reply in replies] == [False] * 3 + [True] + [False] * 2
    assert (replies[3].error.code, replies[3].error.reason) == (BROKEN, "OSError: the battery is empty")
    for user in (0, 1, 2, 4, 5):
        for name, value in expected[user].content.array_records[UPDATE].items():
            np.testing.assert_array_equal(replies[user].content.array_records[UPDATE][name].numpy(), value.numpy())


def test_a_node_without_a_user_replies_with_an_error(here, monkeypatch):
    grid = InProcessGrid(here.device, "sequential")
    bare = Context(1, FIRST_NODE + 2, {}, RecordDict(), grid._context(FIRST_NODE + 2).run_config)
    grid._contexts[FIRST_NODE + 2] = bare
    replies = grid.send_and_receive(ask(here, "train"))
    assert [reply.has_error() for reply in replies] == [False] * 2 + [True] + [False] * 3
    assert "partition-id" in replies[2].error.reason


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_damaged_events_cost_their_user_only(here, engine, kind):
    here.device.sequences.items[here.device.sequences.offsets[2]] = ITEMS + 5
    replies = InProcessGrid(here.device, engine).send_and_receive(ask(here, kind))
    assert [reply.has_error() for reply in replies] == [False] * 2 + [True] + [False] * 3
    assert replies[2].error.reason == "events on items outside the catalogue"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_user_that_is_not_there(here, engine):
    replies = InProcessGrid(here.device, engine).send_and_receive(ask(here, "train", [1, USERS]))
    assert [reply.has_error() for reply in replies] == [False, True]


# --- pushing and pulling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_pushed_messages_are_answered_once(here, engine):
    grid = InProcessGrid(here.device, engine)
    first = grid.push_messages(ask(here, "query", [1, 2]))
    second = grid.push_messages(ask(here, "query", [3]))
    assert len({*first, *second}) == 3
    assert users_of(grid.pull_messages([second[0], first[1]])) == [3, 2]
    assert users_of(grid.pull_messages([*first, "unheard of"])) == [1]
    assert list(grid.pull_messages([*first, *second])) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_every_message_has_a_name_of_its_own(here, engine):
    grid, seen = InProcessGrid(here.device, engine), []
    for kind in ("query", "train", "evaluate"):
        sent = ask(here, kind)
        replies = grid.send_and_receive(sent)
        seen += [message.metadata.message_id for message in [*sent, *replies]]
    assert len(set(seen)) == len(seen) == 6 * USERS
    assert all(seen)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_messages_share_their_content_and_nobody_writes_into_it(here, monkeypatch):
    sent, arrived = ask(here, "train"), []
    train = module.HANDLERS["train"]

    def look(messages, users, device):
        arrived.extend(messages)
        return train(messages, users, device)

    monkeypatch.setitem(module.HANDLERS, "train", look)
    InProcessGrid(here.device, "vectorized").send_and_receive(sent)
    assert all(message is original for message, original in zip(arrived, sent, strict=True))
    model = sent[0].content.array_records["model"]
    assert all(message.content is sent[0].content for message in sent)
    assert np.shares_memory(model["table"].numpy(), here.weights.table.numpy())
    assert world.same(here.weights, world.weights(here.experiment.model, ITEMS))


def test_a_device_is_opened_once_for_all_its_messages(monkeypatch):
    experiment = world.experiment(runtime={"engine": "sequential"})
    device = Device.open(experiment, prepare(experiment.data))
    opened, real = [], Device.open.__func__
    monkeypatch.setattr(Device, "open", classmethod(lambda cls, *arguments: opened.append(1) or real(cls, *arguments)))
    devices._open.cache_clear()
    grid = InProcessGrid(device, "sequential")
    for _ in range(3):
        assert not any(
            reply.has_error() for reply in grid.send_and_receive(world.ask("query", experiment, None, [0, 1]))
        )
    assert opened == [1]


# --- what Flower keeps to itself -------------------------------------------------------------------------------------

MOVED = "Flower has moved {}; simulations/grid.py depends on it, see the Grid of the new version and mend it there"


def test_flowers_task_identity_is_still_there():
    from flwr.supercore import task_identity

    identity = getattr(task_identity, "TaskIdentity", None)
    assert identity is not None, MOVED.format("flwr.supercore.task_identity.TaskIdentity")
    for name in ("run_id", "task_id", "node_id"):
        assert isinstance(getattr(type(identity), name, None), property), MOVED.format(f"TaskIdentity.{name}")


def test_flower_still_reads_the_identity_that_a_grid_sets(here):
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    assert hasattr(Run, "create_empty"), MOVED.format("Run.create_empty")
    grid = InProcessGrid(here.device, "vectorized")
    grid.set_run(Run.create_empty(run_id=77))
    assert grid.run.run_id == 77
    message = grid.create_message(RecordDict(), "query", FIRST_NODE, "g", ttl=5.0)
    assert message.metadata.run_id == 77, MOVED.format("where Message() finds the run")
    assert message.metadata.src_node_id == TaskIdentity.node_id == 1
    assert (message.metadata.group_id, message.metadata.ttl, message.metadata.dst_node_id) == ("g", 5.0, FIRST_NODE)
    grid.set_run(Run.create_empty(run_id=1))


def test_flower_still_keeps_a_messages_name_where_we_write_it(here):
    grid = InProcessGrid(here.device, "vectorized")
    message = Message(RecordDict(), FIRST_NODE, "query")
    assert message.metadata.message_id == ""
    assert "_message_id" in message.metadata.__dict__, MOVED.format("Metadata._message_id")
    grid._identify(message)
    assert message.metadata.message_id, MOVED.format("Metadata._message_id")
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == message.metadata.message_id
