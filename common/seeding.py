"""Random draws keyed by (seed, purpose, round, user): no order of execution, chunking or resume changes one.

Two kinds. `generator` gives a whole numpy generator for a few draws of any law. `uniform_bits` and `uniform_integers`
give plain numbers for a whole cohort at once, each user's row being what that user alone would have drawn, so that a
device and a simulation of a thousand devices see the same dropout masks.

The streams are of statistical, not of cryptographic, quality: who knows the seed can draw them again.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 15
"""Words mixed at a time; 256 KiB stay in the cache, which halves the time of a cohort's masks."""


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Make a generator for one purpose, independent of all others.

    Parameters
    ----------
    seed : int
        The experiment's seed.
    purpose : str
        What the draws are for, such as ``"cohort"``.
    *keys : int
        What else sets this stream apart, such as round and user.

    Returns
    -------
    numpy.random.Generator
        Philox (Salmon et al., SC 2011); equal arguments give equal streams, any other arguments another stream.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_hash(seed, purpose, keys), "little")))


def uniform_bits(seed: int, purpose: str, round: int, users: ArrayLike, n: int) -> NDArray[np.uint16]:
    """Uniform 16-bit integers, `n` for each user.

    Parameters
    ----------
    seed, purpose, round
        Key that all users share. Calls of one key share one stream of words, those of `uniform_integers` included.
    users : (C,) integers
        Numbers of the users. A row depends on its own user only, not on the others in the call.
    n : int
        Draws a user; a longer row begins with the shorter one.

    Returns
    -------
    (C, n) uint16
    """
    # Four draws to a word, lowest bits first on machines of either byte order.
    words = _words(seed, purpose, round, users, -(-n // 4)).astype("<u8", copy=False)
    return words.view("<u2")[:, :n]


def uniform_integers(seed: int, purpose: str, round: int, users: ArrayLike, n: int, high: int) -> NDArray[np.int64]:
    """Uniform integers from 0 to `high` - 1, `n` for each user.

    Parameters
    ----------
    seed, purpose, round, users, n
        As in `uniform_bits`.
    high : int
        Exclusive upper bound, from 1 to 2**63.

    Returns
    -------
    (C, n) int64
        64-bit words modulo `high`: no value is likelier than another by more than `high` / 2**64, relatively.

    Raises
    ------
    ValueError
        If `high` is out of range.
    """
    if not 1 <= high <= 1 << 63:
        raise ValueError(f"high must be from 1 to 2**63, not {high}")
    words = _words(seed, purpose, round, users, n)
    words %= np.uint64(high)
    return words.view(np.int64)


def keep_mask(bits: NDArray[np.uint16], drop: float) -> NDArray[np.float32]:
    """Scaled dropout mask (Srivastava et al., JMLR 2014).

    Parameters
    ----------
    bits : uint16, any shape
        Uniform draws.
    drop : float
        Probability to drop, in [0, 1), rounded to a multiple of 2**-16.

    Returns
    -------
    float32, shape of `bits`
        0 where dropped, else 1 / (1 - probability), with the rounded probability, so that the mean is 1.

    Raises
    ------
    ValueError
        If `drop` is out of range.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), not {drop}")
    dropped = min(round(drop * 65536), 65535)
    mask = (bits >= np.uint16(dropped)).astype(np.float32)
    mask *= np.float32(65536 / (65536 - dropped))
    return mask


def _hash(seed: int, purpose: str, keys: Sequence[int]) -> bytes:
    """128 bits; JSON tells (1, 23) from (12, 3), and `int` numpy's integers from their own spelling."""
    text = json.dumps([int(seed), purpose, *map(int, keys)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _words(seed: int, purpose: str, round: int, users: ArrayLike, n: int) -> NDArray[np.uint64]:
    """Counter-based words (C, n): the SplitMix64 stream (Steele et al., OOPSLA 2014) of each user's own key."""
    base = np.uint64(int.from_bytes(_hash(seed, purpose, [round])[:8], "little"))
    keys = np.asarray(users).astype(np.uint64)  # (C,), a copy
    for _ in range(2):  # twice, because users are small and close together, and their keys must not be
        keys ^= base
        _mix(keys, np.empty_like(keys))
    counters = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
    words = np.empty((len(keys), n), np.uint64)
    rows = max(1, _BLOCK // max(1, n))
    scratch = np.empty((rows, n), np.uint64)
    for start in range(0, len(keys), rows):
        block = words[start : start + rows]
        np.add(keys[start : start + rows, None], counters, out=block)
        _mix(block, scratch[: len(block)])
    return words


def _mix(words: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    """Finaliser of SplitMix64, in place: every input bit flips every output bit with probability near 1/2."""
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1):
        np.right_shift(words, np.uint64(shift), out=scratch)
        words ^= scratch
        if factor > 1:
            words *= np.uint64(factor)
