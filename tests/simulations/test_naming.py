"""Names between commas, of titles that have commas themselves."""

import pytest

from simulations.naming import listed

KNOWN = ["5", "7", "Heat", "Paper, The (1994)", "10,000 BC (2008)", "Up", "Up, Up (2009)", "Up, Up (2009), Again"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("5, 7 ,,Heat", ["5", "7", "Heat"]),
        ("Paper, The (1994)", ["Paper, The (1994)"]),
        ("Heat,paper,the (1994) , 7", ["Heat", "Paper, The (1994)", "7"]),
        ("10,000 BC (2008), 10, 000 BC (2008)", ["10,000 BC (2008)"] * 2),
        ("Up, Up (2009)", ["Up, Up (2009)"]),
        ("Up, Up, Up (2009), Again, 5", ["Up", "Up, Up (2009), Again", "5"]),
        ("Paper, The", ["Paper", "The"]),
        ('"Heat, The (1995)", 7 ,,5', ["Heat, The (1995)", "7", "5"]),
        ('"Up","Up (2009)"', ["Up", "Up (2009)"]),
        (" ", []),
        ("", []),
        (",,", []),
    ],
)
def test_names(text, names):
    assert listed(text, KNOWN) == names
