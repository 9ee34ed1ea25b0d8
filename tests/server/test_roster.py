"""Who lives where: nodes in order or shuffled, missing, twice, quarrelling, refusing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from common.errors import StateError
from common.wire import ROUND
from server import roster as module
from server.roster import Roster, messages
from tests.support import world


class Nodes:
    """A Grid of nodes with answers by node id; a node without one stays silent. Other ids may come one by one."""

    def __init__(self, answers, *arrivals):
        self.answers, self.asked = answers, []
        self.arrivals = iter([*arrivals, answers])

    def get_node_ids(self):
        self.nodes = next(self.arrivals, self.answers)
        return list(self.nodes)

    def send_and_receive(self, sent, *, timeout=None):
        self.asked += sent
        return [
            answer for message in sent if (answer := self.answers[message.metadata.dst_node_id](message)) is not None
        ]


class Numbered(Nodes):
    """Node ids that are a range, as in our own Grid."""

    def get_node_ids(self):
        return range(world.NODE, world.NODE + len(self.answers))


def says(user, items=9, **more):
    def answer(message):
        made = world.answer(user, node=message.metadata.dst_node_id, metrics={"items": items, **more})
        del made.content["update"]
        return made

    return answer


def refuses(message):
    return world.answer(0, node=message.metadata.dst_node_id, error="wrong experiment")


def silent(message):
    return None


def babbles(message):
    made = says(0)(message)
    made.content.metric_records.clear()
    return made


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes only where somebody sleeps."""
    world.identify()
    now = SimpleNamespace(time=0.0)
    fake = SimpleNamespace(monotonic=lambda: now.time, sleep=lambda s: setattr(now, "time", now.time + s))
    monkeypatch.setattr(module, "time", fake)
    return now


def discover(nodes, **options):
    return Roster.discover(nodes, "fingerprint", **options)


def test_nodes_in_order_need_one_answer():
    grid = Numbered({2: says(0), 3: refuses, 4: refuses})
    found = discover(grid)
    assert len(grid.asked) == 1
    assert (found.population, found.items) == (3, 9)
    assert [found.node_of(user) for user in range(3)] == [2, 3, 4]
    assert isinstance(found.nodes, range)  # a large population costs nothing


def test_shuffled_nodes_are_all_asked(clock):
    grid = Nodes({70: says(2), 11: says(0), 35: says(1)})
    found = discover(grid)
    assert [found.node_of(user) for user in range(3)] == [11, 35, 70]
    assert [message.metadata.dst_node_id for message in grid.asked] == [70, 11, 35]
    assert {message.metadata.message_type for message in grid.asked} == {"query"}
    assert all(message.content.config_records[ROUND]["experiment"] == "fingerprint" for message in grid.asked)
    assert clock.time == pytest.approx(3)  # nobody new for so long


def test_latecomers_are_waited_for(clock):
    found = discover(Nodes({5: says(0), 6: says(1), 7: says(2)}, {}, {}, {6: 0}, {6: 0}, {5: 0, 6: 0}))
    assert found.population == 3
    assert clock.time > 3


def test_nobody_comes(clock):
    with pytest.raises(StateError, match="no node came within 20 s"):
        discover(Nodes({}), wait=20)
    assert clock.time == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([says(0), says(2)], "not one each"),
        ([says(1), says(2)], "not one each"),
        ([says(0), says(0)], "not one each"),
        ([says(0), says(-1)], "not one each"),
        ([says(0), says(1, items=8)], r"do not agree on one catalogue; sizes found: \[8, 9\]"),
        ([says(0), refuses], "1 of 2 nodes could not say who lives there: wrong experiment"),
        ([says(0), silent], "1 of 2 nodes did not say who lives there"),
        ([silent, silent], "2 of 2 nodes did not say who lives there"),
        ([says(0), babbles], "nonsense"),
        ([says(0), says(1.5)], "nonsense"),
        ([says(0), says([1])], "nonsense"),
        ([says(0), says(1, items=9.0)], "nonsense"),
    ],
)
def test_disorder_is_an_error_of_one_line(answers, why):
    with pytest.raises(StateError, match=why) as caught:
        discover(Nodes(dict(enumerate(answers, 40))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "why"), [(refuses, "wrong experiment"), (silent, "did not say"), (babbles, "nonsense")]
)
def test_a_numbered_grid_that_does_not_answer_is_an_error(answer, why):
    with pytest.raises(StateError, match=why):
        discover(Numbered({2: answer, 3: says(1)}))


def test_an_empty_grid_is_an_error():
    with pytest.raises(StateError, match="no node"):
        discover(Numbered({}))


@pytest.mark.parametrize("nodes", [[7, 5, 6], range(5, 8)])
def test_nobody_speaks_for_another(nodes):
    found = Roster(nodes, 9)
    for user, node in itertools.product(range(-2, 5), range(3, 10)):
        assert found.hosts(node, user) == (0 <= user < 3 and nodes[user] == node)


def test_messages_share_their_content():
    content = RecordDict({ROUND: ConfigRecord({"round": 4})})
    sent = list(messages(Roster([7, 5, 6], 9), np.array([2, 0]), content, "train", 4))
    assert [message.metadata.dst_node_id for message in sent] == [6, 7]
    assert {(message.metadata.message_type, message.metadata.group_id) for message in sent} == {("train", "4")}
    assert all(message.content is content for message in sent)
