# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM whose disks change by a fixed pseudo-random course, and what its points must read as."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from replicator import durable
from replicator.domain.model import Point
from replicator.imagemap import RootBuilder, vm_root
from replicator.phcbt import Algorithm
from tests.sites import GRAIN


def image_root(content: bytes) -> bytes:
    """A disk's root from nothing but its content."""
    builder = RootBuilder(Algorithm.XXH3_128, GRAIN, len(content))
    digests = Algorithm.XXH3_128.digest_grains(content, GRAIN)
    builder.add(0, digests, -(-len(content) // GRAIN))
    return builder.root()


def check_roots(point: Point, contents: Mapping[str, bytes]) -> None:
    """The point's roots are those of these contents."""
    assert {disk.disk: disk.size for disk in point.disks} == {
        name: len(content) for name, content in contents.items()
    }
    roots = {name: image_root(content) for name, content in contents.items()}
    assert {disk.disk: disk.root for disk in point.disks} == roots
    assert point.root == vm_root([(n, len(contents[n]), root) for n, root in roots.items()])


class RandomVm:
    """Images in ``folder`` and the course of what happens to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self.disks: dict[str, Path] = {}
        #: Content of every disk of every committed point.
        self.expected: dict[int, dict[str, bytes]] = {}

    def add(self, name: str, size: int) -> None:
        """A new disk, with data here and there; its old file is gone if there was one."""
        path = self._folder / f"{name}.raw"
        path.unlink(missing_ok=True)
        path.touch()
        self.disks[name] = path
        self.grow(name, size)
        for _ in range(3):
            self._write(name)

    def remove(self, name: str) -> None:
        """The disk is not the VM's any more."""
        del self.disks[name]

    def grow(self, name: str, size: int) -> None:
        """Make a disk larger (or smaller); what is new is zeros."""
        with self.disks[name].open("r+b") as file:
            file.truncate(size)

    def size(self, name: str) -> int:
        """Size in bytes."""
        return self.disks[name].stat().st_size

    def work(self) -> None:
        """What a VM does between two cycles: writes of data and zeros, discards, or nothing at all."""
        for name in sorted(self.disks):
            for _ in range(self._random.choice((0, 1, 1, 2, 4))):
                self._write(name)

    def _write(self, name: str) -> None:
        size = self.size(name)
        offset = self._random.randrange(size)
        length = min(self._random.choice((1, 512, GRAIN, 2 * GRAIN + 17)), size - offset)
        with durable.DurableFile(self.disks[name]) as file:
            match self._random.randrange(5):
                case 0:
                    file.write_at(bytes(length), offset)
                case 1:
                    file.punch(offset, length)
                case 2:
                    file.write_at(b"all alike" * (length // 9 + 1), offset)
                    file.truncate(size)
                case _:
                    file.write_at(self._random.randbytes(length), offset)

    def contents(self) -> dict[str, bytes]:
        """What the disks hold now."""
        return {name: path.read_bytes() for name, path in self.disks.items()}

    def committed(self, point: Point) -> None:
        """The disks as they are now are this point; its roots are theirs."""
        self.expected[point.number] = self.contents()
        check_roots(point, self.expected[point.number])
