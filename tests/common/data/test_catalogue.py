import pytest

from common.data.catalogue import Catalogue
from common.data.prepare import prepare
from common.errors import DataError


@pytest.fixture
def catalogue(source):
    source(
        "movielens",
        "movies.csv",
        'movieId,title,genres\n5,"Heat, The (1995)",Action|Crime\n7,Empty,(no genres listed)\n',
    )
    rows = "userId,movieId,rating,timestamp\n1,7,4.0,10\n1,5,3.5,20\n2,12,1.0,5\n"
    return Catalogue.open(prepare(source("movielens", "ratings.csv", rows)))


def test_counts_ids_titles_and_genres(catalogue):
    assert (catalogue.users, catalogue.items) == (2, 3)
    assert catalogue.item_ids() == ["5", "7", "12"]
    assert catalogue.titles() == ["Heat, The (1995)", "Empty", "12"]  # the id where no title is known
    assert catalogue.genres() == [["Action", "Crime"], [], []]


def test_without_titles(source):
    catalogue = Catalogue.open(prepare(source("pairs", "p.txt", "a x\na y\n")))
    assert catalogue.titles() == ["x", "y"]
    assert catalogue.genres() == [[], []]


def test_open_reads_only_the_manifest(catalogue):
    for path in catalogue.folder.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    assert Catalogue.open(catalogue.folder) == catalogue
    with pytest.raises(DataError, match=r"catalogue.parquet"):
        catalogue.item_ids()


def test_index_of_names_the_nearest(source):
    catalogue = Catalogue.open(prepare(source("pairs", "p.txt", "a guitar\na piano\n")))
    assert catalogue.index_of("piano") == 1
    with pytest.raises(DataError, match="no item 'pino'; did you mean 'piano'"):
        catalogue.index_of("pino")
    with pytest.raises(DataError, match="there are 2, such as 'guitar', 'piano'"):
        catalogue.index_of("")


def test_no_prepared_folder(tmp_path):
    with pytest.raises(DataError, match=r"no prepared data set"):
        Catalogue.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1, "digest": "", "read": {}, "kept": {}, "extras": []}'],
)
def test_bad_manifest(catalogue, content):
    (catalogue.folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest.json"):
        Catalogue.open(catalogue.folder)


def test_catalogue_that_does_not_fit(catalogue, source):
    other = prepare(source("pairs", "p.txt", "a x\n"))
    (other / "catalogue.parquet").replace(catalogue.folder / "catalogue.parquet")
    with pytest.raises(DataError, match="has 1 rows, expected 3"):
        catalogue.titles()


@pytest.mark.parametrize(
    ("name", "number"), [("5", 0), ("7", 1), ("12", 2), ("Empty", 1), ("heat, the (1995)", 0), ("HEAT", 0), ("mpt", 1)]
)
def test_an_item_is_found_by_id_title_or_what_only_its_title_has(catalogue, name, number):
    assert catalogue.find(name) == number


def test_a_name_that_may_mean_several_or_none(catalogue):
    with pytest.raises(DataError, match=r"item 'E' may be one of 2, such as 'Heat, The \(1995\)' \(5\), 'Empty' \(7\)"):
        catalogue.find("E")
    with pytest.raises(DataError, match="no item 'Emptx'; did you mean 'Empty'"):
        catalogue.find("Emptx")
    with pytest.raises(DataError, match="no item ''"):
        catalogue.find("")


def test_a_whole_title_comes_before_a_part_of_another(source):
    source("movielens", "movies.csv", "movieId,title,genres\n5,Alien,x\n7,Aliens,x\n")
    catalogue = Catalogue.open(
        prepare(source("movielens", "ratings.csv", "userId,movieId,rating,timestamp\n1,7,4.0,1\n1,5,3,2\n"))
    )
    assert catalogue.find("alien") == catalogue.index_of("5")


def test_without_titles_ids_are_looked_at_whole(source):
    catalogue = Catalogue.open(prepare(source("pairs", "p.txt", "a guitar\na piano\n")))
    assert catalogue.find("piano") == 1
    with pytest.raises(DataError, match="did you mean 'guitar'"):
        catalogue.find("guita")
