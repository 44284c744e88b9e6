# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the crash tests push: six phases, the content of the disks in each, and what every point must read as.

Each phase starts from a template: both state directories as the phase before left them, all settled. The images of a
phase are written once and never touched again, so all trials share them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random

GRAIN = 65536
RETAINED = 2


class Phase(StrEnum):
    """In the order in which their templates follow from each other."""

    SEED = "seed"
    CYCLE = "cycle"
    GROW = "grow"
    ADD = "add"
    ABANDON = "abandon"
    RESEED = "reseed"
    RESYNC = "resync"


PHASES = tuple(Phase)


def _grains(random: Random, content: bytearray, first: int, last: int) -> None:
    """New data in the grains from ``first`` to ``last``; beyond the end the disk grows."""
    data = random.randbytes((last - first + 1) * GRAIN)
    content[first * GRAIN : (last + 1) * GRAIN] = data


def _zeros(content: bytearray, first: int, last: int) -> None:
    content[first * GRAIN : (last + 1) * GRAIN] = bytes((last - first + 1) * GRAIN)


def contents() -> Mapping[Phase, dict[str, bytes]]:
    """The disks in each phase: always the same bytes."""
    random = Random(20)
    found: dict[Phase, dict[str, bytes]] = {}
    system, data = bytearray(24 * GRAIN), bytearray(16 * GRAIN + 1000)
    _grains(random, system, 0, 5)
    system[12 * GRAIN : 17 * GRAIN] = b"compressible, " * (5 * GRAIN // 14) + bytes(5 * GRAIN % 14)
    _grains(random, data, 0, 6)
    found[Phase.SEED] = {"disk-0": bytes(system), "disk-1": bytes(data)}

    _grains(random, system, 1, 2)
    _zeros(system, 12, 16)  # a zero record
    _zeros(data, 3, 3)  # too short for one: zeros inside a data record
    _grains(random, data, 12, 12)
    data[-10:] = b"the end..."  # a last grain that is not whole
    found[Phase.CYCLE] = {"disk-0": bytes(system), "disk-1": bytes(data)}

    _grains(random, system, 28, 29)
    _grains(random, system, 3, 3)
    data += bytes(GRAIN) + random.randbytes(5000)
    found[Phase.GROW] = {"disk-0": bytes(system), "disk-1": bytes(data)}

    _zeros(system, 0, 4)
    _grains(random, data, 5, 5)
    more = bytearray(random.randbytes(2 * GRAIN) + bytes(5 * GRAIN))
    found[Phase.ADD] = {"disk-0": bytes(system), "disk-1": bytes(data), "disk-2": bytes(more)}

    _grains(random, system, 8, 11)
    _grains(random, data, 2, 3)
    found[Phase.ABANDON] = {"disk-0": bytes(system), "disk-1": bytes(data), "disk-2": bytes(more)}

    _grains(random, system, 20, 20)
    _zeros(data, 0, 6)
    found[Phase.RESEED] = {"disk-0": bytes(system), "disk-1": bytes(data), "disk-2": bytes(more)}

    _grains(random, system, 2, 2)
    _zeros(system, 20, 20)
    data += random.randbytes(GRAIN)
    _grains(random, data, 9, 9)
    found[Phase.RESYNC] = {"disk-0": bytes(system), "disk-1": bytes(data), "disk-2": bytes(more)}
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie below one test's folder."""

    base: Path

    def images(self, phase: Phase) -> Path:
        """The disks as they are in a phase."""
        return self.base / "images" / phase

    def template(self, phase: Phase) -> Path:
        """What both sides have when a phase begins: ``receiver``, ``source``, ``points.json``."""
        return self.base / "templates" / phase

    def disks(self, phase: Phase) -> dict[str, Path]:
        """The images by disk."""
        return {path.name: path for path in sorted(self.images(phase).iterdir())}


def write_images(layout: Layout) -> None:
    """Make the images of all phases."""
    for phase, disks in contents().items():
        folder = layout.images(phase)
        folder.mkdir(parents=True)
        for name, content in disks.items():
            (folder / name).write_bytes(content)


def copy_state(source: Path, target: Path) -> None:
    """Copy state directories; maps have 64 GiB of apparent size and stay sparse."""
    options = ["--archive", "--reflink=auto", "--sparse=auto"]
    subprocess.run(["cp", *options, source, target], check=True)


def write_points(folder: Path, points: Mapping[int, Phase]) -> None:
    """Record which phase's images each point must read as."""
    (folder / "points.json").write_text(json.dumps(dict(points)))


def read_points(folder: Path) -> dict[int, Phase]:
    """What ``write_points`` wrote."""
    raw = json.loads((folder / "points.json").read_text())
    return {int(number): Phase(name) for number, name in raw.items()}


def empty_template(folder: Path) -> None:
    """The template of the first phase."""
    for side in ("receiver", "source"):
        (folder / side).mkdir(parents=True)
    write_points(folder, {})


def forget_source(folder: Path) -> None:
    """The source's state is lost: the next push can only be a seed, or compare."""
    shutil.rmtree(folder / "source")
    (folder / "source").mkdir()
