"""Forged replies: one to three faults of different parts of an otherwise honest reply, drawn from a seeded generator.

Every fault is bad on its own, and no two of one reply are in the same part, so that none mends another.
"""

import io
import pickle
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.wire import METRICS, NO_METRICS, UPDATE, arrays, assembled

ITEMS, DIM, BODY = 13, 3, 17


@dataclass
class Draft:
    """A reply in the making."""

    rng: np.random.Generator
    user: int
    node: int
    round: int
    arrays: dict[str, object] = field(default_factory=dict)
    metrics: dict[str, object] = field(default_factory=dict)
    records: dict[str, object] = field(default_factory=dict)
    """Records in place of those that `arrays` and `metrics` make; None leaves one out."""
    error: Error | None = None

    def pick(self, options):
        """One of some options."""
        return options[int(self.rng.integers(len(options)))]

    def message(self, kind="train"):
        """The reply itself, its arrays as they come over a network or, every fourth time, as in one process."""
        question = Message(RecordDict(), self.node, kind, group_id=str(self.round))
        if self.error is not None:
            return Message(self.error, reply_to=question)
        update = arrays(**{name: a for name, a in self.arrays.items() if isinstance(a, np.ndarray)})
        if self.rng.random() < 0.75 or len(update) < len(self.arrays):
            update = ArrayRecord({k: a if isinstance(a, Array) else Array(np.array(a)) for k, a in self.arrays.items()})
        records = {UPDATE: update, METRICS: assembled(NO_METRICS, self.metrics)} | self.records
        return Message(RecordDict({k: v for k, v in records.items() if v is not None}), reply_to=question)


def honest(rng, user, node, round_):
    """An honest reply to training, with a few rows or the whole table."""
    some = rng.random() < 0.6
    rows = rng.choice(ITEMS, int(rng.integers(2, 6)), replace=False).astype(np.int32)
    draft = Draft(rng, user, node, round_)
    draft.arrays["table"] = rng.standard_normal((len(rows) if some else ITEMS, DIM), dtype=np.float32)
    draft.arrays["body"] = rng.standard_normal(BODY, dtype=np.float32)
    if some:
        draft.arrays["rows"] = rows
    draft.metrics = {"user": user, "events": int(rng.integers(0, 90)), "loss": float(rng.random())}
    return draft


def serialised(values, save=np.save, **options):
    """Bytes of an array in numpy's format, or as another function saves it."""
    buffer = io.BytesIO()
    save(buffer, values, **options)
    return buffer.getvalue()


def header(text, size=117):
    """A header in numpy's format, and nothing behind it."""
    return b"\x93NUMPY\x01\x00" + int(size + 1).to_bytes(2, "little") + text.encode().ljust(size)[:size] + b"\n"


def raw(data, dtype="float32", shape=(2, DIM), stype="numpy.ndarray"):
    """An array of whatever bytes."""
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


# --- numbers ---------------------------------------------------------------------------------------------------------

WORST = [np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 2e6, -2e6]
TYPES = ["f8", "f2", ">f4", "i4", "i8", "u1", "c8", "c16", "?", "S4", "U3", "M8[s]", "m8[s]", "V4"]
HUGE = [10**9, 2**31, 10**12, 2**60, 2**63 - 1, 2**63, 10**30]
NESTED = [
    "(" * 5000,
    "[" * 5000,
    "{" * 5000,
    "-" * 5000 + "1",
    "1+" * 2500 + "1",
    "'" + "\\" * 5000,
    "\t\n  x\n y",
    "0x",
]


def spoilt(draft, name):
    """Numbers that are none, or too large, at random places."""
    values = draft.arrays[name] = draft.arrays[name].copy()
    places = draft.rng.choice(values.size, int(draft.rng.integers(1, 4)), replace=False)
    values.reshape(-1)[places] = draft.pick(WORST)


def retyped(draft, name):
    """Another type, or another byte order."""
    kind = np.dtype(draft.pick(TYPES))
    shape = draft.arrays[name].shape
    draft.arrays[name] = np.zeros(shape, kind) if kind.kind in "VMm" else draft.arrays[name].astype(kind)


def misshapen(draft, name):
    """A shape that fits with no rows at all."""
    values = draft.arrays[name]
    shapes = [(), (0,), (1, *values.shape), (*values.shape, 1), (*values.shape[:-1], values.shape[-1] + 1)]
    shapes += [(*values.shape[:-1], values.shape[-1] - 1), (len(values) + ITEMS, *values.shape[1:]), (1,) * 30]
    draft.arrays[name] = np.full(draft.pick(shapes), 0.5, dtype=values.dtype)


def huge(draft):
    """A header that promises more than there is memory."""
    count, more = draft.pick(HUGE), draft.pick(["", f" {DIM},", f" {10**6},"])
    kind = draft.pick(["'<f4'", "'<f8'", "'|S1000'", "[('a', '<f4', (1000000,))]", f"'|V{10**9}'"])
    order = draft.pick(["True", "False"])
    return header(f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': ({count},{more})}}")


def garbage(draft, name):
    """Bytes that are no array of that shape and type."""
    rng, values = draft.rng, draft.arrays[name]
    whole = serialised(values)
    flipped = bytearray(whole)
    flipped[int(rng.integers(0, 8))] ^= int(rng.integers(1, 256))  # the magic words and the version
    if draft.rng.random() < 0.4:
        draft.arrays[name] = raw(huge(draft), shape=tuple(values.shape))
        return
    options = [
        lambda: b"",
        lambda: rng.bytes(int(rng.integers(1, 400))),
        lambda: whole[: int(rng.integers(0, len(whole)))],
        lambda: bytes(flipped),
        lambda: pickle.dumps(values),
        lambda: serialised(values, np.savez),
        lambda: serialised(values, np.savez_compressed),
        lambda: b"PK\x03\x04" + rng.bytes(60),
        lambda: serialised(np.array([{}, None]), allow_pickle=True),
        lambda: header(draft.pick(NESTED), size=int(rng.integers(117, 9000))),
        lambda: header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 100 + ")}", 400),
        lambda: header(f"{{'descr': '<f4', 'fortran_order': {draft.pick(['0', 'None', '[]'])}, 'shape': (2, 3), }}"),
        lambda: header(
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({draft.pick(['-1', '1.5', 'None'])},), }}"
        ),
        lambda: b"\x93NUMPY" + bytes([int(rng.integers(2, 10)), 0]) + b"\xff" * 4 + rng.bytes(90),
    ]
    draft.arrays[name] = raw(draft.pick(options)(), shape=tuple(values.shape))


def bad_rows(draft):
    """Rows that are no set of items, or not as many as there are numbers."""
    rng, count = draft.rng, len(draft.arrays["table"])
    rows = rng.choice(ITEMS, count, replace=False)
    place, other = rng.choice(count, 2, replace=False)
    kind = draft.pick(["twice", "beyond", "below", "long", "short", "none", "type", "rank", "bytes"])
    if kind == "twice":
        rows[place] = rows[other]
    elif kind in {"beyond", "below"}:
        rows[place] = draft.pick([ITEMS, ITEMS + 1, 10**6, 2**31 - 1] if kind == "beyond" else [-1, -ITEMS, -(2**31)])
    rows = rows.astype(np.int32)
    if kind in {"long", "short"}:
        rows = (
            np.setdiff1d(np.arange(ITEMS, dtype=np.int32), rows)[:1] if kind == "short" else np.append(rows, rows[:1])
        )
    if kind == "type":
        rows = rows.astype(draft.pick(["i8", "u4", "f4", ">i4", "i2", "c8", "S3"]))
    if kind == "rank":
        rows = rows.reshape(draft.pick([(1, -1), (-1, 1)]))
    draft.arrays["rows"] = rows
    if kind == "none":
        del draft.arrays["rows"]
    if kind == "bytes":
        garbage(draft, "rows")


# --- what is said beside the numbers ---------------------------------------------------------------------------------

NO_NUMBER = ["7", b"7", None, [], [1], [1, 2], [0.5], {}, "\0" * 9]
NO_COUNT = [-1, -(2**31), 2**31, 2**62, 10**400, 1.0, 0.5, float("nan"), float("inf"), *NO_NUMBER]
NO_LOSS = [float("nan"), float("inf"), float("-inf"), 10**400, *NO_NUMBER]
NO_FLAG = [-1, 2, 10**400, 0.0, *NO_NUMBER]
REASONS = [
    "",
    "no battery",
    "two\nlines\r\nand a\ttab",
    "\u2028\u2029\x85",
    "ü — 好 🙂",
    " \n ",
    "x" * 5000,
    "a b " * 1000,
]


def missaid(draft, name, options):
    """Something impossible under a name."""
    draft.metrics[name] = draft.pick(options)


def disguised(draft, others):
    """Another user, nobody, no number, or another node."""
    said = [*others, -1, -(10**9), len(others) + 10**6, 2**63, 10**400, float(draft.user), float("nan"), *NO_NUMBER]
    if draft.rng.random() < 0.3:
        draft.node = draft.pick([0, -1, 10**19, draft.node + 1, draft.node - 1])
    else:
        draft.metrics["user"] = draft.pick(said)


def misfiled(draft):
    """Records that are missing, empty, or of another kind."""
    kinds = [None, ArrayRecord(), MetricRecord(), ConfigRecord(), MetricRecord({"x": 1})]
    kinds.append(ConfigRecord({"user": draft.user, "events": 1, "loss": 0.1, "yes": True, "why": "x", "raw": b"\0"}))
    for name in draft.pick([[UPDATE], [METRICS], [UPDATE, METRICS]]):
        draft.records[name] = draft.pick(kinds)


def refused(draft):
    """An error of some code and reason."""
    draft.error = Error(draft.pick([0, 1, 2, 5, 8, 404, -1]), draft.pick(REASONS))


def extra(draft, name):
    """Bytes that are no array, under a name that nobody asked for."""
    draft.arrays[name] = raw(huge(draft) if draft.rng.random() < 0.5 else draft.rng.bytes(int(draft.rng.integers(50))))


def left_out(draft, name):
    """An array that is not there."""
    del draft.arrays[name]


def late(draft):
    """A reply to another round, or to none."""
    draft.round = draft.pick([0, -1, draft.round + 1, draft.round - 1, "", f"{draft.round}.0", 10**30])


def forged(draft, others):
    """Put one to three faults into an honest draft.

    Parameters
    ----------
    draft : Draft
        Changed in place.
    others : sequence of int
        Users of other nodes.
    """
    whole = [spoilt, retyped, misshapen, garbage, left_out]
    table = [*whole, *[lambda d, name: bad_rows(d)] * 3] if "rows" in draft.arrays else whole
    faults = {
        "table": lambda: draft.pick(table)(draft, "table"),
        "body": lambda: draft.pick(whole)(draft, "body"),
        "more": lambda: extra(draft, "more"),
        "user": lambda: disguised(draft, others),
        "events": lambda: missaid(draft, "events", NO_COUNT),
        "loss": lambda: missaid(draft, "loss", NO_LOSS),
        "below": lambda: missaid(draft, "below", NO_FLAG),
        "records": lambda: misfiled(draft),
        "round": lambda: late(draft),
        "error": lambda: refused(draft),
    }
    weights = np.array([6, 6, 1, 3, 2, 2, 1, 2, 1, 2]) / 26
    for part in draft.rng.choice([*faults], draft.pick([1, 1, 1, 2, 3]), replace=False, p=weights).tolist():
        faults[part]()
    return draft
