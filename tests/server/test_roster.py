"""Who lives where: nodes in order or shuffled, with one user or many, missing, quarrelling, refusing, coming late."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.errors import StateError, TooFewNodes
from common.wire import METRICS, ROUND
from server import exchange as exchange_module
from server import roster as module
from server.roster import ABSENT, Answer, Roster, messages
from tests.support import world


class Nodes:
    """A Grid of nodes with answers by node id; a node without one stays silent. Other ids may come one by one."""

    def __init__(self, answers, *arrivals):
        self.answers, self.asked = answers, []
        self.arrivals = iter([*arrivals, answers])

    def get_node_ids(self):
        self.nodes = next(self.arrivals, self.answers)
        return list(self.nodes)

    def push_messages(self, sent):
        sent = list(sent)
        for message in sent:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.asked.append(message)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, names):
        waiting = [message for message in self.asked if message.metadata.message_id in names]
        answers = [self.answers[message.metadata.dst_node_id](message) for message in waiting]
        return [answer for answer in answers if answer is not None]


class Numbered(Nodes):
    """Node ids that are a range, as in our own Grid."""

    def get_node_ids(self):
        return range(world.NODE, world.NODE + len(self.answers))

    def send_and_receive(self, sent, *, timeout=None):
        return self.pull_messages(self.push_messages(sent))


def says(first, users=1, items=9, population=3, catalogue="c", **more):
    def answer(message):
        facts = {"first": first, "users": users, "population": population, "items": items, "rows": items, **more}
        content = RecordDict({METRICS: MetricRecord(facts), ROUND: ConfigRecord({"catalogue": catalogue})})
        return Message(content, reply_to=message)

    return answer


def fails(code, reason):
    return lambda message: Message(Error(code, reason), reply_to=message)


refuses = fails(1, "wrong experiment")


def silent(message):
    return None


def babbles(message):
    return Message(RecordDict({ROUND: ConfigRecord()}), reply_to=message)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes only where somebody sleeps."""
    world.identify()
    now = SimpleNamespace(time=0.0)
    fake = SimpleNamespace(monotonic=lambda: now.time, sleep=lambda s: setattr(now, "time", now.time + s))
    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(exchange_module, "time", fake)
    return now


def discover(nodes, **options):
    return Roster.discover(nodes, "fingerprint", **options)


def test_nodes_in_order_need_one_answer():
    grid = Numbered({2: says(0), 3: refuses, 4: refuses})
    found = discover(grid)
    assert len(grid.asked) == 1
    assert (found.population, found.items, found.catalogue, found.share) == (3, 9, "c", 1.0)
    assert list(found.nodes) == [2, 3, 4]
    assert isinstance(found.nodes, range)  # a large population costs nothing


def test_shuffled_nodes_are_all_asked(clock):
    grid = Nodes({70: says(2), 11: says(0), 35: says(1)})
    found = discover(grid)
    assert list(found.nodes) == [11, 35, 70]
    assert [message.metadata.dst_node_id for message in grid.asked] == [70, 11, 35]
    assert {message.metadata.message_type for message in grid.asked} == {"query"}
    assert all(message.content.config_records[ROUND]["experiment"] == "fingerprint" for message in grid.asked)
    assert clock.time == pytest.approx(3)  # nobody new for so long


def test_a_node_may_host_a_shard_and_have_a_number_of_64_bits():
    large = 2**64 - 5
    found = discover(Nodes({large: says(0, users=2), 35: says(2)}))
    assert list(found.nodes) == [large, large, 35]
    assert found.shared(large)
    assert not found.shared(35)
    assert found.present(np.array([0, 2])).tolist() == [0, 2]


def test_latecomers_are_waited_for(clock):
    found = discover(Nodes({5: says(0), 6: says(1), 7: says(2)}, {}, {}, {6: 0}, {6: 0}, {5: 0, 6: 0}))
    assert found.population == 3
    assert clock.time > 3


def test_who_comes_after_a_while_completes_the_population():
    early = {6: says(0, users=2)}
    grid = Nodes({**early, 5: says(2)}, *[early] * 30)
    assert list(discover(grid, wait=60).nodes) == [6, 6, 5]
    assert len(grid.asked) == 2  # nobody twice


def test_nobody_comes(clock):
    with pytest.raises(StateError, match="no node came within 20 s"):
        discover(Nodes({}), wait=20)
    assert clock.time == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([says(0), says(2)], "67% of the users"),
        ([says(0, users=2), says(2, items=8)], r"67%.*another catalogue or population than most \(1\)"),
        ([says(0, users=2), says(2, catalogue="d")], r"67%.*another catalogue or population than most \(1\)"),
        ([says(0, users=2), says(2, population=4)], r"67%.*another catalogue"),
        ([says(0), refuses], r"33%.*wrong experiment \(1\)"),
        ([says(0), silent], r"33%.*did not say who lives there \(1\)"),
        ([says(0), says(-1)], "33%.*nonsense"),
        ([says(0), says(2, users=2)], "33%.*nonsense"),
        ([says(0), says(1, users=0)], "33%.*nonsense"),
        ([says(0), says(1, population=10**12)], "33%.*nonsense"),
        ([says(0), says(1, items=0)], "33%.*nonsense"),
        ([says(0), babbles], "33%.*nonsense"),
        ([says(0), says(1.5)], "33%.*nonsense"),
        ([says(0), says([1])], "33%.*nonsense"),
        ([says(0), says(1, items=9.0)], "33%.*nonsense"),
    ],
)
def test_disorder_is_named_and_ends_a_run_that_wants_everybody(answers, why):
    with pytest.raises(TooFewNodes, match=why) as caught:
        discover(Nodes(dict(enumerate(answers, 40))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers", [[says(0), says(0)], [says(0, users=2), says(1, users=2)]])
def test_of_two_who_claim_the_same_users_neither_is_believed(answers):
    with pytest.raises(StateError, match="hosts users that another node hosts, too"):
        discover(Nodes(dict(enumerate(answers, 40))))


def test_a_liar_of_another_world_puts_nobody_out():
    honest = {40 + user: says(user) for user in range(3)}
    found = discover(Nodes({**honest, 50: says(0, users=5000, population=5000)}))
    assert list(found.nodes) == [40, 41, 42]
    assert list(found.refused) == [50]


def test_the_first_node_alone_ends_no_run():
    grid = Nodes({40: refuses, 41: says(0, users=3)}, *[{40: 0}] * 12)
    assert list(discover(grid).nodes) == [41, 41, 41]


def test_a_quorum_goes_on_without_the_others():
    grid = Nodes({40: says(0, users=2), 41: refuses})
    found = discover(grid, quorum=0.6)
    assert list(found.nodes) == [40, 40, ABSENT]
    assert found.present(np.arange(3)).tolist() == [0, 1]
    assert found.refused == {41: "wrong experiment"}
    assert not found.hosts(ABSENT, 2)


def test_nodes_go_and_come_back():
    grid = Nodes({40: says(0, users=2), 41: says(2)})
    found = discover(grid)
    grid.answers = {41: says(2)}
    found.refresh(grid, "fingerprint", 1.0)
    assert found.present(np.arange(3)).tolist() == [2]
    assert found.share == pytest.approx(1 / 3)
    grid.answers = {40: says(0, users=2), 41: says(2)}
    found.refresh(grid, "fingerprint", 1.0)
    assert found.share == 1.0
    assert len(grid.asked) == 2


@pytest.mark.parametrize("late", [says(0), says(2, catalogue="d"), refuses])
def test_a_newcomer_takes_nobodys_place(late):
    grid = Nodes({40: says(0, users=2)})
    found = discover(grid, quorum=0.5, wait=5)
    grid.answers = {**grid.answers, 41: late}
    found.refresh(grid, "fingerprint", 1.0)
    assert list(found.nodes) == [40, 40, ABSENT]
    assert 41 in found.refused


def test_a_node_that_was_lost_when_it_was_asked_is_asked_again_after_a_while(clock):
    grid = Nodes({40: says(0, users=2), 41: fails(5, "node unavailable")})
    found = discover(grid, quorum=0.5, wait=5)
    grid.answers[41] = says(2)
    found.refresh(grid, "fingerprint", 1.0)
    assert list(found.nodes) == [40, 40, ABSENT]
    clock.time += 60
    found.refresh(grid, "fingerprint", 1.0)
    assert list(found.nodes) == [40, 40, 41]


@pytest.mark.parametrize(
    ("answer", "why"), [(refuses, "wrong experiment"), (silent, "did not say"), (babbles, "nonsense")]
)
def test_a_grid_in_which_nobody_answers_is_an_error(answer, why):
    with pytest.raises(StateError, match=why):
        discover(Numbered({2: answer, 3: says(1)}))
    with pytest.raises(StateError, match=why):
        discover(Nodes({40: answer}))


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


def test_a_shared_node_gets_one_message_that_names_its_users():
    content = RecordDict({ROUND: ConfigRecord({"round": 4})})
    hosts = {7: Answer(7, range(2), 3, 9, "c", 9), 6: Answer(6, range(2, 3), 3, 9, "c", 9)}
    sent = list(messages(Roster([7, 7, 6], 9, "c", hosts), np.array([0, 1, 2]), content, "train", 4))
    assert [message.metadata.dst_node_id for message in sent] == [7, 6]
    told = [dict(message.content.config_records[ROUND]) for message in sent]
    assert told == [{"round": 4, "users": [0, 1]}, {"round": 4}]
    assert "users" not in content.config_records[ROUND]
