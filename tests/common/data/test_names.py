import pytest

from common.data import names


def test_nearest():
    assert str(names.unknown("item", "Heat (1994)", ["Alien", "Heat (1995)"])) == (
        "no item 'Heat (1994)'; did you mean 'Heat (1995)'?"
    )


def test_nothing_near():
    assert str(names.unknown("user", "zzz", [str(n) for n in range(9)])) == (
        "no user 'zzz'; there are 9, such as '0', '1', '2', '3', '4'"
    )


@pytest.mark.parametrize("wanted", ["user99999x", "q"])
def test_many_names(wanted, monkeypatch):
    monkeypatch.setattr(names, "_MANY", 10)
    known = [f"user{n}" for n in range(1000)]
    assert wanted in str(names.unknown("user", wanted, known))
