"""Updates that wait in the server's process: summed by their maker, never one by one; copied, they count the same."""

import copy
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from flwr.common.serde import message_from_proto, message_to_proto

from client import step
from client.training import Updates
from common.wire import METRICS, UPDATE, arrays
from server.roster import Roster
from server.rounds import serve
from server.strategy import FederatedRanking
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.support import world

ITEMS = 20
HISTORIES = world.random_histories([1, 3, 4, 6, 8, 9, 11, 14, 20, 20], ITEMS)  # of two widths of windows
USERS = list(range(len(HISTORIES)))
ENGINES = ["vectorized", "sequential"]
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)


def setup(loss="sampled-softmax", **federation):
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": 0.2, "max_length": 11},
        federation={"local": {"lr": 0.3}, "optimizer": {"kind": "fedavg"}, "rounds": 3, "cohort": 8, **federation},
    )


def grid_of(experiment, engine="vectorized", monkeypatch=None):
    device = world.device(experiment, world.sequences(HISTORIES, held_out=False), ITEMS)
    if monkeypatch:
        monkeypatch.setattr("client.device._open", lambda *_: device)
    return InProcessGrid(device, engine)


def replies(experiment, users=USERS, change=lambda replies: None):
    """What the users of one process answer in the first round."""
    weights = world.weights(experiment.model, ITEMS)
    found = grid_of(experiment).send_and_receive(world.ask("train", experiment, weights, users))
    change(found)
    return found


def aggregated(experiment, messages):
    """The mean update and what is said of it."""
    roster = Roster(range(FIRST_NODE, FIRST_NODE + len(USERS)), ITEMS)
    start = world.weights(experiment.model, ITEMS)
    strategy = FederatedRanking(experiment, roster, world.weights(experiment.model, ITEMS))
    _, metrics = strategy.aggregate_train(1, messages)
    return [part - begin for part, begin in zip(strategy.weights, start, strict=True)], dict(metrics), strategy


@pytest.fixture
def counted(monkeypatch):
    """The single updates that anybody asked for."""
    asked, one = [], Updates.one

    def note(self, i):
        asked.append(int(self.users[i]))
        return one(self, i)

    monkeypatch.setattr(Updates, "one", note)
    return asked


def travelled(message):
    return message_from_proto(type(message_to_proto(message)).FromString(message_to_proto(message).SerializeToString()))


def plain(message):
    """The same reply made of Flower's own Arrays."""
    twin = copy.deepcopy(message)
    record = message.content.array_records[UPDATE]
    twin.content.array_records[UPDATE] = ArrayRecord({name: Array(array.numpy()) for name, array in record.items()})
    return twin


TRAVELS = {
    "copied": copy.deepcopy,
    "pickled": lambda message: pickle.loads(pickle.dumps(message)),
    "sent": travelled,
    "plain": plain,
}


# --- never one by one ------------------------------------------------------------------------------------------------


@EACH_LOSS
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("local", [{"steps": 1}, {"epochs": 2}])
def test_a_normal_run_never_asks_for_a_single_update(loss, engine, local, counted, monkeypatch):
    experiment, lines = setup(loss, local=local), []
    outcome = serve(grid_of(experiment, engine, monkeypatch), experiment, None, lines.append)
    assert counted == []
    assert [line["clients"] for line in lines if line["kind"] == "train"] == [8, 8, 8]
    assert outcome.rounds == 3


@pytest.mark.parametrize("weighting", ["events", "uniform"])
def test_one_step_of_everybody_costs_no_stacked_pass(weighting, monkeypatch):
    def never(self):
        raise AssertionError("the stacked path was taken")

    monkeypatch.setattr(Updates, "_stacked", property(never))
    change, metrics, _ = aggregated(setup(weighting=weighting), replies(setup(weighting=weighting)))
    assert metrics["clients"] == len(USERS)
    assert all(part.any() for part in change)


def test_a_reply_that_is_lost_leaves_the_others_right(counted):
    experiment = setup()
    lost = [reply for user, reply in enumerate(replies(experiment)) if user != 5]
    found, metrics, _ = aggregated(experiment, lost)
    assert counted == []
    assert metrics["clients"] == len(USERS) - 1
    expected, same_metrics, _ = aggregated(experiment, [plain(reply) for reply in lost])
    assert world.gap(found, expected) < 1e-6
    assert metrics == pytest.approx(same_metrics)
    assert world.gap(found, aggregated(experiment, replies(experiment))[0]) > 1e-4


# --- on whatever way -------------------------------------------------------------------------------------------------


@EACH_LOSS
@pytest.mark.parametrize("travel", TRAVELS)
@pytest.mark.parametrize("local", [{"steps": 1}, {"steps": 2}])
def test_copied_or_sent_updates_count_the_same(loss, travel, local):
    experiment = setup(loss, local={"lr": 0.3, **local})
    near = replies(experiment)
    expected, metrics, _ = aggregated(experiment, near)
    for far in (range(len(near)), [1, 4, 8]):  # all of them, or some beside others that wait here
        mixed = [TRAVELS[travel](reply) if i in far else reply for i, reply in enumerate(near)]
        found, same_metrics, _ = aggregated(experiment, mixed)
        assert world.gap(found, expected) < 1e-6
        assert same_metrics == pytest.approx(metrics)
    assert max(float(part.abs().max()) for part in expected) > 1e-2


def test_no_order_of_arrival_changes_a_bit():
    experiment = setup()
    expected, metrics, _ = aggregated(experiment, replies(experiment))
    for order in (USERS[::-1], [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]):
        again = replies(experiment)
        found, same_metrics, _ = aggregated(experiment, [again[user] for user in order])
        assert world.same(found, expected)
        assert same_metrics == metrics


def test_updates_that_are_asked_for_later_are_of_the_weights_of_then():
    """The server steps in place, and must not pull the ground from under what still waits."""
    experiment = setup()
    roster = Roster(range(FIRST_NODE, FIRST_NODE + len(USERS)), ITEMS)
    strategy = FederatedRanking(experiment, roster, world.weights(experiment.model, ITEMS))
    sent = list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), None))
    late, early = (grid_of(experiment).send_and_receive(sent) for _ in range(2))
    expected = [plain(reply) for reply in early]
    strategy.aggregate_train(1, late)
    assert not world.same(strategy.weights, world.weights(experiment.model, ITEMS))
    for reply, before in zip(late, expected, strict=True):
        for name, array in before.content.array_records[UPDATE].items():
            np.testing.assert_array_equal(reply.content.array_records[UPDATE][name].numpy(), array.numpy())


# --- what is no update that waits ------------------------------------------------------------------------------------


def test_a_changed_update_is_what_counts(counted):
    experiment, scale = setup(weighting="uniform"), 3.0

    def attack(found):
        record = found[7].content.array_records[UPDATE]
        record["body"] = arrays(a=scale * record["body"].numpy())["a"]

    honest, attacked = replies(experiment), replies(experiment, change=attack)
    own = honest[7].content.array_records[UPDATE]["body"].numpy()
    before, after = aggregated(experiment, honest)[0], aggregated(experiment, attacked)[0]
    np.testing.assert_allclose(after[1] - before[1], (scale - 1) * own / len(USERS), atol=1e-6)
    assert set(counted) == {7}


@pytest.mark.parametrize("rows", [[0, 0], [ITEMS], [-1]])
def test_rows_that_were_exchanged_are_looked_at(rows):
    def attack(found):
        record = found[7].content.array_records[UPDATE]
        wrong = record["rows"].numpy().copy()
        wrong[: len(rows)] = rows
        record["rows"] = Array(wrong)

    _, metrics, strategy = aggregated(setup(), replies(setup(), change=attack))
    assert metrics["rejected"] == 1
    assert "rows outside the catalogue or repeated" in next(iter(strategy.rejections))


def test_one_update_under_two_names_counts_twice():
    """A copycat in this process: two users say the same, and both were asked."""
    experiment = setup(weighting="uniform")

    def copycat(found):
        found[6].content.array_records[UPDATE] = found[7].content.array_records[UPDATE]

    found, metrics, _ = aggregated(experiment, replies(experiment, change=copycat))
    expected, _, _ = aggregated(experiment, [plain(reply) for reply in replies(experiment, change=copycat)])
    assert world.gap(found, expected) < 1e-6
    assert metrics["clients"] == len(USERS)


def test_a_second_reply_and_a_strangers_reply_do_not_count():
    experiment = setup()
    here = replies(experiment)
    expected = aggregated(experiment, here)[0]
    stranger = copy.copy(here[4])
    stranger.content.metric_records[METRICS]["user"] = 3
    found, metrics, strategy = aggregated(experiment, [*here[:4], stranger, *here[5:], here[2]])
    assert metrics["clients"] == len(USERS) - 1
    assert strategy.rejections == {"second reply of one user": 1, "speaks for a user of another node": 1}
    without = [reply for user, reply in enumerate(replies(experiment)) if user != 4]
    assert world.same(found, aggregated(experiment, without)[0])
    assert not world.same(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_user_in_trouble_is_refused_and_the_others_count(engine, monkeypatch):
    experiment = setup()
    expected, _, _ = aggregated(experiment, [reply for user, reply in enumerate(replies(experiment)) if user != 8])
    keep, bits, seen = step.keep_mask, step.uniform_bits, []
    monkeypatch.setattr(step, "uniform_bits", lambda *given: seen.append(given[3]) or bits(*given))

    def poisoned(drawn, share):
        mask = keep(drawn, share)
        mask[seen.pop() == 8] = np.nan
        return mask

    monkeypatch.setattr(step, "keep_mask", poisoned)
    weights = world.weights(experiment.model, ITEMS)
    grid = grid_of(experiment, engine, monkeypatch)
    found = grid.send_and_receive(world.ask("train", experiment, weights, USERS))
    assert [reply.has_error() for reply in found] == [user == 8 for user in USERS]
    change, metrics, strategy = aggregated(experiment, found)
    assert world.gap(change, expected) < 1e-6
    assert metrics["rejected"] == 1
    assert "diverged" in next(iter(strategy.rejections))


def test_refusals_only_move_nothing():
    experiment = setup()
    refused = [Message(Error(1, "no"), reply_to=reply) for reply in replies(experiment)]
    change, metrics, _ = aggregated(experiment, refused)
    assert not any(part.any() for part in change)
    assert metrics == {"clients": 0, "rejected": len(USERS)}
