"""What devices keep to themselves: by hand, against lists in a dict, through files, records and Flower contexts."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from client.own import OWN_FILE, RECORD, Own, own_of, recalled, remember
from common.errors import StateError
from common.models.personal import kept_columns
from common.models.weights import initialise
from common.wire import arrays
from tests.support import world

WIDTH, FIRST, USERS = 2, 3, 4
FRESH = torch.tensor([0.5, -1.0])
EVERYBODY = np.arange(FIRST, FIRST + USERS)
ENTRY = 2 * 8 + 4 * WIDTH
"""Bytes of one entry."""


def opened(path=None, fresh=FRESH, first=FIRST, users=USERS):
    return Own(fresh, first, users, path)


def keep(own, round_, **values):
    """Enter one number a user, ``u3=1.0``, which fills the user's columns."""
    users = np.array([int(name[1:]) for name in values])
    own.keep(users, round_, torch.tensor(list(values.values()), dtype=torch.float32)[:, None].expand(-1, WIDTH))


def had(own, round_, users=EVERYBODY):
    """What users had before a round: one number each, none where all is fresh."""
    found = own.before(np.asarray(users, dtype=np.int64), round_)
    assert found.users.tolist() == list(users)
    assert found.values.shape == (len(users), WIDTH)
    assert found.values.dtype == torch.float32
    return [None if torch.equal(row, FRESH) else row.unique().item() for row in found.values]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_everybody_begins_with_what_is_fresh():
    for round_ in (0, 1, 100):
        assert had(opened(), round_) == [None] * USERS


def test_a_round_gets_what_earlier_ones_have_left():
    own = opened()
    keep(own, 1, u3=1, u5=2)
    keep(own, 4, u5=3, u6=4)
    assert had(own, 1) == [None] * 4
    assert had(own, 2) == had(own, 4) == [1, None, 2, None]
    assert had(own, 5) == had(own, 99) == [1, None, 3, 4]
    assert had(own, 2, [5, 3]) == [2, 1]
    assert had(own, 5, []) == []


def test_what_it_gives_is_not_its_own_memory():
    own = opened()
    keep(own, 1, u3=1)
    for round_ in (1, 2):
        own.before(EVERYBODY, round_).values.fill_(9)
    assert had(own, 1) == [None] * 4
    assert had(own, 2) == [1, None, None, None]


def test_nobody_in_a_round_leaves_nothing(tmp_path):
    own = opened(tmp_path / "own")
    own.keep(np.zeros(0, dtype=np.int64), 1, torch.zeros(0, WIDTH))
    assert had(own, 2) == [None] * 4
    assert had(opened(tmp_path / "own"), 2) == [None] * 4


def test_a_round_that_is_run_again_gets_what_it_got():
    own, then = opened(), {}
    for round_ in range(1, 7):
        then[round_] = had(own, round_)
        keep(own, round_, **{f"u{3 + round_ % 2}": 10 + round_, f"u{5 + round_ % 2}": 20 + round_})
    for round_ in range(4, 7):  # back to the checkpoint of round 3
        assert had(own, round_) == then[round_]
        keep(own, round_, **{f"u{3 + round_ % 2}": 10 + round_, f"u{5 + round_ % 2}": 20 + round_})
    assert had(own, 7) == [16, 15, 26, 25]


def test_what_an_abandoned_round_has_left_is_passed_over():
    own = opened()
    keep(own, 1, u3=1)
    keep(own, 5, u3=5)
    keep(own, 6, u3=6)
    keep(own, 4, u3=4)  # run again from 3; this time the user is asked in 4, and not in 5
    assert had(own, 7)[0] == had(own, 6)[0] == had(own, 5)[0] == 4
    assert had(own, 4)[0] == 1
    keep(own, 4, u3=44)  # again, as where too few had answered
    assert (had(own, 4)[0], had(own, 5)[0]) == (1, 44)


def test_room_grows():
    own = opened(users=1)
    for round_ in range(1, 300):
        keep(own, round_, u3=round_)
    for round_ in (2, 64, 65, 200, 300):
        assert had(own, round_, [3]) == [round_ - 1]


# --- against lists in a dict -----------------------------------------------------------------------------------------

ROUNDS = st.lists(
    st.tuples(st.integers(1, 6), st.dictionaries(st.integers(FIRST, FIRST + USERS - 1), st.integers(1, 99))),
    max_size=12,
)


class Lists:
    """The same, plainly: a user's entries, of which those of the round and later ones go where it is run again."""

    def __init__(self):
        self.of = {user: [] for user in EVERYBODY.tolist()}

    def keep(self, round_, values):
        for user, value in values.items():
            self.of[user] = [(r, v) for r, v in self.of[user] if r < round_] + [(round_, value)]

    def go_back(self, round_):
        """As a resume does: others may be asked this time."""
        self.of = {user: [(r, v) for r, v in entries if r < round_] for user, entries in self.of.items()}

    def had(self, round_):
        earlier = [[v for r, v in entries if r < round_] for entries in self.of.values()]
        return [values[-1] if values else None for values in earlier]


@given(ROUNDS, st.randoms())
def test_it_is_lists_in_a_dict(rounds, random):
    own, lists = opened(), Lists()
    for round_, values in rounds:
        order = random.sample(sorted(values), len(values))
        keep(own, round_, **{f"u{user}": values[user] for user in order})
        lists.keep(round_, values)
        for asked in range(8):
            assert had(own, asked) == lists.had(asked)
    for user in EVERYBODY.tolist():
        alone = own.alone(range(user, user + 1))
        assert had(alone, 9, [user]) == [None]
        alone.recall(own.record(range(user, user + 1)))
        assert [had(alone, asked, [user])[0] for asked in range(8)] == [
            lists.had(asked)[user - FIRST] for asked in range(8)
        ]


@given(ROUNDS)
def test_a_file_that_is_opened_again_says_the_same(tmp_path_factory, rounds):
    path, lists = tmp_path_factory.mktemp("own") / "own", Lists()
    for round_, values in rounds:
        own, there = opened(path), path.exists()
        keep(own, round_, **{f"u{user}": value for user, value in values.items()})
        if there:
            lists.go_back(round_)
        lists.keep(round_, values)
    for own in (opened(path), opened(path)):
        assert [had(own, asked) for asked in range(8)] == [lists.had(asked) for asked in range(8)]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """A file of two rounds."""
    own = opened(tmp_path / OWN_FILE)
    keep(own, 1, u3=1, u6=2)
    keep(own, 2, u3=3)
    return tmp_path / OWN_FILE


def test_a_file_holds_every_entry(path):
    assert path.stat().st_size == 3 * ENTRY
    assert had(opened(path), 3) == [3, None, None, 2]
    assert had(opened(path), 2) == [1, None, None, 2]


def test_a_file_is_nobody_elses_and_no_result(path):
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.name == "devices"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "do not publish this folder" in (path.parent / "README.txt").read_text()


@pytest.mark.parametrize("bytes_", [1, 8, ENTRY - 1])
def test_a_half_written_entry_is_cut_off(path, bytes_):
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:bytes_])
    own = opened(path)
    assert had(own, 3) == [3, None, None, 2]
    keep(own, 3, u4=7)
    assert path.read_bytes()[: len(whole)] == whole
    assert path.stat().st_size == 4 * ENTRY
    assert had(opened(path), 4) == [3, 7, None, 2]


def test_of_a_round_that_was_killed_in_the_middle_whole_entries_stay(path):
    path.write_bytes(path.read_bytes()[: -ENTRY - 5])
    assert had(opened(path), 3) == [1, None, None, None]


def test_what_is_no_file_of_these_users_is_refused(path):
    with pytest.raises(StateError, match=OWN_FILE):
        opened(path, users=3)
    with pytest.raises(StateError, match=OWN_FILE):
        opened(path, first=4)
    whole = path.read_bytes()
    with pytest.raises(StateError, match=OWN_FILE):
        opened(path, fresh=torch.zeros(3))  # of another model: its entries lie elsewhere
    assert path.read_bytes() == whole
    path.write_bytes(np.array([3, 1]).tobytes() + np.array([1, np.nan], dtype=np.float32).tobytes())
    with pytest.raises(StateError, match="damaged"):
        opened(path)


def test_a_file_that_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(StateError, match="Is a directory"):
        opened(tmp_path)
    own = opened(tmp_path / "gone" / OWN_FILE)
    with pytest.raises(StateError, match="no such file"):
        keep(own, 1, u3=1)


# --- records and contexts --------------------------------------------------------------------------------------------


def test_a_record_is_of_some_users_and_survives_the_wire():
    own = opened()
    keep(own, 1, u3=1, u4=2, u6=3)
    keep(own, 2, u4=4)
    record = own.record(range(4, 6))
    sent = recorddict_from_proto(recorddict_to_proto(RecordDict({RECORD: record}))).array_records[RECORD]
    assert record["user"].numpy().tolist() == [4, 4]
    other = own.alone(range(4, 6))
    other.recall(sent)
    assert had(other, 3, [4, 5]) == [4, None]
    assert had(other, 2, [4, 5]) == [2, None]


def test_nothing_is_a_record_too():
    own = opened().alone(range(5, 6))
    own.recall(opened().record(range(5, 6)))
    assert had(own, 1, [5]) == [None]


def test_a_record_reaches_back_to_the_first_round():
    """Any round may be the one that validation chooses."""
    own = opened()
    for round_ in range(1, 11):
        keep(own, round_, u3=round_, **({"u5": 50 + round_} if round_ in (2, 4) else {}))
    back = own.alone(range(3, 7))
    back.recall(own.record(range(3, 7)))
    for round_ in range(12):
        assert had(back, round_) == had(own, round_)


def test_a_resume_forgets_what_abandoned_rounds_have_left(path):
    """User 3 took part in round 2, which is run again without it."""
    own = opened(path)
    keep(own, 2, u4=8)
    for each in (own, opened(path)):
        assert had(each, 3) == [1, 8, None, 2]
    assert path.stat().st_size == 3 * ENTRY


@pytest.mark.parametrize(
    "damage",
    [
        {"values": np.zeros((1, 3), dtype=np.float32)},
        {"values": np.zeros((1, 1), dtype=np.float32)},
        {"values": np.full((1, 2), np.inf, dtype=np.float32)},
        {"user": np.array([7])},
        {"user": np.array([2])},
    ],
)
def test_a_record_of_something_else_is_refused(damage):
    right = {"user": np.array([3]), "round": np.array([1]), "values": np.zeros((1, 2), dtype=np.float32)}
    own = opened()
    with pytest.raises(StateError, match=r"another model|do not live here, or damaged"):
        own.recall(arrays(**right | damage))
    assert had(own, 2) == [None] * 4


def test_taking_over_enters_what_is_new(tmp_path):
    own = opened(tmp_path / "own")
    keep(own, 1, u3=1, u4=2)
    other = own.alone(range(3, 5))
    other.recall(own.record(range(3, 5)))
    own.take_over(other)
    assert (tmp_path / "own").stat().st_size == 2 * ENTRY
    keep(other, 2, u4=3)
    for _ in range(2):
        own.take_over(other)
        assert (tmp_path / "own").stat().st_size == 3 * ENTRY
    assert had(own, 3) == had(opened(tmp_path / "own"), 3) == [1, 3, None, None]
    keep(other, 2, u4=4)  # run again, with another outcome
    own.take_over(other)
    assert (had(own, 2), had(own, 3)) == ([1, 2, None, None], [1, 4, None, None])


def test_a_context_keeps_what_its_users_have_left():
    device, context = opened(), Context(1, 2, {}, RecordDict(), {})
    for round_ in range(1, 10):
        own = recalled(device, context, range(4, 5))
        assert had(own, round_, [4]) == [round_ - 1 or None]
        keep(own, round_, u4=round_)
        remember(own, context, range(4, 5))
    assert context.state.array_records[RECORD]["round"].numpy().tolist()[-5:] == [5, 6, 7, 8, 9]
    assert had(device, 10) == [None] * 4


def test_what_is_fresh_is_what_the_model_begins_with(tmp_path):
    given = world.experiment(model={"personal": ["scale"]}, federation={"on_device": ["norm.*", "user.*"]}, seed=3)
    own = own_of(given, FIRST, USERS, 20, tmp_path / OWN_FILE)
    columns = kept_columns(given.model, given.federation.on_device)
    assert len(columns) == 2 * 8 + 1
    expected = initialise(given.model, 20, 3).body[columns]
    assert torch.equal(own.before(EVERYBODY, 1).values, expected.expand(USERS, -1))
    assert own_of(world.experiment(), FIRST, USERS, 20, tmp_path / OWN_FILE) is None
