"""Small valid sources of every kind, how to damage them, and what a prepared folder must hold."""

import io
from itertools import pairwise

import numpy as np
import polars as pl
from pydantic import TypeAdapter

from common.data.catalogue import Catalogue
from common.data.prepare import bad_rows, describe, intact, prepare
from common.data.sequences import Sequences
from common.errors import DataError
from common.sources import DataConfig

EVENTS = [(f"u{i % 5}", f"i{(i * i + i // 5) % 7}", i % 5 + 0.5, 1000 + 3 * i) for i in range(30)]
COLUMNS = {"user": "u", "item": "i", "time": "t", "rating": "r", "behaviour": "b", "domain": "d"}
NONSENSE = [
    "",
    " ",
    "nan",
    "inf",
    "-1",
    "1e400",
    "9" * 30,
    "9" * 19,
    "-9223372036854775808",
    "null",
    "é",
    "u0",
    "::",
    ",",
]
NONSENSE += [
    "\t",
    '"',
    '""',
    "1970-01-01",
    "\u2028",
    "\ufeff",
    "\x85",
    "\x0b",
    "\x1f",
    "0x1",
    "1_0",
    "x" * 3000,
    "1e18",
    "-0",
]


def lines(separator, columns, head=None):
    rows = [separator.join(str(event[place]) for place in columns) for event in EVENTS]
    return "\n".join([*([head] if head else []), *rows, ""]).encode()


def parquet(**odd):
    frame = pl.DataFrame(EVENTS, schema=["u", "i", "r", "t"], orient="row").with_columns(
        b=pl.lit("buy"), d=pl.lit("toy")
    )
    buffer = io.BytesIO()
    frame.with_columns(**odd).write_parquet(buffer)
    return buffer.getvalue()


ITEMS = b"".join(f"i{i}|Caf\xe9 {i}|x||y|{i % 2}|1\n".encode("latin-1") for i in range(7))
SIX = {"columns": COLUMNS}
SOURCES = {  # kind, options, file names and contents, the events' first
    "ml-100k": ("movielens", {}, {"u.data": lines("\t", range(4)), "u.item": ITEMS, "u.genre": b"Drama|0\nWar|1\n\n"}),
    "ml-1m": (
        "movielens",
        {"min_rating": 2},
        {"ratings.dat": lines("::", range(4)), "movies.dat": b"i1::A::Drama|War\n"},
    ),
    "ml-20m": (
        "movielens",
        {"split": "global-time"},
        {
            "ratings.csv": lines(",", range(4), "userId,movieId,rating,timestamp"),
            "movies.csv": b'movieId,title,genres\ni1,"A, the",Drama|War\ni2,B,(no genres listed)\n',
        },
    ),
    "pairs": ("pairs", {"min_user_events": 2}, {"p.txt": lines(" ", range(2))}),
    "sequences": ("sequences", {"min_item_events": 2}, {"s.txt": b"u1 a b c d\nu2 b c d\nu3 a d\nu4 c c a b\n"}),
    "recbole": (
        "recbole",
        {"repeats": "last"},
        {"d.inter": lines("\t", range(4), "user_id:token\titem_id:token\trating:float\ttimestamp:float")},
    ),
    "csv": (
        "table",
        {**SIX, "repeats": "first"},
        {
            "t.csv": b"u,i,r,t,b,d\n"
            + b"".join(b'%s,"i%d",1.5,%d,buy,toy\n' % (b"uv"[: i % 2 + 1], i % 4, i) for i in range(9))
        },
    ),
    "dates": (
        "table",
        {"columns": {"user": "u", "item": "i", "time": "t"}, "time_format": "%Y-%m-%d", "separator": ";"},
        {"t.csv": b"u;i;t\n" + b"".join(b"u%d;i%d;2020-01-%02d\n" % (i % 2, i % 4, i + 1) for i in range(9))},
    ),
    "parquet": ("table", SIX, {"t.parquet": parquet()}),
}


def written(folder, kind, files, **options):
    """A data section of files in a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder / next(iter(files))
    return TypeAdapter(DataConfig).validate_python({"kind": kind, "path": str(path), **options})


def prepared(config):
    """The prepared folder, or the line that says why there is none; whatever else is raised is a defect."""
    try:
        return prepare(config)
    except DataError as error:
        return str(error)


def sound(folder, config):
    """Whether a prepared folder is what its manifest says, and whole in itself."""
    data, catalogue = Sequences.open(folder), Catalogue.open(folder)
    ids, bounds = catalogue.item_ids(), data.offsets.tolist()
    assert intact(folder)
    assert len(set(ids)) == catalogue.items > data.items.max() >= data.items.min() >= 0
    assert len(set(data.user_ids())) == len(data) == catalogue.users
    assert all(isinstance(name, str) and name.strip(" \t\n") for name in [*ids, *data.user_ids()])
    assert len(catalogue.titles()) == len(catalogue.genres()) == catalogue.items
    for user, (start, end) in enumerate(pairwise(bounds)):
        assert start < end
        assert start <= data.train_end[user] <= end
        assert (data.times[start + 1 : end] >= data.times[start : end - 1]).all()
        assert all(place == -1 or start <= place < end for place in (data.validation[user], data.test[user]))
    ratings = data.optional("ratings")
    assert ratings is None or not np.isinf(ratings).any()  # NaN: no rating
    assert bad_rows(folder) == "" or not config.strict
    assert describe(config)["kept"]["events"] == len(data.items)
    return True


def damaged(damage, files):
    """One of the files spoilt, most often the first; nonsense in a field, or any damage to its bytes."""
    name = next(iter(files)) if damage.below(4) else damage.pick(list(files))
    content = files[name]
    if damage.below(3) == 0 and not name.endswith(".parquet"):
        rows = content.split(b"\n")
        place, separator = (
            damage.below(len(rows)),
            next(s for s in (b"::", b"\t", b";", b",", b"|", b" ") if s in content),
        )
        fields = rows[place].split(separator)
        fields[damage.below(len(fields))] = damage.pick(NONSENSE).encode()
        rows[place] = separator.join(fields)
        return {**files, name: b"\n".join(rows)}
    return {**files, name: damage.any(content)}
