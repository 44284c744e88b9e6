# SPDX-License-Identifier: AGPL-3.0-or-later
"""A seed over loopback against `qemu-img convert` of the same image out of a `qemu-nbd` export over loopback."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from bench.contender import free_port
from bench.images import GIB, MIB, Image, mixed
from bench.report import Result, paired_ratio
from bench.site import site


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """Seed and convert in turn, ``pairs`` times. What each leaves is durable before its time ends."""
    image = await trio.to_thread.run_sync(mixed, folder / "mixed.raw", 2 * GIB // shrink)
    await trio.to_thread.run_sync(_warm, image)
    seeds, applies, converts = list[float](), list[float](), list[float]()
    async with _nbd_export(image) as uri:
        for number in range(pairs):
            async with site(folder / f"site-{number}", _source(image)) as pair:
                started = time.perf_counter()
                pushed = await pair.push("seed")
                await pair.applied(pushed.point)
                applies.append(time.perf_counter() - started)
                seeds.append(pushed.wall_s)
            converts.append(await _convert(uri, folder / "converted.raw"))
    what = (
        f"replctl seed of {image.size // MIB} MiB (half zeros and holes, a quarter text, a quarter noise), source and"
        " receiver as two processes over TCP on loopback, against qemu-img convert from qemu-nbd over TCP on loopback"
    )
    result = Result("seed", what)
    for name, times in (("seed", seeds), ("seed and replica", applies), ("convert", converts)):
        median = statistics.median(times)
        result.figures[f"{name}, s"] = [round(each, 3) for each in times]
        result.figures[f"{name}, MB/s of disk"] = image.size / 1e6 / median
        result.figures[f"{name}, MB/s of data"] = image.data / 1e6 / median
    result.ratios["time of seed / time of convert"] = (paired_ratio(seeds, converts), None)
    result.ratios["time until replica / time of convert"] = (paired_ratio(applies, converts), None)
    return result


def _source(image: Image) -> dict[str, str]:
    return {"source": "image", "image_disks": f"disk-0={image.path}"}


def _warm(image: Image) -> None:
    """Both sides read the image from memory: what is measured is not the disk's reads."""
    with image.path.open("rb") as file:
        while file.read(MIB):
            pass


@asynccontextmanager
async def _nbd_export(image: Image) -> AsyncIterator[str]:
    port, pid_file = free_port(), image.path.with_suffix(".pid")
    command = ["qemu-nbd", "--read-only", "--persistent", "--format=raw", "--fork"]
    await trio.run_process(  # returns when it listens
        [*command, f"--pid-file={pid_file}", "--bind=127.0.0.1", f"--port={port}", str(image.path)]
    )
    try:
        yield f"nbd://127.0.0.1:{port}"
    finally:
        os.kill(int(pid_file.read_text("ascii")), signal.SIGTERM)


async def _convert(uri: str, target: Path) -> float:
    """Seconds for a new sparse raw file, durable."""
    started = time.perf_counter()
    await trio.run_process(
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", "-t", "writeback", uri, str(target)],
        stdin=subprocess.DEVNULL,
    )
    await trio.to_thread.run_sync(_sync, target)
    took = time.perf_counter() - started
    await trio.Path(target).unlink()
    return took


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
