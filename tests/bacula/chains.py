# SPDX-License-Identifier: AGPL-3.0-or-later
"""What tests of chains share: jobs one after the other over disks that change, and what must come back of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bacula.director import Job
from tests.bacula.lab import MIB, Lab, Vm, file_sum

#: Levels of a chain that has every kind of step, and the jobs that each point is put together from.
LEVELS = ("Full", "Incremental", "Incremental", "Differential", "Incremental")
PARTS: Sequence[Sequence[int]] = ((0,), (0, 1), (0, 1, 2), (0, 3), (0, 3, 4))


@dataclass
class Chain:
    """Jobs of a VM, and the disks' SHA-256 as each job found them."""

    lab: Lab
    job: str
    jobs: list[Job] = field(default_factory=list)
    sums: list[dict[str, str]] = field(default_factory=list)

    def ids(self, point: int) -> list[int]:
        """The jobs that a point is put together from."""
        return [self.jobs[number].id for number in PARTS[point]]


def change(vm: Vm, step: int) -> None:
    """Change a VM's disks as files in it would: blocks here and there, text, zeros, and once a disk that grows."""
    noise = random.Random(f"step {step}")
    for disk, path in vm.disks.items():
        size = path.stat().st_size
        for _ in range(6):
            vm.write(disk, noise.randrange(0, size - 200_000), noise.randbytes(100_003))
        vm.write(disk, noise.randrange(0, size - MIB, 4096), bytes(300_000))
    if step == 2:
        last = list(vm.disks)[-1]
        vm.write(last, vm.disks[last].stat().st_size + MIB, b"the disk has grown" + bytes(494))
        with vm.disks[last].open("r+b") as file:
            file.truncate(-(-file.seek(0, 2) // 4096) * 4096)


def run_chain(
    lab: Lab,
    job: str,
    levels: Sequence[str],
    change_disks: Callable[[int], None],
    sums: Callable[[], dict[str, str]],
) -> Chain:
    """A job at each level, with changed disks before each but the first."""
    chain = Chain(lab, job)
    for step, level in enumerate(levels):
        if step:
            change_disks(step)
        chain.sums.append(sums())
        chain.jobs.append(lab.director.run(job, level))
    return chain


def images(folder: Path) -> dict[str, Path]:
    """Images below a folder, by the name of the disk."""
    return {path.name.partition(".")[0]: path for path in sorted(folder.rglob("disk-*.*"))}


def sums_of(folder: Path) -> Mapping[str, str]:
    """SHA-256 of restored raw images, by the name of the disk."""
    return {disk: file_sum(path) for disk, path in images(folder).items()}


__all__ = ["LEVELS", "PARTS", "Chain", "change", "images", "run_chain", "sums_of"]
