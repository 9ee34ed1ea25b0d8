"""Noise that is drawn before it is asked for is the same noise, and is handed out once."""

import numpy as np
import pytest

from common.privacy.noise import Ahead, Reproducible, Secure

KEY = ("update-noise", 3, 0)


def test_what_was_foreseen_is_what_would_have_been_drawn():
    ahead = Ahead(Reproducible(7))
    ahead.foresee(1000, *KEY)
    assert np.array_equal(ahead.normal(1000, *KEY), Reproducible(7).normal(1000, *KEY))
    assert np.array_equal(ahead.normal(1000, *KEY), Reproducible(7).normal(1000, *KEY))  # not foreseen: drawn now


@pytest.mark.parametrize("asked", [(999, *KEY), (1000, "update-noise", 4, 0), (1000, "update-noise", 3, 1)])
def test_another_draw_is_not_given_what_was_foreseen(asked):
    ahead = Ahead(Reproducible(7))
    ahead.foresee(1000, *KEY)
    assert np.array_equal(ahead.normal(*asked), Reproducible(7).normal(*asked))


def test_secret_noise_is_never_handed_out_twice():
    ahead = Ahead(Secure())
    assert not ahead.reproducible
    ahead.foresee(1000, *KEY)
    first, second = ahead.normal(1000, *KEY), ahead.normal(1000, *KEY)
    assert not np.array_equal(first, second)
    ahead.foresee(1000, *KEY)
    ahead.foresee(1000, *KEY)
    drawn = [first, second, ahead.normal(1000, *KEY), ahead.normal(1000, *KEY)]
    assert len({each.tobytes() for each in drawn}) == 4


def test_what_was_foreseen_is_forgotten_once_something_else_is_asked_for():
    """A draw of another round means that this one will not be released; its noise must not turn up later."""

    class Counting(Reproducible):
        draws = 0

        def normal(self, n, purpose, *keys):
            self.draws += 1
            return super().normal(n, purpose, *keys)

    source = Counting(7)
    ahead = Ahead(source)
    ahead.foresee(1000, *KEY)
    ahead.normal(1, "count-noise", 3, 0)
    ahead.normal(1000, *KEY)
    assert source.draws == 3


def test_an_error_of_the_source_is_told_where_the_noise_is_asked_for():
    class Dry(Secure):
        def normal(self, n, purpose, *keys):
            raise OSError("no entropy")

    ahead = Ahead(Dry())
    ahead.foresee(10, *KEY)
    with pytest.raises(OSError, match="no entropy"):
        ahead.normal(10, *KEY)
