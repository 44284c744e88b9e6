# SPDX-License-Identifier: AGPL-3.0-or-later
"""Wall time and processor time of everything that this process started, children of children included."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds. ``cpu_s``: user and system time of all processes; ``machine_s``: of the whole machine, kernel threads and
    other people's work included.
    """

    wall_s: float
    cpu_s: float
    machine_s: float

    @property
    def kernel_s(self) -> float:
        """What the machine did beside the processes."""
        return max(0.0, self.machine_s - self.cpu_s)


@dataclass(slots=True)
class Meter:
    """What a contender has spent since ``start``, at each moment that was marked."""

    marks: dict[str, Spent] = field(default_factory=dict)
    _wall_s: float = 0
    _cpu_s: float = 0
    _machine_s: float = 0

    def start(self) -> None:
        """Begin."""
        self._cpu_s, self._machine_s = descendants_cpu_s(), _machine_cpu_s()
        self._wall_s = time.perf_counter()

    def mark(self, name: str) -> Spent:
        """Write down what was spent until now."""
        wall_s = time.perf_counter() - self._wall_s
        cpu_s, machine_s = descendants_cpu_s() - self._cpu_s, _machine_cpu_s() - self._machine_s
        spent = self.marks[name] = Spent(wall_s, cpu_s, machine_s)
        return spent


def descendants_cpu_s() -> float:
    """Processor seconds of all processes below this one since it began, those that have ended included.

    Exact for processes that run and for children that have ended; what their own children used before they ended
    is known to a tick (10 ms).
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = ended.ru_utime + ended.ru_stime
    for pid, fields in _descendants():
        total += (int(fields[13]) + int(fields[14])) / _TICKS  # their children that have ended
        try:
            # The clock of a process and all its threads, as clock_getcpuclockid makes it.
            total += time.clock_gettime((~pid << 3) | 2)
        except OSError:  # it has just ended and was waited for
            total += (int(fields[11]) + int(fields[12])) / _TICKS
    return total


def _descendants() -> list[tuple[int, list[str]]]:
    """The fields of /proc/PID/stat from the third on, of each process below this one."""
    found: dict[int, list[str]] = {}
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text("ascii", "replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = text.rpartition(")")[2].split()
            found[int(entry.name)] = fields
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    result, todo = list[tuple[int, list[str]]](), list(below.get(os.getpid(), ()))
    while todo:
        pid = todo.pop()
        result.append((pid, found[pid]))
        todo.extend(below.get(pid, ()))
    return result


def _machine_cpu_s() -> float:
    """Processor seconds that the machine was busy since it began."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / _TICKS


__all__ = ["Meter", "Spent", "descendants_cpu_s"]
