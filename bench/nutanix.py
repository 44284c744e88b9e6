# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Full from a simulated Nutanix cluster: against `qemu-img convert` from the same targets, by disks and VMs at once, and what
one cycle asks of Prism.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal
from uuid import uuid4

import trio

from bench.images import GIB, MIB, noise
from bench.programs import run as run_program
from bench.programs import same
from bench.report import Result, paired_ratio
from replicator.disk import DiskView
from replicator.prism.api import Prism
from replicator.prism.discovery import open_prism
from replicator.prism.settings import Account, PrismSettings
from replicator.prism.types import Consistency
from replicator.sources.base import SnapshotName
from replicator.sources.nutanix.settings import NutanixSettings
from replicator.sources.nutanix.site import NutanixSite, make_secrets, open_site
from replicator.sources.nutanix.source import NutanixSource

PARTS: Final = ("full", "increment", "scale", "budget", "start")
INITIATOR: Final = "iqn.2026-01.org.example:bench"
PASSWORD: Final = "of-a-simulator"  # noqa: S105 - what it says
CHUNK: Final = MIB
_READERS: Final = 8
LEAST: Final = 0.8
#: How much of a Full an Incremental may be, at the most.
INCREMENT_MAX: Final = 0.15
REQUESTS_MAX: Final = 25
PRISM_S_MAX: Final = 50
START_S_MAX: Final = 0.2
_APIS: Final[tuple[Literal["v3", "v4"], ...]] = ("v3", "v4")


class Journal:
    """A ledger's store that is gone with the process."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    async def journal_put(self, key: str, value: Any) -> None:
        """Keep it."""
        self._kept[key] = value
        await trio.lowlevel.checkpoint()

    async def journal_get(self, key: str) -> Any:
        """What is kept, or None."""
        await trio.lowlevel.checkpoint()
        return self._kept.get(key)

    async def journal_delete(self, key: str) -> None:
        """Keep it no more."""
        self._kept.pop(key, None)
        await trio.lowlevel.checkpoint()

    async def journal_items(self, prefix: str) -> dict[str, Any]:
        """All with keys that begin so."""
        await trio.lowlevel.checkpoint()
        return {key: value for key, value in self._kept.items() if key.startswith(prefix)}


class Lab:
    """A simulator in a process of its own, with VMs of noise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world: dict[str, Any] = json.loads((folder / "world.json").read_text())

    def vm(self, name: str) -> dict[str, Any]:
        """A VM as the simulator keeps it."""
        found: dict[str, Any] = next(v for v in self.world["vms"].values() if v["name"] == name)
        return found

    def disk_file(self, name: str, index: int) -> Path:
        """The file with a disk's bytes."""
        backing = self.vm(name)["disks"][index]["backing"]
        return self.folder / "disks" / f"{backing}.raw"

    def settings(self, rate_rpm: int = 0, api: Literal["v3", "v4"] = "v4") -> PrismSettings:
        """How to reach it."""
        return PrismSettings(
            api_version=api,
            host=self.world["address"],
            ca=self.folder / "ca.pem",
            account=Account("backup", PASSWORD),
            rate_rpm=rate_rpm,
            cluster="cluster-a",
        )


@asynccontextmanager
async def lab(folder: Path, sizes: dict[str, list[int]]) -> AsyncIterator[Lab]:
    """VMs by name, each with disks of these sizes."""
    await trio.to_thread.run_sync(lambda: folder.mkdir(parents=True))
    vms = []
    for name, disks in sizes.items():
        images = []
        for index, size in enumerate(disks):
            image = await trio.to_thread.run_sync(noise, folder / f"{name}-{index}.raw", size)
            images.append({"image": str(image.path), "size": size})
        vms.append({"name": name, "disks": images})
    users = [{"name": "backup", "role": "Backup Admin", "password": PASSWORD}]
    scenario = folder / "scenario.json"
    scenario.write_text(json.dumps({"vms": vms, "users": users}))
    command = [
        str(Path(sys.executable).parent / "replctl"),
        "simulate",
        "--dir",
        str(folder / "sim"),
    ]
    process = await trio.lowlevel.open_process(
        [*command, "--scenario", str(scenario)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await process.stdout.receive_some()
        await trio.to_thread.run_sync(_remove_images, folder)
        yield Lab(folder / "sim")
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()


def _remove_images(folder: Path) -> None:
    for image in folder.glob("*.raw"):
        image.unlink()


@asynccontextmanager
async def site(
    lab: Lab,
    *,
    rate_rpm: int = 0,
    depth: int = 16,
    read_size: int = 256 << 10,
    api: Literal["v3", "v4"] = "v4",
) -> AsyncIterator[tuple[Prism, NutanixSite]]:
    """The client, and what sources are made over."""
    work = lab.folder / "work"
    work.mkdir(exist_ok=True)
    settings = NutanixSettings(
        initiator=INITIATOR, working_dir=work, depth=depth, read_size=read_size
    )
    async with (
        open_prism(lab.settings(rate_rpm, api)) as prism,
        open_site(prism, Journal(), settings) as found,
    ):
        yield prism, found


async def copy(view: DiskView, out: Path | None, since: str | None = None) -> int:
    """Read a disk as a backup does: its extents, a chunk at a time, several in flight. Returns the bytes read.

    ``since``: what changed alone, onto what ``out`` holds.
    """
    send, receive = trio.open_memory_channel[tuple[int, int]](_READERS)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600) if out is not None else -1
    if fd >= 0:
        os.ftruncate(fd, view.size)
    total = 0

    async def work(pieces: trio.MemoryReceiveChannel[tuple[int, int]]) -> None:
        nonlocal total
        async with pieces:
            async for offset, length in pieces:
                data = await view.read(offset, length)
                total += len(data)
                if fd >= 0:
                    await trio.to_thread.run_sync(os.pwrite, fd, data, offset)

    try:
        async with trio.open_nursery() as nursery, send, receive:
            for _ in range(_READERS):
                nursery.start_soon(work, receive.clone())
            async for extent in view.extents(since):
                if extent.zero:
                    if fd >= 0:
                        await trio.to_thread.run_sync(
                            os.pwrite, fd, bytes(extent.length), extent.offset
                        )
                    continue
                for at in range(extent.offset, extent.end, CHUNK):
                    await send.send((at, min(CHUNK, extent.end - at)))
            await send.aclose()
            await receive.aclose()
    finally:
        if fd >= 0:
            os.close(fd)
    return total


@asynccontextmanager
async def _readable(found: NutanixSite, vms: list[str]) -> AsyncIterator[list[list[DiskView]]]:
    """A snapshot of each VM, its disks attached and logged in to; everything is removed afterwards."""
    taken = []
    try:
        for vm in vms:
            source, name = NutanixSource(found, vm), SnapshotName(uuid4().hex[:16], None)
            snapshot = await source.take(name)
            taken.append((source, name, snapshot))
            for disk in snapshot.disks:
                await disk.view.read(0, 512)
        yield [[disk.view for disk in snapshot.disks] for _, _, snapshot in taken]
    finally:
        for source, name, snapshot in taken:
            await snapshot.aclose()
            await source.abandon(name)


async def _at_once(views: list[DiskView], count: int) -> float:
    """Seconds that reading all of these takes, ``count`` at once."""
    limit = trio.Semaphore(count)

    async def one(view: DiskView) -> None:
        async with limit:
            await copy(view, None)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for view in views:
            nursery.start_soon(one, view)
    return time.perf_counter() - started


async def _qemu(prism: Prism, vm: str, out: Path, dsip: str) -> float:
    """Seconds that `qemu-img convert` takes for the first disk, the volume group being there."""
    found = await prism.vm(vm)
    snapshot = await prism.create_snapshot(
        found,
        f"bench-{uuid4().hex[:8]}",
        Consistency.CRASH,
        (time.time_ns() // 1000) + 3_600_000_000,
        uuid4(),
    )
    secrets = make_secrets("one-way")
    assert secrets is not None
    group = await prism.create_volume_group(
        snapshot, snapshot.disks[0], f"bench-{uuid4().hex[:8]}", secrets, uuid4()
    )
    attachment = await prism.attach(group, INITIATOR, secrets, uuid4())
    target = f"iqn.2010-06.com.nutanix:{group.target}-tgt0"
    source = (
        f"driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={dsip}:3260,file.target={target},"
        f"file.lun=1,file.user={INITIATOR},file.password-secret=s,file.initiator-name={INITIATOR}"
    )
    started = time.perf_counter()
    await run_program(
        ["qemu-img", "convert", "--object", f"secret,id=s,data={secrets.target}", "--image-opts", source, "-O", "raw", out]
    )  # fmt: skip
    spent = time.perf_counter() - started
    await prism.detach(group.uuid, attachment)
    await prism.delete_volume_group(group.uuid)
    await prism.delete_snapshot(snapshot.uuid, snapshot.cluster)
    return spent


async def full(folder: Path, shrink: int, pairs: int) -> list[Result]:
    """One disk of 2 GiB: our reading, from the snapshot's view to a file, against qemu-img's, in turns."""
    size = 2 * GIB // shrink
    ours: list[float] = []
    theirs: list[float] = []
    whole: list[float] = []
    async with lab(folder / "full", {"one": [size]}) as found, site(found) as (prism, nutanix):
        vm = found.vm("one")["uuid"]
        (cluster,) = (c for c in await prism.clusters() if c.name == "cluster-a")
        out = folder / "out.raw"
        for number in range(pairs):
            theirs.append(await _qemu(prism, vm, out, str(cluster.data_services)))
            out.unlink()
            started = time.perf_counter()
            source = NutanixSource(nutanix, vm)
            name = SnapshotName(uuid4().hex[:16], None)
            snapshot = await source.take(name)
            view = snapshot.disks[0].view
            await view.read(0, 512)  # attached and logged in: qemu-img's target was there too
            reading = time.perf_counter()
            await copy(view, out)
            ours.append(time.perf_counter() - reading)
            await snapshot.aclose()
            await source.abandon(name)
            whole.append(time.perf_counter() - started)
            if number == 0:
                await same(found.disk_file("one", 0), out)
            out.unlink()
    result = Result(
        "nutanix/full", f"one disk of {size // MIB} MiB of noise over iSCSI, to a raw file"
    )
    result.figures = {
        "reading, ours, MB/s": [size / each / 1e6 for each in ours],
        "qemu-img convert, MB/s": [size / each / 1e6 for each in theirs],
        "with snapshot, group, login and removal, s": whole,
    }
    result.floors["speed / qemu-img convert"] = (paired_ratio(theirs, ours), LEAST)
    return [result]


async def increment(folder: Path, shrink: int, pairs: int) -> list[Result]:
    """A VM of two disks, 2 GiB together: a Full and an Incremental after files were changed, through v3 and v4."""
    del pairs
    size = GIB // shrink
    results = []
    async with lab(folder / "increment", {"two": [size, size]}) as found:
        vm = found.vm("two")["uuid"]
        for api in _APIS:
            result = Result(
                f"nutanix/increment/{api}",
                "two disks of 1 GiB; 200 places of 4 to 64 KiB written between; bytes compared",
            )
            async with site(found, api=api) as (_, nutanix):
                source, bytes_read = NutanixSource(nutanix, vm), []
                first, second = (uuid4().hex[:16] for _ in range(2))
                for name in (SnapshotName(first, None), SnapshotName(second, first)):
                    started, total = time.perf_counter(), 0
                    snapshot = await source.take(name)
                    for index, disk in enumerate(snapshot.disks):
                        out = folder / f"copy-{index}.raw"
                        total += await copy(disk.view, out, name.reference)
                        await same(found.disk_file("two", index), out)
                    await snapshot.aclose()
                    await source.confirm(name)
                    what = "Full" if name.reference is None else "Incremental"
                    result.figures[f"{what}: MiB, s"] = [total / MIB, time.perf_counter() - started]
                    bytes_read.append(total)
                    await trio.to_thread.run_sync(_scribble, found, size)
                await source.sweep(None, None)
            for index in range(2):
                (folder / f"copy-{index}.raw").unlink()
            result.ratios["Incremental / Full"] = (bytes_read[1] / bytes_read[0], INCREMENT_MAX)
            results.append(result)
    return results


def _scribble(found: Lab, size: int) -> None:
    """What happens to files: small writes at many places, on both disks."""
    places = random.Random(7)
    for index in range(2):
        with found.disk_file("two", index).open("r+b") as file:
            for _ in range(100):
                length = places.randrange(4 << 10, 64 << 10)
                os.pwrite(file.fileno(), os.urandom(length), places.randrange(size - length))


async def scale(folder: Path, shrink: int, pairs: int) -> list[Result]:
    """Four disks of a VM, and four VMs of a disk, read 1, 2 and 4 at once, to nowhere: at the default depth, and with one small
    read in flight a disk, where a target's answer has to be waited for.
    """
    size = 256 * MIB // shrink
    sizes = {"wide": [size] * 4} | {f"vm{number}": [size] for number in range(4)}
    spent: dict[str, dict[int, list[float]]] = {}
    async with lab(folder / "scale", sizes) as found:
        wide, four = [found.vm("wide")["uuid"]], [found.vm(f"vm{n}")["uuid"] for n in range(4)]
        for how, depth, read_size in (("depth 16", 16, 256 << 10), ("depth 1", 1, 64 << 10)):
            async with site(found, depth=depth, read_size=read_size) as (_, nutanix):
                for what, vms in (("concurrent_disks", wide), ("concurrent_vms", four)):
                    async with _readable(nutanix, vms) as disks:
                        views = [view for of_vm in disks for view in of_vm]
                        by_count = spent.setdefault(f"{what}, {how}", {})
                        for _ in range(pairs):
                            for count in (1, 2, 4):
                                by_count.setdefault(count, []).append(await _at_once(views, count))
    result = Result(
        "nutanix/scale",
        f"4 disks of {size // MIB} MiB that are attached, MB/s; target, simulator and reader share the machine",
        columns=("1 at once", "2 at once", "4 at once"),
    )
    for name, by_count in spent.items():
        result.figures[name] = [
            4 * size / statistics.median(by_count[count]) / 1e6 for count in (1, 2, 4)
        ]
    return [result]


async def budget(folder: Path, shrink: int, pairs: int) -> list[Result]:
    """What a one-disk cycle asks of Prism, at the default of 30 requests a minute."""
    del pairs
    size = 64 * MIB // shrink
    async with (
        lab(folder / "budget", {"one": [size]}) as found,
        site(found, rate_rpm=30) as (prism, nutanix),
    ):
        vm = found.vm("one")["uuid"]
        source = NutanixSource(nutanix, vm)
        first, second = SnapshotName(uuid4().hex[:16], None), None
        await source.sweep(None, None)
        taken = await source.take(first)
        await copy(taken.disks[0].view, None)
        await taken.aclose()
        await source.confirm(first)
        with found.disk_file("one", 0).open("r+b") as file:
            file.seek(size // 2)
            file.write(os.urandom(MIB))
        second = SnapshotName(uuid4().hex[:16], first.push_id)
        # A minute has passed since the seed, as it would have: the bucket is full again.
        await trio.sleep(60)
        before, started = prism.requests, time.perf_counter()
        taken = await source.take(second)
        read = 0
        async for extent in taken.disks[0].view.extents(first.push_id):
            if not extent.zero:
                read += len(await taken.disks[0].view.read(extent.offset, extent.length))
        await taken.aclose()
        await source.confirm(second)
        spent, requests = time.perf_counter() - started, prism.requests - before
        await source.sweep(None, None)
    result = Result(
        "nutanix/budget", f"a cycle of one disk, {read} bytes changed, at 30 requests a minute"
    )
    result.figures = {"requests, all hosts": float(requests), "seconds": spent}
    result.ratios["requests"] = (float(requests), float(REQUESTS_MAX))
    result.ratios["seconds of Prism"] = (spent, float(PRISM_S_MAX))
    return [result]


async def start(folder: Path, shrink: int, pairs: int) -> list[Result]:
    """From the start of the backend's process to its first request at Prism."""
    del shrink
    spent: list[float] = []
    async with lab(folder / "start", {"one": [16 * MIB]}) as found:
        conf = folder / "backend.conf"
        passfile = folder / "pass"
        for path, text in (
            (passfile, f"password = {PASSWORD}\n"),
            (
                conf,
                (
                    f"source = nutanix\nprism_central = {found.world['address']}\nprism_ca_cert = {found.folder / 'ca.pem'}\n"
                    f"user = backup\npassfile = {passfile}\nstate_dir = {folder / 'state'}\n"
                ),
            ),
        ):
            path.touch(mode=0o600)
            path.write_text(text)
        backend = Path(sys.executable).parent / "replicator-backend"
        command = [str(backend), "--standalone", "--config", str(conf), "health-check"]
        for _ in range(max(pairs, 5)):
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            port = listener.socket.getsockname()[1]
            conf.write_text(_pointed_at(conf.read_text(), port))
            started = time.perf_counter()
            process = await trio.lowlevel.open_process(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stream = await listener.accept()
            spent.append(time.perf_counter() - started)
            await stream.aclose()
            await listener.aclose()
            process.kill()
            await process.wait()
    result = Result(
        "nutanix/start",
        "replicator-backend --standalone health-check: to its first connection to Prism",
    )
    result.figures = {"seconds": sorted(spent)}
    result.ratios["median, s"] = (sorted(spent)[len(spent) // 2], START_S_MAX)
    return [result]


def _pointed_at(text: str, port: int) -> str:
    lines = [
        line for line in text.splitlines() if not line.startswith(("prism_central", "prism_port"))
    ]
    return "\n".join([*lines, "prism_central = 127.0.0.1", f"prism_port = {port}", ""])


async def run(folder: Path, shrink: int, pairs: int, part: str | None = None) -> list[Result]:
    """All parts, or one."""
    results: list[Result] = []
    parts: dict[str, Callable[[Path, int, int], Awaitable[list[Result]]]] = {
        "full": full, "increment": increment, "scale": scale, "budget": budget, "start": start,
    }  # fmt: skip
    for name in PARTS if part is None else (part,):
        results += await parts[name](folder, shrink, pairs)
    return results


__all__ = ["PARTS", "run"]
