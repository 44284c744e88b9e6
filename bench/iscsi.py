# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a disk over iSCSI: our initiator against libiscsi's, in `qemu-img convert` and in `iscsi-perf`, from one tgtd."""

from __future__ import annotations

import json
import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from bench.images import GIB, MIB, noise
from bench.programs import ProgramError, output, same, warm
from bench.programs import run as run_program
from bench.report import Result, paired_ratio
from tests.iscsi.lab import INITIATOR, TARGET, TargetDaemon, target_daemon

SIZE = 2 * GIB
#: The speed of `qemu-img convert` that ours must reach, with the same file to write.
LEAST = 0.8
_DEPTH = 16
_READ_SIZES = (256 << 10, 1 << 20)
_PERF_S = 3
_QEMU = "qemu-img convert"


@dataclass(slots=True)
class _Spent:
    wall_s: float
    cpu_s: float


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """``pairs`` rounds; in each, everybody reads the whole disk in turn."""
    size = SIZE // shrink
    image = await trio.to_thread.run_sync(noise, folder / "disk.raw", size)
    warm(image.path)
    spent: dict[str, list[_Spent]] = {}
    perf: list[float] = []
    async with target_daemon() as daemon:
        await daemon.add_target(allow="ALL")
        await daemon.add_disk(image.path)
        for number in range(pairs):
            names = [_QEMU, *(_name(size) for size in _READ_SIZES)]
            # Each is first in its turn: what the one before left to be written back is everybody's burden.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for out in (folder / "out.raw", None):
                    label = name if out else f"{name}, to nowhere"
                    found = await _read(daemon, name, out, size)
                    spent.setdefault(label, []).append(found)
                    if out is not None and number == 0:
                        await same(image.path, out)
                    if out is not None:
                        out.unlink()
            perf.append(await _perf(daemon))
    return _result(size, spent, perf)


def _name(read_size: int) -> str:
    return f"ours {read_size >> 10} KiB"


async def _read(daemon: TargetDaemon, name: str, out: Path | None, size: int) -> _Spent:
    if name == _QEMU:
        return await _convert(daemon, out, size)
    return await _ours(daemon, next(each for each in _READ_SIZES if _name(each) == name), out)


async def _ours(daemon: TargetDaemon, read_size: int, out: Path | None) -> _Spent:
    portal = daemon.portal
    command = [sys.executable, "-m", "bench.iscsi_read", portal.host, str(portal.port), TARGET]
    command += [INITIATOR, str(out or "-"), str(_DEPTH), str(read_size)]
    found = json.loads(await output(command))
    return _Spent(found["wall_s"], found["cpu_s"])


async def _convert(daemon: TargetDaemon, out: Path | None, size: int) -> _Spent:
    command: list[str | Path] = ["qemu-img", "convert", "-f", "raw"]
    url = f"iscsi://{daemon.portal}/{TARGET}/1"
    if out is None:
        command += ["-n", "--target-image-opts", url, f"driver=null-co,size={size}"]
    else:
        command += ["-O", "raw", url, out]
    before, started = _children_cpu_s(), time.perf_counter()
    await run_program(command)
    return _Spent(time.perf_counter() - started, _children_cpu_s() - before)


async def _perf(daemon: TargetDaemon) -> float:
    """MB/s of `iscsi-perf` with the same depth."""
    url = f"iscsi://{daemon.portal}/{TARGET}/1"
    blocks = _READ_SIZES[0] // 512
    command = ["iscsi-perf", "-m", str(_DEPTH), "-b", str(blocks), "-t", str(_PERF_S), url]
    said = await output(command)
    found = re.findall(r"average[^(]*\(([0-9.]+) (MB|MiB|GB)/s\)", said)
    if not found:
        raise ProgramError(f"iscsi-perf said: {said[-300:]!r}")
    return float(found[-1][0])


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _result(size: int, spent: dict[str, list[_Spent]], perf: list[float]) -> Result:
    what = f"a disk of {size // MIB} MiB of noise from tgtd on loopback, depth {_DEPTH}, read to a new raw file"
    result = Result("iscsi", what, columns=("MB/s", "seconds", "CPU s/GB"))
    for name, rounds in spent.items():
        wall = statistics.median(each.wall_s for each in rounds)
        cpu = statistics.median(each.cpu_s for each in rounds)
        result.figures[name] = [size / wall / 1e6, wall, cpu / size * 1e9]
    result.figures["iscsi-perf, to nowhere"] = [statistics.median(perf)]
    for read_size in _READ_SIZES:
        for suffix in ("", ", to nowhere"):
            label = f"{_name(read_size)}{suffix}: speed / qemu-img"
            theirs = [each.wall_s for each in spent[f"{_QEMU}{suffix}"]]
            ratio = paired_ratio(theirs, [each.wall_s for each in spent[_name(read_size) + suffix]])
            if suffix or read_size != _READ_SIZES[0]:
                result.ratios[label] = (ratio, None)
            else:
                result.floors[label] = (ratio, LEAST)
    return result
