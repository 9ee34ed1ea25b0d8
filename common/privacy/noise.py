"""Where noise comes from: keyed draws that can be repeated, or the operating system's entropy, which cannot.

Floating-point noise has holes (Mironov, CCS 2012): some outputs cannot arise from some inputs. `Secure` adds four
independent Gaussians of half the scale, which makes the search for such holes infeasible (Holohan & Braghin, ESORICS
2021; what Opacus calls secure mode). Neither source protects against who reads this process's memory or its timing.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.seeding import generator

Floats = NDArray[np.float64]
_STATE = slice(24, 24 + 8 * 624)
"""Where the twister's words lie in torch's state, 64 bits each."""


class NoiseSource(Protocol):
    """Standard normal draws, and generators for secret choices."""

    reproducible: bool
    """Whether the same keys give the same draws."""

    def normal(self, n: int, purpose: str, *keys: int) -> Floats:
        """`n` standard normal numbers for one purpose and key; never ask twice with the same."""

    def many(self, n: int, purpose: str, *keys: int) -> Tensor:
        """`n` standard normal numbers in single precision, for a device that noises a whole table; as `normal` else."""

    def choices(self, purpose: str, *keys: int) -> np.random.Generator:
        """A generator for secret choices such as who takes part."""


class Reproducible:
    """Keyed by the experiment's seed: for research, since who knows the seed can subtract the noise."""

    reproducible = True

    def __init__(self, seed: int):
        self._seed = seed

    def normal(self, n: int, purpose: str, *keys: int) -> Floats:
        """As in `NoiseSource`."""
        return generator(self._seed, purpose, *keys).standard_normal(n)

    def many(self, n: int, purpose: str, *keys: int) -> Tensor:
        """As in `NoiseSource`; by torch, three times as fast as numpy."""
        return torch.randn(n, generator=torch_generator(self._seed, purpose, *keys))

    def choices(self, purpose: str, *keys: int) -> np.random.Generator:
        """As in `NoiseSource`."""
        return generator(self._seed, purpose, *keys)


class Secure:
    """From the operating system's entropy; keys are not looked at."""

    reproducible = False

    def normal(self, n: int, purpose: str, *keys: int) -> Floats:
        """As in `NoiseSource`."""
        total = np.zeros(n)
        for _ in range(4):
            total += _box_muller(n)
        return total / 2

    def many(self, n: int, purpose: str, *keys: int) -> Tensor:
        """As in `NoiseSource`."""
        return torch.from_numpy(self.normal(n, purpose, *keys)).float()

    def choices(self, purpose: str, *keys: int) -> np.random.Generator:
        """As in `NoiseSource`."""
        return np.random.Generator(np.random.Philox(int.from_bytes(os.urandom(16), "little")))


class Ahead:
    """Another source, of which the next large draw is made in a thread while this process waits for others.

    Parameters
    ----------
    source : NoiseSource
        Where all of it is from.
    """

    def __init__(self, source: NoiseSource):
        self._source, self.reproducible = source, source.reproducible
        self.many, self.choices = source.many, source.choices
        self._thread = ThreadPoolExecutor(1, "noise")
        self._drawn: tuple[tuple[int | str, ...], Future[Floats]] | None = None

    def foresee(self, n: int, purpose: str, *keys: int) -> None:
        """Begin a draw; what was foreseen before and not asked for is forgotten."""
        self._drawn = (n, purpose, *keys), self._thread.submit(self._source.normal, n, purpose, *keys)

    def normal(self, n: int, purpose: str, *keys: int) -> Floats:
        """As in `NoiseSource`; what was foreseen is handed out once."""
        drawn, self._drawn = self._drawn, None
        return (
            drawn[1].result() if drawn and drawn[0] == (n, purpose, *keys) else self._source.normal(n, purpose, *keys)
        )


def noise_source(rng: str, seed: int) -> NoiseSource:
    """The source that ``privacy.rng`` names."""
    return Secure() if rng == "secure" else Reproducible(seed)


def torch_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """As `common.seeding.generator`, for torch: a Mersenne twister whose whole state comes from the key.

    `torch.Generator.manual_seed` looks at 32 bits only; among a few million draws some would be the same.

    Raises
    ------
    RuntimeError
        Where this version of torch keeps its state otherwise than we write it.
    """
    twister, state = torch.Generator(), _template().copy()
    state[_STATE].view(np.uint64)[:] = generator(seed, purpose, *keys).bit_generator.random_raw(624) >> np.uint64(32)
    twister.set_state(torch.from_numpy(state))
    return twister


@cache
def _template() -> NDArray[np.uint8]:
    """A state of torch's generator, from which the next draw will make all words anew."""
    state = torch.Generator().manual_seed(0).get_state().numpy()
    words = state[_STATE].view(np.uint64)
    if not np.array_equal(words, np.random.RandomState(0).get_state(legacy=False)["state"]["key"]):
        raise RuntimeError(f"torch {torch.__version__} keeps the state of its generator in another way")
    return state


def _box_muller(n: int) -> Floats:
    """Standard normal numbers from entropy (Box & Muller, 1958)."""
    half = (n + 1) // 2
    bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64).reshape(2, half)
    radius, angle = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    radius = np.sqrt(-2 * np.log(radius))
    angle *= 2 * np.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
