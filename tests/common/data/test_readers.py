from typing import get_args

import polars as pl
import pytest

from common.data import readers
from common.data.paths import resolve
from common.errors import DataError
from common.sources import Columns, DataConfig, SyntheticData


def rows(table):
    return table.frame.rows()


def test_every_kind_has_a_reader():
    kinds = {get_args(variant.model_fields["kind"].annotation)[0] for variant in get_args(get_args(DataConfig)[0])}
    assert kinds == readers.READERS.keys()


# --- well-formed files ---------------------------------------------------------------------------------------------

EVENTS = [("1", "10", 4.0, 100), ("2", "20", 0.5, 90)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("u.data", "1\t10\t4\t100\n2\t20\t0.5\t90\n"),
        ("ratings.dat", "1::10::4::100\n2::20::0.5::90\n"),
        ("ratings.csv", "userId,movieId,rating,timestamp\r\n1,10,4.0,100\r\n2,20,0.5,90\r\n"),
        ("ratings.csv", '\ufeffuserId,movieId,rating,timestamp\n"1","10","4.0",100\n2,20,0.5,90'),
    ],
)
def test_movielens(source, name, content):
    config = source("movielens", name, content)
    for path in (config.path, config.path.rpartition("/")[0]):  # the file, or its folder
        table = readers.read(config.model_copy(update={"path": path}))
        assert table.frame.select("user", "item", "rating", "time").rows() == EVENTS
        assert table.timed
        assert table.about is None


def test_movielens_100k_titles_are_latin_1(source):
    source("movielens", "u.genre", "unknown|0\nDrama|1\n\n")
    source("movielens", "u.item", "10|Misérables, Les (1995)|x||y|0|1\n20|B|x||y|0|0\nbroken\n".encode("latin-1"))
    about = readers.read(source("movielens", "u.data", "1\t10\t4\t100\n")).about
    assert about.rows() == [("10", "Misérables, Les (1995)", ["Drama"]), ("20", "B", [])]


def test_movielens_1m_titles(source):
    source("movielens", "movies.dat", "10::Café::Drama|War\nbroken\n10::again::x\n".encode("latin-1"))
    about = readers.read(source("movielens", "ratings.dat", "1::10::4::100\n")).about
    assert about.rows() == [("10", "Café", ["Drama", "War"])]


def test_pairs_keep_the_order_of_the_file(source):
    table = readers.read(source("pairs", "p.txt", "b x\n\na  y\nb\tz"))
    assert rows(table) == [("b", "x", 0), ("a", "y", 1), ("b", "z", 2)]
    assert not table.timed


def test_sequences(source):
    table = readers.read(source("sequences", "s.txt", "7 x y\n8 x\n"))
    assert rows(table) == [("7", "x", 0), ("7", "y", 1), ("8", "x", 2)]


def test_recbole(source):
    content = "item_id:token\tuser_id:token\textra:float\ttimestamp:float\nx\ta\t\t1.5\ny\ta\t7\t2\n"
    table = readers.read(source("recbole", "d.inter", content))
    assert rows(table) == [("a", "x", 1_500_000), ("a", "y", 2_000_000)]  # fractions count in microseconds


def test_recbole_without_times_in_a_folder(source):
    config = source("recbole", "d.inter", "user_id:token\titem_id:token\trating:float\na\tx\t3\n")
    table = readers.read(config.model_copy(update={"path": config.path.rpartition("/")[0]}))
    assert table.frame.select("user", "item", "rating", "time").rows() == [("a", "x", 3.0, 0)]
    assert not table.timed


def test_table_with_all_columns(source):
    columns = Columns(user="who", item="what", time="line", behaviour="how", rating="stars", domain="shop")
    content = 'line;who;what;how;stars;shop;more\n3;"a;b";x;buy;1.5;toy;\n1;c;"x ""y""";view;2;game;z\n'
    table = readers.read(source("table", "t.csv", content, columns=columns, separator=";"))
    assert table.frame.select("user", "item", "time", "behaviour", "rating", "domain").rows() == [
        ("a;b", "toy/x", 3, "buy", 1.5, "toy"),
        ("c", 'game/x "y"', 1, "view", 2.0, "game"),
    ]


@pytest.mark.parametrize(
    ("time_format", "values", "seconds"),
    [
        ("%m-%d", ["6-4", "06-05"], [960076800, 960163200]),  # a format without a year counts within the leap year 2000
        ("%m-%d", ["2-29", "3-1"], [951782400, 951868800]),
        ("%Y-%m-%d %H:%M:%S.%f", ["1970-01-01 00:00:01.5", "1970-01-01 00:01:00.0"], [1.5, 60]),
        ("%Y-%m-%dT%H:%M:%S%z", ["1970-01-01T02:00:00+0200", "1970-01-01T00:00:01+0000"], [0, 1]),
    ],
)
def test_dates(source, time_format, values, seconds):
    content = "user,item,time\n" + "".join(f"a,x,{value}\n" for value in values)
    table = readers.read(source("table", "t.csv", content, time_format=time_format))
    assert table.frame["time"].to_list() == [round(second * 1e6) for second in seconds]


def test_large_integer_times_stay_exact(source):
    times = [1_700_000_000_000_000_001, 1_700_000_000_000_000_002]
    content = "user,item,time\n" + "".join(f"a,x,{time}\n" for time in times)
    assert readers.read(source("table", "t.csv", content)).frame["time"].to_list() == times


def test_parquet(source, tmp_path):
    frame = pl.DataFrame({"u": [1, 2, None], "i": ["x", "y", "z"], "t": pl.Series([3.0, float("nan"), 5.0])})
    frame.write_parquet(tmp_path / "t.parquet")
    config = source("table", "dummy", "", columns=Columns(user="u", item="i", time="t"))
    table = readers.read(config.model_copy(update={"path": str(tmp_path / "t.parquet")}))
    assert rows(table) == [("1", "x", 3)]
    assert (table.bad_rows, table.bad_lines) == (2, [2, 3])


def test_one_column_may_play_two_roles(source):
    table = readers.read(source("table", "t.csv", "user,item\n1,5\n", columns=Columns(time="user")))
    assert table.frame.select("user", "item", "time").rows() == [("1", "5", 1)]


# --- malformed rows ------------------------------------------------------------------------------------------------

BAD = {
    "movielens": (
        "u.data",
        "1\t2\t3\t4\nx\n1\t2\t3\t4\t5\n1\t2\tnan\t4\n1\t\t3\t4\n1\t2\t3\tsoon\n5\t6\t1\t8\n",
        [2, 3, 4, 5, 6],
    ),
    "pairs": ("p.txt", "1 2\n3\n\n1 2 3\n4 5\n", [2, 4]),
    "sequences": ("s.txt", "\n1 2 3\n4\n5 6\n", [3]),
    "recbole": ("d.inter", "user_id:token\titem_id:token\n1\t2\n1\n1\t2\t3\n4\t5\n", [3, 4]),
    "table": ("t.csv", 'user,item,time\n1,2,3\n1,2\n1,"2\n2",3\n,2,3\n4,5,6\n', [3, 6]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_counted_and_named(source, kind):
    name, content, expected = BAD[kind]
    table = readers.read(source(kind, name, content))
    assert (table.bad_rows, table.bad_lines) == (len(expected), expected)
    assert len(table.frame) >= 2


@pytest.mark.parametrize("kind", BAD)
def test_strict_refuses_bad_rows(source, kind):
    name, content, expected = BAD[kind]
    with pytest.raises(DataError, match=rf"{name}: {len(expected)} malformed.*line {expected[0]}\b"):
        readers.read(source(kind, name, content, strict=True))


def test_only_the_first_bad_lines_are_kept(source):
    table = readers.read(source("pairs", "p.txt", "1 2\n" + "x\n" * 100))
    assert (table.bad_rows, table.bad_lines) == (100, [2, 3, 4, 5, 6])


# --- bad files -----------------------------------------------------------------------------------------------------

KINDS = {"movielens": "u.data", "pairs": "p.txt", "sequences": "s.txt", "recbole": "d.inter", "table": "t.csv"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\r\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not a text file"),
        ("user item\n".encode("utf-16"), "not a text file"),
        (b"a b\nc\xe9 d\n", "line 2: not UTF-8"),
        (b"nonsense", "(no rows|no events)"),
    ],
)
def test_bad_content(source, kind, content, message):
    with pytest.raises(DataError, match=message) as caught:
        readers.read(source(kind, KINDS[kind], content))
    assert "\n" not in str(caught.value)
    assert KINDS[kind] in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("movielens", "ratings.csv", "userId,movieId,rating,timestamp\n", "no rows"),
        (
            "movielens",
            "ratings.csv",
            "userid,movieId,rating,timestamp\n1,2,3,4\n",
            "no column 'userId'; did you mean 'userid'",
        ),
        ("recbole", "d.inter", "user_id:token\titem_id_list:token_seq\n1\t2\n", "did you mean 'item_id_list'"),
        ("recbole", "d.inter", "1\t2\t3\n4\t5\t6\n", "no column 'user_id'; there are 3"),
        ("table", "t.csv", "user,item,tiem\n1,2,3\n", "no column 'time'; did you mean 'tiem'"),
        ("table", "t.csv", "user\titem\ttime\n1\t2\t3\n", "no column 'user'; there are 1, such as"),
        ("table", "t.csv", "user,user,item,time\n1,1,2,3\n", "two columns 'user'"),
        ("table", "t.csv", "user,item,time\n1,2,noon\n", "no events: 1 malformed"),
        ("table", "t.csv", 'user,item,time\n"' + "x" * 200_000, "field larger"),
    ],
)
def test_bad_headers(source, kind, name, content, message):
    with pytest.raises(DataError, match=message):
        readers.read(source(kind, name, content))


@pytest.mark.parametrize("time_format", ["%Y-%m-%d %H", "never", "%", ""])
def test_bad_time_formats(source, time_format):
    with pytest.raises(DataError, match=r"t\.csv"):
        readers.read(source("table", "t.csv", "user,item,time\n1,2,2020-01-01 03\n", time_format=time_format))


def test_bad_parquet(source, tmp_path):
    with pytest.raises(DataError, match="as Parquet"):
        readers.read(source("table", "t.parquet", b"PAR1 and so on"))
    config = source("table", "t.parquet", b"")
    pl.DataFrame({"user": [1], "item": [[1, 2]], "times": [1]}).write_parquet(config.path)
    with pytest.raises(DataError, match="did you mean 'times'"):
        readers.read(config)
    with pytest.raises(DataError, match="cast List"):
        readers.read(config.model_copy(update={"columns": Columns(user="item", time="times")}))


# --- where files are looked for ------------------------------------------------------------------------------------


def test_places(tmp_path, monkeypatch):
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("HUSHREC_DATA", raising=False)
    (here / "f").touch()
    assert resolve("f", "data.path") == here / "f"
    assert resolve(str(here / "f"), "data.path") == here / "f"
    monkeypatch.setenv("HUSHREC_DATA", str(data))
    assert resolve("f", "data.path") == here / "f"
    (data / "f").touch()
    assert resolve("f", "data.path") == data / "f"


@pytest.mark.parametrize("path", ["nowhere", "~nobody-of-that-name/f", "a\0b"])
def test_missing_file_names_the_places_and_the_mend(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUSHREC_DATA", "/there")
    with pytest.raises(DataError) as caught:
        resolve(path, "data.path")
    message = str(caught.value)
    for part in (f"/there/{path}", str(tmp_path / path), "hushrec data download", "HUSHREC_DATA", "data.path"):
        assert part in message
    assert "\n" not in message


def test_a_folder_instead_of_a_file(source, tmp_path):
    config = source("pairs", "p.txt", "1 2\n").model_copy(update={"path": str(tmp_path / "raw")})
    with pytest.raises(DataError, match=r"is a folder, name one of its files \(p.txt\)"):
        readers.read(config)


def test_a_movielens_folder_without_ratings(source, tmp_path):
    config = source("movielens", "ml-1m.txt", "1 2\n").model_copy(update={"path": str(tmp_path / "raw")})
    with pytest.raises(DataError, match=r"none of u.data, ratings.dat, ratings.csv; it holds ml-1m.txt"):
        readers.read(config)


def test_an_unreadable_file(source, monkeypatch):
    config = source("pairs", "p.txt", "1 2\n")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read everything, so chmod proves nothing
    with pytest.raises(DataError, match=r"p\.txt.*permission"):
        readers.read(config)


def test_synthetic_needs_no_files():
    config = SyntheticData(kind="synthetic", users=5, items=10, mean_length=4, interests=2)
    assert readers.files(config) == []
    assert readers.read(config).frame["user"].n_unique() == 5
