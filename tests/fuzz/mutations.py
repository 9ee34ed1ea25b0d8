"""Damage to bytes, of all kinds that a disk, an editor or a stranger can do, drawn from a seeded generator."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

INTERESTING = [b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\n", b"\r", b"\t", b'"', b"'", b"\xed\xa0\x80"]
INTERESTING += [b"\xc2\x85", "\u2028".encode(), "\U0010ffff".encode(), b"nan", b"-1", b"9" * 400, b"1e400", b"\x1a"]


class Damage:
    """What a seeded generator does to some bytes.

    Parameters
    ----------
    seed : int
        Of the generator.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def below(self, bound: int) -> int:
        """A number from 0 on, below a bound."""
        return int(self.rng.integers(max(bound, 1)))

    def pick(self, options):
        """One of some options."""
        return options[self.below(len(options))]

    def flipped(self, content: bytes, most: int = 3) -> bytes:
        """A few bits the other way round."""
        spoilt = bytearray(content)
        for _ in range(1 + self.below(most)):
            if spoilt:
                spoilt[self.below(len(spoilt))] ^= 1 << self.below(8)
        return bytes(spoilt)

    def cut(self, content: bytes) -> bytes:
        """Only the beginning, or only the end."""
        place = self.below(len(content))
        return content[:place] if self.below(3) else content[place:]

    def blotted(self, content: bytes) -> bytes:
        """A stretch of noise, or of zeros as after a power cut."""
        start, length = self.below(len(content)), 1 + self.below(60)
        noise = bytes(length) if self.below(2) else self.rng.bytes(length)
        return (content[:start] + noise + content[start + length :])[: max(len(content), 1)]

    def inserted(self, content: bytes) -> bytes:
        """Bytes that readers stumble over."""
        place = self.below(len(content) + 1)
        return content[:place] + self.pick(INTERESTING) + content[place:]

    def mixed(self, content: bytes) -> bytes:
        """Lines that are lost, doubled or in another order."""
        lines = content.splitlines(keepends=True)
        if not lines:
            return content
        one, other = self.below(len(lines)), self.below(len(lines))
        kind = self.below(4)
        if kind == 0:
            del lines[one]
        elif kind == 1:
            lines.insert(other, lines[one])
        elif kind == 2:
            lines[one], lines[other] = lines[other], lines[one]
        else:
            lines[one] = lines[one].strip() + lines[other]
        return b"".join(lines)

    def noise(self, content: bytes) -> bytes:
        """Nothing of what was there."""
        return self.rng.bytes(self.below(2 * len(content) + 2))

    def any(self, content: bytes) -> bytes:
        """One to three of all these."""
        kinds = [
            self.flipped,
            self.flipped,
            self.cut,
            self.blotted,
            self.inserted,
            self.inserted,
            self.mixed,
            self.noise,
        ]
        for _ in range(self.pick([1, 1, 2, 3])):
            content = self.pick(kinds)(content)
        return content


@contextmanager
def bounded(seconds: float, megabytes: int) -> Iterator[None]:
    """Fail if the block takes more processor time, or grows the process's peak by more."""
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < megabytes * 1024


def inside(folder: Path) -> list[str]:
    """All paths in a folder, hidden ones too."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*")) if folder.exists() else []
