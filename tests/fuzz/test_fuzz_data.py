"""Damaged data files of every kind: a prepared set that holds together, or one line that names the file."""

import json

import numpy as np
import polars as pl
import pytest

from common.data import readers
from common.data.prepare import prepare
from common.sources import Columns
from tests.fuzz.mutations import Damage, inside
from tests.fuzz.sources import SIX, SOURCES, damaged, parquet, prepared, sound, written


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", SOURCES)
def test_a_damaged_file(source, tmp_path, cache):
    kind, options, files = SOURCES[source]
    damage, refused = Damage(sorted(SOURCES).index(source)), 0
    assert sound(prepared(config := written(tmp_path / "raw", kind, files, **options)), config)
    for _ in range(70):
        strict = {"strict": True} if damage.below(4) == 0 else {}
        config = written(tmp_path / "raw", kind, damaged(damage, files), **options, **strict)
        before, found = inside(cache), prepared(config)
        if isinstance(found, str):
            assert len(found.splitlines()) == 1
            assert len(found) < 1000
            assert inside(cache) == before, "nothing half-written"
            refused += 1
        else:
            assert sound(found, config)
            assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    assert 5 < refused < 70


ODD = {
    "lists": {"i": pl.concat_list("i", "i")},
    "structs": {"i": pl.struct("i", "r")},
    "binary": {"u": pl.col("u").cast(pl.Binary)},
    "no UTF-8": {"u": pl.lit(b"\xff\xfe")},
    "nulls": {"u": pl.lit(None)},
    "categories": {"i": pl.col("i").cast(pl.Categorical)},
    "booleans": {"i": pl.col("r") > 2},
    "infinite times": {"t": pl.lit(float("inf"))},
    "not a time": {"t": pl.lit(float("nan"))},
    "huge times": {"t": pl.lit(1e300)},
    "fractions": {"t": pl.col("t") + 0.25},
    "huge fractions": {"t": pl.col("t") * 1e12 + 0.5},
    "unsigned times": {"t": pl.lit(2**64 - 1, dtype=pl.UInt64)},
    "decimals": {"t": pl.col("t").cast(pl.Decimal(20, 2))},
    "texts": {"t": pl.col("t").cast(pl.String)},
    "dates": {"t": pl.col("t").cast(pl.Int32).cast(pl.Date)},
    "clock times": {"t": pl.col("t").cast(pl.Time)},
    "durations": {"t": pl.col("t").cast(pl.Duration)},
    "zoned times": {"t": pl.col("t").cast(pl.Datetime("ns")).dt.replace_time_zone("Asia/Tokyo")},
    "boolean times": {"t": pl.col("t") > 1020},
    "ratings as text": {"r": pl.lit("good")},
    "lists of ratings": {"r": pl.concat_list("r", "r")},
    "infinite ratings": {"r": pl.lit(1e300)},
    "structs of behaviours": {"b": pl.struct("i", "r")},
    "many behaviours": {"b": pl.concat_str("u", "t")},
    "behaviours in bytes": {"b": pl.lit(b"\xff")},
    "numbers as domains": {"d": pl.lit(1.5)},
    "lists as domains": {"d": pl.concat_list("d")},
    "objects in lists": {"u": pl.concat_list(pl.struct("i", "r"))},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("strict", [False, True])
def test_an_odd_type_in_parquet(odd, strict, tmp_path, cache):
    config = written(tmp_path / "raw", "table", {"t.parquet": parquet(**ODD[odd])}, **SIX, strict=strict)
    found = prepared(config)
    assert sound(found, config) if not isinstance(found, str) else len(found.splitlines()) == 1
    if isinstance(found, str):
        assert inside(cache) == []


FORMATS = [
    "%",
    "%%",
    "%Q",
    "%Y",
    "%H:%M",
    "",
    " ",
    "%s",
    "%f",
    "%.f",
    "%Y-%m-%d %z",
    "%-d",
    "%3f",
    "%9999f",
    "é",
    "%Y" * 500,
]
FORMATS += ["%:", "%+", "%c", "%D", "%G-W%V-%u", "%j", "\n", "%Y-%m-%d\0", "%e%h%n%t%P", "%Z", "%::z", "%#z"]


@pytest.mark.parametrize("time_format", FORMATS)
def test_any_time_format(time_format, tmp_path, cache):
    kind, options, files = SOURCES["dates"]
    found = prepared(config := written(tmp_path / "raw", kind, files, **options | {"time_format": time_format}))
    assert sound(found, config) if not isinstance(found, str) else inside(cache) == []


@pytest.mark.parametrize("separator", ["\0", "\n", "\r", '"', " ", "\t", "|", "é", "\u2028", "\\", "u", "1", ".", "^"])
@pytest.mark.parametrize("quote", ['"', ""])
def test_any_separator(separator, quote, tmp_path, cache):
    text = "\n".join(
        separator.join(f"{quote}{field}{quote}" for field in row) for row in [("u", "i", "t"), *"abc", *"bcd"]
    )
    columns = Columns(user="u", item="i", time=None)
    found = prepared(
        config := written(tmp_path / "raw", "table", {"t": text.encode()}, separator=separator, columns=columns)
    )
    assert sound(found, config) if not isinstance(found, str) else inside(cache) == []


@pytest.mark.parametrize("kind", sorted({kind for kind in readers.READERS if kind != "synthetic"}))
def test_noise(kind, tmp_path, cache):
    damage = Damage(5)
    for suffix in (".txt", ".csv", ".dat", ".inter", ".parquet"):
        for _ in range(6):
            found = prepared(config := written(tmp_path / "raw", kind, {f"x{suffix}": damage.noise(bytes(150))}))
            assert sound(found, config) if not isinstance(found, str) else len(found.splitlines()) == 1
    assert not list(cache.glob(".*"))


def test_a_damaged_cache_is_made_anew(tmp_path, cache):
    """Whatever happened to the prepared folder: the next run gets the same numbers, or is told to delete it."""
    kind, options, files = SOURCES["ml-100k"]
    config, damage = written(tmp_path / "raw", kind, files, **options), Damage(6)
    folder = prepare(config)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(60):
        path = damage.pick(list(whole))
        if path.suffix in {".npy", ".json"} and not damage.below(4):
            path.unlink()
        else:
            path.write_bytes(damage.cut(whole[path]) if damage.below(2) else damage.noise(whole[path]))
        found = prepared(config)
        if not isinstance(found, str):
            assert (found / "items.npy").read_bytes() == whole[folder / "items.npy"]
        for name, content in whole.items():
            name.parent.mkdir(exist_ok=True)
            name.write_bytes(content)


FACTS = [{"kept": None}, {"kept": []}, {"kept": {"users": "5", "items": 7, "events": 30}}, {"extras": None}]
FACTS += [{"extras": ["nothing"]}, {"extras": [["ratings"]]}, {"kept": {"users": 5, "items": "7", "events": 30}}]


@pytest.mark.parametrize("facts", FACTS)
def test_an_odd_manifest_in_the_cache_is_made_anew(facts, tmp_path):
    kind, options, files = SOURCES["ml-100k"]
    path = (folder := prepare(config := written(tmp_path / "raw", kind, files, **options))) / "manifest.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | facts))
    assert prepare(config) == folder
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["offsets", "train_end", "validation", "test"])
def test_impossible_places_in_the_cache_are_made_anew(name, tmp_path):
    kind, options, files = SOURCES["ml-100k"]
    path = (folder := prepare(config := written(tmp_path / "raw", kind, files, **options))) / f"{name}.npy"
    before, values = path.read_bytes(), np.load(path)
    values[1] = 2**40
    np.save(path, values)
    assert prepare(config) == folder
    assert path.read_bytes() == before


def test_a_panic_of_the_parquet_reader_is_a_damaged_file(tmp_path, cache, monkeypatch):
    """About one in 400 files with a flipped bit is such; which ones hangs on the version of polars."""
    config = written(tmp_path / "raw", "table", {"t.parquet": parquet()}, **SIX)

    def panic(*arguments, **options):
        raise pl.exceptions.PanicException("called `Result::unwrap()` on an `Err` value")

    monkeypatch.setattr(pl, "read_parquet", panic)
    assert isinstance(prepared(config), str)
    assert inside(cache) == []
