"""Sections that contradict one another, or that nothing would read, are refused; what a mode reads is not."""

import pytest

from tests.privacy import private
from tests.support import world


def made(mode, kind="user-level", **evaluation):
    sections = {"evaluation": {"privacy": mode, **evaluation}}
    return private.experiment(**sections) if kind == "user-level" else world.experiment(**sections)


@pytest.mark.parametrize(
    ("mode", "key", "value", "heard"),
    [
        ("noised", "noise", 20.0, True),
        ("unaccounted", "noise", 20.0, False),
        ("public-holdout", "noise", 20.0, False),
        ("public-holdout", "holdout", 0.2, True),
        ("noised", "holdout", 0.2, False),
        ("unaccounted", "holdout", 0.2, False),
        ("noised", "users", 5, True),
        ("public-holdout", "users", 5, False),
        ("public-holdout", "test_users", 5, False),
    ],
)
def test_what_a_mode_does_not_read(mode, key, value, heard):
    if heard:
        made(mode, **{key: value})
    else:
        with pytest.raises(ValueError, match=rf"evaluation\.{key} is (not )?for "):
            made(mode, **{key: value})


def test_without_a_mode_there_are_no_public_users_and_no_noise():
    made("unaccounted", "none")  # a twin of a private experiment
    with pytest.raises(ValueError, match=r"evaluation\.privacy public-holdout is for a privacy mode"):
        made("public-holdout", "none")
    for key, value in {"noise": 20.0, "holdout": 0.2}.items():
        with pytest.raises(ValueError, match=rf"evaluation\.{key} is for "):
            made("noised", "none", **{key: value})
