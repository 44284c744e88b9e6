# SPDX-License-Identifier: AGPL-3.0-or-later
"""Disk images to measure with: always the same bytes for the same size."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 64 << 10
_POOL = 8 * MIB
#: Lengths of what lies together in a mixed image: from small files to large ones.
_RUNS = tuple(BLOCK << shift for shift in range(7))


@dataclass(frozen=True, slots=True)
class Image:
    """A raw image. ``data``: bytes of it that are not zero (in blocks of 64 KiB)."""

    path: Path
    size: int
    data: int


class Content:
    """Endless text and noise, cut from a pool of each at places that no other piece starts at."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgk"
        words = [
            "".join(self._random.choices(letters, k=self._random.randint(2, 11)))
            for _ in range(3000)
        ]
        weights = [1 / rank for rank in range(1, len(words) + 1)]
        self._text = " ".join(self._random.choices(words, weights, k=_POOL // 4)).encode()
        self._noise = self._random.randbytes(_POOL)

    def text(self, length: int) -> bytes:
        """Words: zstd makes about a third of it."""
        return self._cut(self._text, length)

    def noise(self, length: int) -> bytes:
        """What cannot be compressed."""
        return self._cut(self._noise, length)

    def _cut(self, pool: bytes, length: int) -> bytes:
        start = self._random.randrange(len(pool) - length)
        return pool[start : start + length]


def mixed(path: Path, size: int) -> Image:
    """A quarter each of text, noise, written zeros and holes, in runs of 64 KiB to 4 MiB, shuffled."""
    content, order = Content(), random.Random(2)
    runs = [(kind, length) for kind in range(4) for length in _fill(size // 4, order)]
    order.shuffle(runs)
    with path.open("wb") as file:
        for kind, length in runs:
            if kind == 0:
                file.write(content.text(length))
            elif kind == 1:
                file.write(content.noise(length))
            elif kind == 2:
                file.write(bytes(length))
            else:
                file.seek(length, os.SEEK_CUR)
        file.truncate(size)
        os.fsync(file.fileno())
    return Image(path, size, size // 2)


def _fill(total: int, order: random.Random) -> Iterator[int]:
    while total:
        length = min(order.choice(_RUNS), total)
        yield length
        total -= length


def zeros(path: Path, size: int) -> Image:
    """Zeros that were written: no hole says that they are none."""
    return _filled(path, size, 0, bytes)


def text(path: Path, size: int) -> Image:
    """Words: zstd makes about a third of it."""
    content = Content()
    return _filled(path, size, size, content.text)


def noise(path: Path, size: int) -> Image:
    """What cannot be compressed, and nowhere comes again."""
    return _filled(path, size, size, random.Random(3).randbytes)


def _filled(path: Path, size: int, data: int, piece: Callable[[int], bytes]) -> Image:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(piece(MIB))
        file.write(piece(size % MIB))
        os.fsync(file.fileno())
    return Image(path, size, data)


def spread(path: Path, size: int, data: int) -> Image:
    """A sparse image with ``data`` bytes, half text and half noise, in runs of 1 MiB spread evenly over all of it."""
    content, count = Content(), data // MIB
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(count):
            file.seek(size * number // count // MIB * MIB)
            file.write(content.noise(MIB) if number % 2 else content.text(MIB))
        os.fsync(file.fileno())
    return Image(path, size, count * MIB)


def scattered(size: int, count: int, round_number: int) -> list[int]:
    """Offsets of ``count`` blocks to change, one at a random place in each of as many equal parts of the disk."""
    order = random.Random(round_number)
    blocks = size // BLOCK
    return [
        order.randrange(blocks * part // count, blocks * (part + 1) // count) * BLOCK
        for part in range(count)
    ]


__all__ = [
    "BLOCK",
    "GIB",
    "MIB",
    "Content",
    "Image",
    "mixed",
    "noise",
    "scattered",
    "spread",
    "text",
    "zeros",
]
