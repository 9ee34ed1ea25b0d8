"""What travels: sharing memory in one process, surviving Flower's own serialisation, and strangers' numbers."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.models.weights import Weights
from common.wire import (
    METRICS,
    MODEL,
    ROUND,
    LazyArray,
    arrays,
    number,
    pack,
    payload_bytes,
    pending_of,
    pending_update,
    unpack,
    whole_number,
)
from tests.support import world

VALUES = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array([3, 1, 2], dtype=np.int32),
    np.zeros((0, 4), dtype=np.float32),
    np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
]


def message():
    world.identify()
    weights = Weights(torch.arange(6.0).view(3, 2), torch.tensor([-1.5]))
    content = RecordDict(
        {
            MODEL: pack(weights),
            ROUND: ConfigRecord({"round": 3, "experiment": "abc"}),
            METRICS: MetricRecord({"user": 2, "loss": 0.5}),
        }
    )
    return weights, Message(content, 7, "train", group_id="3")


# --- in one process --------------------------------------------------------------------------------------------------


def test_packing_shares_memory():
    weights = Weights(torch.zeros(3, 2, requires_grad=True), torch.zeros(4))
    record = pack(weights)
    assert list(record) == ["table", "body"]
    back = unpack(record)
    weights.body[1] = 5
    assert back.body.tolist() == [0, 5, 0, 0]
    assert record["table"].numpy() is record["table"].numpy()
    assert not back.table.requires_grad


def test_unpacking_a_read_only_message_copies_and_does_not_warn():
    frozen = np.arange(4, dtype=np.float32)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = unpack(arrays(table=frozen, body=frozen))
    weights.table[0] = 9
    assert frozen[0] == 0


def test_a_missing_tensor_is_a_key_error():
    with pytest.raises(KeyError, match="body"):
        unpack(arrays(table=np.zeros(1, dtype=np.float32)))


@pytest.mark.parametrize("values", VALUES)
def test_a_lazy_array_describes_itself_as_flowers_would(values):
    lazy, eager = arrays(a=values)["a"], Array(values)
    assert isinstance(lazy, LazyArray)
    assert (lazy.dtype, lazy.shape, lazy.stype, lazy.data) == (eager.dtype, eager.shape, eager.stype, eager.data)
    assert lazy.object_id == eager.object_id
    assert type(lazy).__qualname__ == "Array"


def test_bytes_are_made_anew_each_time():
    values = np.zeros(3, dtype=np.float32)
    lazy = LazyArray(lambda: values, (3,), "float32")
    before = lazy.data
    values[0] = 1
    assert lazy.data != before


def test_payload():
    assert payload_bytes(arrays(a=VALUES[0], b=VALUES[1], c=VALUES[2])) == 6 * 4 + 3 * 4
    assert payload_bytes(ArrayRecord([VALUES[0]])) == 24  # as it arrives over a network


# --- updates that wait -----------------------------------------------------------------------------------------------


class Waiting:
    """Two users' updates of a table of width 2 and a body of 3, which note what is asked of them."""

    def __init__(self, whole=False):
        self.counts, self.whole, self.asked = np.array([2, 1]), whole, []

    def __len__(self):
        return 2

    def rows(self, i):
        self.asked.append(("rows", i))
        return np.arange(self.counts[i], dtype=np.int32) + 5

    def one(self, i):
        self.asked.append(("one", i))
        return Weights(torch.full((int(self.counts[i]), 2), i + 1.0), torch.full((3,), i + 0.5))


def test_an_update_that_waits_is_described_and_not_computed():
    updates = Waiting()
    record = pending_update(updates, 0, (3,), 2)
    assert {name: (array.shape, array.dtype) for name, array in record.items()} == {
        "rows": ((2,), "int32"),
        "table": ((2, 2), "float32"),
        "body": ((3,), "float32"),
    }
    assert payload_bytes(record) == 4 * (2 + 4 + 3)
    assert pending_of(record) == (updates, 0)
    assert updates.asked == []
    assert record["rows"].numpy().tolist() == [5, 6]
    assert record["table"].numpy().tolist() == [[1, 1], [1, 1]]
    assert record["body"].numpy().tolist() == [0.5] * 3
    assert {i for _, i in updates.asked} == {0}


def test_a_whole_table_that_waits_has_no_rows():
    record = pending_update(Waiting(whole=True), 1, (3,), 2)
    assert list(record) == ["table", "body"]
    assert pending_of(record)[1] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_copy_waits_no_more_and_holds_the_same(copied):
    record = pending_update(Waiting(), 1, (3,), 2)
    twin = copied(record)
    assert pending_of(twin) is None
    assert list(twin) == list(record)
    for name, array in record.items():
        assert type(twin[name]) is Array
        np.testing.assert_array_equal(twin[name].numpy(), array.numpy())
        assert (twin[name].shape, twin[name].dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("name", ["rows", "table", "body"])
@pytest.mark.parametrize("change", ["plain", "lazy", "another's", "gone"])
def test_a_record_in_which_anything_was_exchanged_does_not_wait(name, change):
    """What was put there must be looked at, and must be what counts."""
    updates = Waiting()
    record, other = pending_update(updates, 0, (3,), 2), pending_update(updates, 1, (3,), 2)
    values = record[name].numpy()
    if change == "gone":
        del record[name]
    else:
        record[name] = {"plain": Array(values), "lazy": arrays(a=values)["a"], "another's": other[name]}[change]
    assert pending_of(record) is None


def test_numbers_and_nothing_at_all_do_not_wait():
    assert pending_of(arrays(table=VALUES[0], body=VALUES[0])) is None
    assert pending_of(ArrayRecord()) is None


# --- over a network --------------------------------------------------------------------------------------------------


def through_objects(sent):
    """Flower's objects, as SuperLink and SuperNode exchange them."""
    contents = {name: value.deflate() for name, value in get_all_nested_objects(sent).items()}
    return inflate_object_from_contents(sent.object_id, contents)


def through_protobuf(sent):
    wire = message_to_proto(sent).SerializeToString()
    return message_from_proto(type(message_to_proto(sent)).FromString(wire))


def through_pickle(sent):  # how Ray moves messages between its processes
    return pickle.loads(pickle.dumps(sent))


@pytest.mark.parametrize("travel", [through_objects, through_protobuf, through_pickle, copy.deepcopy])
def test_a_message_survives(travel):
    weights, sent = message()
    arrived = travel(sent)
    assert arrived.metadata.dst_node_id == 7
    assert arrived.content.config_records[ROUND] == {"round": 3, "experiment": "abc"}
    assert arrived.content.metric_records[METRICS] == {"user": 2, "loss": 0.5}
    record = arrived.content.array_records[MODEL]
    assert type(record["table"]) is Array
    assert world.same(unpack(record), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpack(record).table.add_(1)  # writable, and nobody else's
    assert weights.table[0, 0] == 0


@pytest.mark.parametrize("values", VALUES)
def test_arrays_survive(values):
    world.identify()
    sent = Message(RecordDict({MODEL: arrays(a=values)}), 7, "train")
    for travel in (through_objects, through_protobuf, through_pickle):
        arrived = travel(sent).content.array_records[MODEL]["a"].numpy()
        assert arrived.dtype == values.dtype
        np.testing.assert_array_equal(arrived, values)


def test_a_record_can_be_copied():
    record = arrays(a=VALUES[0])
    for twin in (ArrayRecord(dict(record)), record.copy(), copy.deepcopy(record)):
        np.testing.assert_array_equal(twin["a"].numpy(), VALUES[0])
    assert ArrayRecord(dict(record))["a"].numpy() is not VALUES[0]


# --- numbers of strangers --------------------------------------------------------------------------------------------


def test_numbers():
    metrics = MetricRecord({"whole": 3, "broken": 2.5, "many": [1, 2], "round": 2.0})
    assert (number(metrics, "whole"), number(metrics, "broken"), whole_number(metrics, "whole")) == (3, 2.5, 3)
    for name in ("broken", "many", "round"):
        with pytest.raises(TypeError, match=name):
            whole_number(metrics, name)
    with pytest.raises(TypeError, match="many"):
        number(metrics, "many")
    for read in (number, whole_number):
        with pytest.raises(KeyError, match="absent"):
            read(metrics, "absent")
