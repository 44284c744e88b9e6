# SPDX-License-Identifier: AGPL-3.0-or-later
"""A cycle of the same change on a small and on a large disk: it must cost by the change, not by the disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from bench.images import BLOCK, GIB, MIB, Content, scattered, spread
from bench.report import Result, paired_ratio
from bench.site import Pushed, Site, site
from tests.lab_qemu import storage_daemon

SIZES = (2 * GIB, 64 * GIB)
#: What both disks hold, bytes.
DATA = 256 * MIB
#: 1 % of 2 GiB.
CHANGED = 328
RATIO_MAX = 1.3

_Write = Callable[[list[int], Content], Awaitable[None]]


@dataclass(slots=True)
class _Protected:
    """A seeded VM of one disk, and how to change it."""

    size: int
    site: Site
    write: _Write
    cycles: list[Pushed] = field(default_factory=list)
    durable_s: list[float] = field(default_factory=list)


async def run(folder: Path, shrink: int, pairs: int) -> Result:
    """Cycles of both disks in turn, ``pairs`` times, with change tracking (qemu) and without (image)."""
    sizes = (SIZES[0] // shrink, SIZES[1] // shrink)
    changed = CHANGED // shrink
    what = (
        f"replctl push of {changed} changed blocks of 64 KiB, scattered, on disks of {sizes[0] // MIB} and"
        f" {sizes[1] // MIB} MiB, both with {DATA // shrink // MIB} MiB of data"
    )
    result = Result("cycle", what)
    for name, make, limit in (("qemu", _tracked, RATIO_MAX), ("image", _compared, None)):
        async with AsyncExitStack() as stack:
            both = [
                await stack.enter_async_context(
                    make(folder / f"{name}-{size}", size, DATA // shrink)
                )
                for size in sizes
            ]
            await _cycles(both, changed, pairs)
        _add(result, name, both, limit)
    return result


async def _cycles(both: list[_Protected], changed: int, pairs: int) -> None:
    for vm in both:
        await vm.site.applied((await vm.site.push("seed")).point)
    for number in range(pairs + 1):
        for vm in both:
            await vm.write(scattered(vm.size, changed, number), Content(number))
            started = time.perf_counter()
            pushed = await vm.site.push("push")
            if pushed.bytes_pushed < changed * BLOCK // 8:
                raise RuntimeError(f"a cycle of {pushed.bytes_pushed} bytes for {changed} blocks")
            await vm.site.applied(pushed.point)
            # The first pair warms both up: replicas, maps, caches.
            if number:
                vm.cycles.append(pushed)
                vm.durable_s.append(time.perf_counter() - started)


def _add(result: Result, name: str, both: list[_Protected], limit: float | None) -> None:
    small, large = both
    for what, pick in (
        ("command", lambda vm: [each.wall_s for each in vm.cycles]),
        ("cycle", lambda vm: [each.push_s for each in vm.cycles]),
        ("command and replica", lambda vm: vm.durable_s),
    ):
        times = [pick(small), pick(large)]
        result.figures[f"{name}: {what}, medians, s"] = [statistics.median(each) for each in times]
        bound = limit if what in {"command", "cycle"} else None
        result.ratios[f"{name}: {what}, large / small"] = (paired_ratio(times[1], times[0]), bound)
    pushed = [statistics.median(each.bytes_pushed for each in vm.cycles) for vm in both]
    result.figures[f"{name}: pushed, MiB"] = [each / MIB for each in pushed]


@asynccontextmanager
async def _tracked(folder: Path, size: int, data: int) -> AsyncIterator[_Protected]:
    """A disk in a storage daemon: a dirty bitmap knows what changed."""
    disk = "disk-0"
    async with storage_daemon({}) as daemon:
        daemon.disks[disk] = size
        await daemon.stop()
        await trio.to_thread.run_sync(spread, daemon.image(disk), size, data)
        await daemon.start()

        async def write(offsets: list[int], content: Content) -> None:
            for offset in offsets:
                await daemon.writer(disk).write(offset, content.noise(BLOCK))

        options = {
            "source": "qemu",
            "qemu_socket": str(daemon.qmp_socket),
            "qemu_nbd_socket": str(daemon.nbd_socket),
        }
        async with site(folder, options) as pair:
            yield _Protected(size, pair, write)


@asynccontextmanager
async def _compared(folder: Path, size: int, data: int) -> AsyncIterator[_Protected]:
    """A plain image: what changed is found by reading all its data and comparing digests."""
    path = folder.with_suffix(".raw")
    await trio.to_thread.run_sync(spread, path, size, data)

    def change(offsets: list[int], content: Content) -> None:
        with path.open("r+b") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(content.noise(BLOCK))

    async def write(offsets: list[int], content: Content) -> None:
        await trio.to_thread.run_sync(change, offsets, content)

    async with site(folder, {"source": "image", "image_disks": f"disk-0={path}"}) as pair:
        yield _Protected(size, pair, write)
    path.unlink()
