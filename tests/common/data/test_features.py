import json

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from common.data import itemrows
from common.data.attributes import Column
from common.data.catalogue import Catalogue
from common.data.encoders import words
from common.data.encoders.categorical import fit_vocabulary
from common.data.encoders.numeric import fit_scale
from common.data.encoders.vectors import fit_vectors
from common.data.features import FITTERS, Encoder, apply, fit
from common.data.prepare import prepare
from common.errors import DataError
from common.features import CategoricalFeature, FeatureConfig, ItemFeatures, NumericFeature, TextFeature, VectorsFeature
from common.sources import DataConfig
from tests.support.columns import bags, exact_svd


@pytest.fixture
def shop(source, tmp_path, monkeypatch):
    """A catalogue of items a, b, c, d in that order, and a way to write files beside it and fit."""
    catalogue = Catalogue.open(prepare(source("pairs", "p.txt", "1 a\n1 b\n1 c\n2 d\n")))
    monkeypatch.setenv("HUSHREC_DATA", str(tmp_path))

    def make(*columns, content=None, name="s.csv", **options):
        if isinstance(content, pl.DataFrame):
            content.write_parquet(tmp_path / name)
        elif content is not None:
            (tmp_path / name).write_text(content)
        source_name = name if content is not None else None
        return fit(catalogue, ItemFeatures(columns=columns, **{"source": source_name, **options}))

    return make


def test_every_kind_has_a_fitter_and_an_encoder():
    for union in (FeatureConfig, Encoder):
        assert TypeAdapter(union).json_schema()["discriminator"]["mapping"].keys() == FITTERS.keys()


# --- by hand -----------------------------------------------------------------------------------------------------


def test_categorical(shop):
    feature = {"kind": "categorical", "name": "tag", "separator": "|"}
    tags = "item,tag\nd,x|y| x\nzz,q\na,y\nb, \n"  # c is missing, zz unknown, b blank
    found = shop(feature, content=tags)["tag"]
    assert (found.kind, found.vocabulary, found.values.size) == ("categorical", ["y", "x"], 2)
    assert bags(found.values) == [[0], [], [], [0, 1]]
    assert found.values.weights.tolist() == [1, 0.5, 0.5]
    assert [array.dtype.name for array in found.arrays().values()] == ["int64", "int64", "float32"]


@pytest.mark.parametrize("form", ["parquet", "arrays", "npy", "halves"])
def test_vectors(shop, tmp_path, form):
    items, rows = ["d", "zz", "a", "b"], [[3.0, 4.0], [9.0, 9.0], [0.0, 2.0], [0.0, 0.0]]
    path = tmp_path / ("v.npy" if form in ("npy", "halves") else "v.parquet")
    if path.suffix == ".npy":
        np.save(path, np.array(rows, np.float16 if form == "halves" else np.float64))
        path.with_suffix(".items").write_text("\n".join(items) + "\n")
    else:
        kind = pl.Array(pl.Float32, 2) if form == "arrays" else pl.List(pl.Float64)
        pl.DataFrame({"item": items, "vector": pl.Series(rows, dtype=kind)}).write_parquet(path)
    feature = {"kind": "vectors", "name": "image", "path": path.name}
    matrix = shop(feature)["image"].values.matrix
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1], [np.float32(0.6), np.float32(0.8), 0]]
    assert shop({**feature, "normalise": False})["image"].values.matrix[3].tolist() == [3, 4, 0]


FILMS = 'item,title\na,"Heat (1995)"\nb,"2001 (1968), (2001)"\nc,"1984"\n'  # of d there is no title
YEAR = {"name": "year", "column": "title", "pattern": r"\((\d{4})\)"}


def test_a_part_of_a_text(shop):
    found = shop(
        {"kind": "numeric", "scaling": "none", **YEAR}, {"kind": "categorical", **YEAR, "name": "of"}, content=FILMS
    )
    mean = (1995 + 1968) / 2
    assert found["year"].values.matrix.tolist() == [[1995, 0], [1968, 0], [mean, 1], [mean, 1]]
    assert (found["of"].vocabulary, bags(found["of"].values)) == (["1968", "1995"], [[1], [0], [], []])
    later = apply(json.loads(json.dumps(found.fitted())), pl.DataFrame({"title": ["New (1968)", "1995", None]}))
    assert later["year"].values.matrix.tolist() == [[1968, 0], [mean, 1], [mean, 1]]
    assert bags(later["of"].values) == [[0], [], []]
    assert apply(found.fitted(), pl.DataFrame({"title": [None]}))["year"].values.matrix.tolist() == [[mean, 1]]


# --- faults ------------------------------------------------------------------------------------------------------

CATEGORICAL, NUMERIC = {"kind": "categorical", "name": "x"}, {"kind": "numeric", "name": "x"}


@pytest.mark.parametrize(
    ("feature", "content", "message"),
    [
        (NUMERIC, "item,x\na,1\nb,cheap\n", r"s.csv, column 'x', item 'b': 'cheap' is no number"),
        (NUMERIC, "item,x\na,1\nb,-inf\n", r"s.csv, column 'x', item 'b': is infinite"),
        (NUMERIC, "item,x\na,1e200\nb,-1e200\n", r"column 'x': has numbers too large.*log or quantile"),
        (NUMERIC, "item,x\na,\nb,nan\n", r"column 'x': holds no number at all; leave"),
        (NUMERIC, "item,y\na,1\n", r"s.csv: no column 'x'"),
        (NUMERIC, "item,x\na,1\na,2\n", r"s.csv: item 'a' comes twice; keep one"),
        (NUMERIC, "item,x\nA,1\n", r"s.csv: none of its items is in the catalogue, which has e.g. 'a'"),
        (NUMERIC, "item,x\na,1\n,2\n", r"s.csv: row 1 has no item"),
        (NUMERIC, "item,x\na,1\nb\n", r"s.csv, line 3: 1 fields, expected 2"),
        (NUMERIC, "id,x\na,1\n", r"s.csv: no column 'item'"),
        (NUMERIC, pl.DataFrame({"item": [["a"]], "x": [1.0]}), r"column 'item': is of type List"),
        (NUMERIC, pl.DataFrame({"item": ["a"], "x": [[1.0]]}), r"is of type List.*numeric takes numbers"),
        (CATEGORICAL, pl.DataFrame({"item": ["a"], "x": [1.5]}), r"is of type Float64; categorical takes"),
        (CATEGORICAL, pl.DataFrame({"item": ["a"], "y": [1.5]}), r"no column 'x'"),
        (CATEGORICAL, pl.DataFrame({"x": ["a"]}), r"no column 'item'"),
        (CATEGORICAL, "item,x\na,\n", r"column 'x': holds no value at all; leave"),
        ({**CATEGORICAL, "min_count": 3}, "item,x\na,r\nb,r\n", r"min_count=3 leaves no value \('r'.*has 2\); lower"),
        ({"kind": "text", "name": "x"}, "item,x\na,!\n", r"holds no words"),
        ({**NUMERIC, "pattern": "(c)"}, "item,x\na,ac\n", r"column 'x', pattern '\(c\)', item 'a': 'c' is no number"),
        ({**NUMERIC, "pattern": "(c)"}, "item,x\na,b\n", r"column 'x', pattern '\(c\)': holds no number at all"),
        ({**CATEGORICAL, "pattern": "(c)"}, "item,x\na,b\n", r"column 'x', pattern '\(c\)': holds no value at all"),
        ({**CATEGORICAL, "pattern": "(?<=b)(c)"}, "item,x\na,bc\n", r"pattern '.*': look-around, back-references .*"),
        ({**NUMERIC, "pattern": "(1)"}, pl.DataFrame({"item": ["a"], "x": [1.0]}), r"Float64; a pattern looks into"),
        ({"kind": "text", "name": "x", "min_count": 2}, "item,x\na,one\n", r"min_count=2 leaves no word"),
    ],
)
def test_faults_name_the_file_the_column_and_the_mend(shop, feature, content, message):
    name = "s.parquet" if isinstance(content, pl.DataFrame) else "s.csv"
    with pytest.raises(DataError, match=message):
        shop(feature, content=content, name=name)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_bad_json(shop, content):
    with pytest.raises(DataError, match=r"s\.json"):
        shop({"kind": "categorical", "name": "attributes"}, content=content, name="s.json")


@pytest.mark.parametrize("name", ["s.parquet", "v.npy"])
def test_damaged_binary(shop, tmp_path, name):
    (tmp_path / name).write_text("nonsense")
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        shop({"kind": "vectors", "name": "x", "path": name})


def test_npy_needs_its_items(shop, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, 3)))
    feature = {"kind": "vectors", "name": "x", "path": "v.npy"}
    with pytest.raises(DataError, match=r"v\.items: is not there; v\.npy needs it: the id of each"):
        shop(feature)
    (tmp_path / "v.items").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"is float64 \(2, 3\), expected one row of numbers for each of the 3 lines"):
        shop(feature)


def test_an_archive_of_arrays(shop, tmp_path):
    np.savez(tmp_path / "v.npz", np.ones((2, 3)))
    (tmp_path / "v.npz").rename(tmp_path / "v.npy")
    with pytest.raises(DataError, match=r"v\.npy is an archive"):
        shop({"kind": "vectors", "name": "x", "path": "v.npy"})


def test_no_features_at_all(shop):
    found = shop()
    assert (found.items, len(found), found.fitted()) == (4, 0, {"format": 1, "columns": []})


def test_a_source_goes_before_the_catalogue(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_DATA", str(tmp_path))
    source("movielens", "movies.csv", "movieId,title,genres\n5,Heat,Action|Crime\n7,Empty,(no genres listed)\n")
    rows = "userId,movieId,rating,timestamp\n1,7,4.0,10\n1,5,3.5,20\n2,12,1.0,5\n"
    catalogue = Catalogue.open(prepare(source("movielens", "ratings.csv", rows)))
    (tmp_path / "s.tsv").write_text("item\ttitle\n12\tJaws\n")
    columns = [{"kind": "categorical", "name": name} for name in ("title", "genres")]
    found = fit(catalogue, ItemFeatures(columns=columns))
    assert (found["title"].vocabulary, bags(found["title"].values)) == (["Empty", "Heat"], [[1], [0], []])
    assert (found["genres"].vocabulary, bags(found["genres"].values)) == (["Action", "Crime"], [[0, 1], [], []])
    found = fit(catalogue, ItemFeatures(columns=columns, source="s.tsv"))
    assert (found["title"].vocabulary, bags(found["title"].values)) == (["Jaws"], [[], [], [0]])
    assert bags(found["genres"].values) == [[0, 1], [], []]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({**NUMERIC, "name": "brand"}, "the catalogue has no column 'brand'; it has 'item', 'title', 'genres'$"),
        ({**NUMERIC, "name": "genres"}, "the catalogue, column 'genres': is of type List"),
    ],
)
def test_a_fault_of_the_catalogue_names_no_draft(source, feature, message):
    source("movielens", "movies.csv", "movieId,title,genres\n5,Heat,Action|Crime\n")
    features = {"columns": [feature]}
    data = source("movielens", "ratings.csv", "userId,movieId,rating,timestamp\n1,5,4.0,1\n", features=features)
    with pytest.raises(DataError, match=f"^data.features.columns: {message}"):
        prepare(data)


def test_how_many_items_each_feature_knows(source, tmp_path):
    """The mean counts as a number that is known, a vector of zeros as a vector, a text without a known word as none."""
    about = 'item,price,tag,text\na,1,x|y,one\nb,2,y,"!"\nc,3,,\ne,,,\n'
    (tmp_path / "s.csv").write_text(about)
    vectors = pl.DataFrame({"item": ["a", "b"], "vector": [[0.0, 0.0], [1.0, 0.0]]})
    vectors.write_parquet(tmp_path / "v.parquet")
    columns = [
        {**NUMERIC, "name": "price"},
        {**CATEGORICAL, "name": "tag", "separator": "|"},
        {"kind": "vectors", "name": "image", "path": str(tmp_path / "v.parquet")},
        {"kind": "text", "name": "text", "dim": 1},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "decompose", exact_svd)
        about = {"source": str(tmp_path / "s.csv"), "columns": columns}
        folder = prepare(source("pairs", "p.txt", "1 a\n1 b\n1 c\n2 d\n2 e\n", features=about))
    assert itemrows.known(folder) == {"price": 3, "tag": 2, "image": 2, "text": 1}
    (folder / itemrows.FITTED).write_text('{"columns": []}')
    with pytest.raises(DataError, match=r"features\.json does not fit"):
        itemrows.known(folder)
    assert itemrows.known(prepare(source("pairs", "p.txt", "1 a\n"))) == {}


def test_a_missing_file_names_the_places(shop, tmp_path):
    with pytest.raises(DataError, match=rf"data.features.source: no {tmp_path}/no.csv nor .*HUSHREC_DATA"):
        shop(source="no.csv")


@pytest.mark.parametrize(
    "options",
    [
        {"columns": [CATEGORICAL, NUMERIC]},
        {"id": False},
        {"columns": [{**NUMERIC, "name": "Price"}]},
        {"columns": [{**NUMERIC, "scalling": "log"}]},
        {"columns": [{"kind": "text", "name": "x", "pattern": "(a)"}]},
    ],
)
def test_what_the_schema_refuses(options):
    with pytest.raises(ValidationError):
        ItemFeatures.model_validate(options)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(a", "no regular expression"), ("a", "has 0 groups; put"), ("(a)(b)", "has 2 groups"), ("", "has 0 groups")],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(ValidationError, match=message):
        ItemFeatures(columns=[{**NUMERIC, "pattern": pattern}])


# --- properties --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
ROWS = st.fixed_dictionaries(
    {
        "tags": st.none() | st.lists(TEXT, max_size=4),
        "price": st.none() | st.floats(allow_infinity=False) | st.floats(-9, 9),
        "title": st.none() | TEXT | st.sampled_from(["red shoe", "blue hat", "a red hat"]),
        "image": st.none()
        | st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    }
)
SCHEMA = {"tags": pl.List(pl.String), "price": pl.Float64, "title": pl.String, "image": pl.List(pl.Float64)}
FULL = {"tags": ["a", "b"], "price": 1.0, "title": "red shoe", "image": [1.0, 0.0, 2.0]}


@given(
    st.lists(ROWS, max_size=12), st.sampled_from(["standard", "log", "quantile", "none"]), st.integers(1, 3), st.data()
)
@example([], "standard", 1, None)
def test_json_and_single_rows_give_the_same_bits(rows, scaling, least, data):
    frame = pl.DataFrame([FULL] * 3 + rows, SCHEMA)
    found = {name: Column(frame[name], pl.Series(range(frame.height)).cast(pl.String), "f") for name in SCHEMA}
    try:
        scale = fit_scale(NumericFeature(kind="numeric", name="price", scaling=scaling), found["price"])
    except DataError as error:
        assert "too large" in str(error)  # noqa: PT017
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "decompose", exact_svd)
        text = words.fit_words(TextFeature(kind="text", name="title", dim=2), found["title"])
    tags = CategoricalFeature(kind="categorical", name="tags", min_count=least)
    encoders = [
        fit_vocabulary(tags, found["tags"]),
        scale,
        text,
        fit_vectors(VectorsFeature(kind="vectors", name="image", path="p"), found["image"]),
    ]
    fitted = {"format": 1, "columns": [encoder.model_dump(mode="json") for encoder in encoders]}
    whole = apply(fitted, frame)
    again = apply(json.loads(json.dumps(whole.fitted(), allow_nan=False)), frame)
    assert again.digest == whole.digest
    assert again.fitted() == whole.fitted() == fitted
    for feature in whole:
        for name, array in feature.arrays().items():
            assert np.isfinite(array).all()
            assert array.flags.writeable  # torch warns of others
            assert array.tobytes() == again[feature.name].arrays()[name].tobytes()
    assert all(len(feature.values.matrix) == 0 for feature in apply(fitted, frame[:0]) if feature.kind != "categorical")
    row = frame.height - 1 if data is None else data.draw(st.integers(0, frame.height - 1))
    alone = apply(fitted, frame[row : row + 1])
    for name in ("price", "title", "image"):
        assert alone[name].values.matrix.tobytes() == whole[name].values.matrix[row].tobytes()
    assert bags(alone["tags"].values)[0] == bags(whole["tags"].values)[row]


def test_damaged_fitted_values(shop):
    fitted = shop(NUMERIC, content="item,x\na,1\nb,2\n").fitted()
    for broken in ({}, [], {**fitted, "format": 0}, {**fitted, "columns": [{**fitted["columns"][0], "mean": None}]}):
        with pytest.raises(DataError, match="fit them anew"):
            apply(broken, pl.DataFrame({"x": [1.0]}))
    with pytest.raises(DataError, match="new items: no column 'x'"):
        apply(fitted, pl.DataFrame({"y": [1.0]}))


# --- real data ---------------------------------------------------------------------------------------------------


def real(real_data, kind, path, **features):
    data = TypeAdapter(DataConfig).validate_python({"kind": kind, "path": str(real_data / path)})
    return fit(Catalogue.open(prepare(data)), ItemFeatures(**features))


def test_films(real_data):
    genres = {"kind": "categorical", "name": "genres"}
    for path, items, number in ("ml-100k", 1682, 19), ("ml-latest-small", 9724, 19):
        found = real(real_data, "movielens", path, columns=[genres])
        assert (found.items, found["genres"].values.size) == (items, number)
        assert found["genres"].vocabulary[0] == "Drama"
    years = real(real_data, "movielens", "ml-100k", columns=[{"kind": "numeric", **YEAR}])["year"].values.matrix
    assert years[:, 1].sum() == 1  # of a film called "unknown"


def test_beauty(real_data):
    tags = {"kind": "categorical", "name": "tags", "column": "attributes", "min_count": 2}
    source = str(real_data / "beauty" / "Beauty_item2attributes.json")
    found = real(real_data, "sequences", "beauty/Beauty.txt", source=source, columns=[tags])["tags"].values
    assert len(found.offsets) == 12102
    assert found.weights.sum() == pytest.approx((np.diff(found.offsets) > 0).sum())
