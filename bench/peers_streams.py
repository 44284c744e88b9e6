# SPDX-License-Identifier: AGPL-3.0-or-later
"""Peers that are pipes or daemons through TLS: zstd, btrfs send and receive, rsync."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from bench.contender import Contender, Lab, Pair, free_port
from bench.images import Image
from bench.meter import Meter
from bench.programs import (
    Command,
    change,
    daemon,
    listening,
    output,
    pipe,
    run,
    same,
    sync_file,
    warm,
)
from replicator.nursery import flat_nursery

#: socat's own 8 KiB are too few; from 64 KiB on it makes no difference.
_BUFFER: Final = 262_144
#: What a btrfs needs beside the image, bytes.
_BTRFS_MORE: Final = 2 << 30


class _Tunnel:
    """Streams through TLS 1.3 with certificates on both sides, by socat; each into a command that waits for it."""

    def __init__(self, lab: Lab, nursery: trio.Nursery) -> None:
        self._folder = lab.certificates
        self._nursery = nursery
        self._port = free_port()
        self._received = trio.Event()

    async def arm(self, command: Command) -> None:
        """Listen for one stream, which ``command`` will read."""
        self._received = trio.Event()
        at = f"OPENSSL-LISTEN:{self._port},bind=127.0.0.1,reuseaddr,{self._proof('receiver')}"
        receiver: Command = ["socat", "-u", f"-b{_BUFFER}", at, "STDOUT"]
        self._nursery.start_soon(self._receive, [receiver, command])
        await listening(self._port)

    async def send(self, command: Command) -> None:
        """Send what ``command`` writes; returns when it was received and the other command has ended."""
        to = f"OPENSSL:127.0.0.1:{self._port},openssl-commonname=receiver,{self._proof('source')}"
        await pipe([command, ["socat", "-u", f"-b{_BUFFER}", "STDIN", to]])
        await self._received.wait()

    async def _receive(self, commands: Sequence[Command]) -> None:
        await pipe(commands)
        self._received.set()

    def _proof(self, name: str) -> str:
        files = f"cert={self._folder}/{name}.both,cafile={self._folder}/ca.pem,verify=1"
        return f"{files},openssl-min-proto-version=TLS1.3"


class _ZstdPair(Pair):
    def __init__(self, tunnel: _Tunnel, image: Image, target: Path) -> None:
        self._tunnel = tunnel
        self._image = image
        self._target = target

    async def arm(self) -> None:
        await self._tunnel.arm(["zstd", "-d", "-q", "-f", "-o", self._target])

    async def seed(self, meter: Meter) -> None:
        del meter
        await self._tunnel.send(["zstd", "-1", "-q", "-c", self._image.path])
        await sync_file(self._target)

    async def check(self) -> None:
        await same(self._image.path, self._target)


class Zstd(Contender):
    """A compressed copy through TLS."""

    name = "zstd -1, mTLS"
    detail = "zstd -1 | socat, TLS 1.3 with certificates | zstd -d"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        assert not cycles
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            async with flat_nursery() as nursery:
                yield _ZstdPair(_Tunnel(lab, nursery), image, Path(folder) / "target.raw")


class _BtrfsPair(Pair):
    def __init__(self, tunnel: _Tunnel, source: Path, target: Path) -> None:
        self._tunnel = tunnel
        self._source = source
        self._target = target
        self._number = 0

    async def arm(self) -> None:
        await self._tunnel.arm(["btrfs", "receive", "-q", "-e", self._target])

    async def seed(self, meter: Meter) -> None:
        await self._take_over([])
        del meter

    async def check(self) -> None:
        name = f"point-{self._number}"
        await same(self._source / name / "disk.raw", self._target / name / "disk.raw")

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        disk = self._source / "vm" / "disk.raw"
        await trio.to_thread.run_sync(change, disk, offsets, pieces)

    async def cycle(self, meter: Meter) -> None:
        del meter
        await self._take_over(["-p", self._source / f"point-{self._number}"])

    async def settle(self) -> None:
        """The parent snapshots have been replaced."""
        for side in (self._source, self._target):
            old = side / f"point-{self._number - 1}"
            if old.exists():
                await run(["btrfs", "-q", "subvolume", "delete", old])

    async def _take_over(self, parent: Sequence[str | Path]) -> None:
        new = self._source / f"point-{self._number + 1}"
        await run(["btrfs", "-q", "subvolume", "snapshot", "-r", self._source / "vm", new])
        await self._tunnel.send(["btrfs", "-q", "send", "--proto", "2", *parent, new])
        await run(["sync", "-f", self._target])
        self._number += 1


class Btrfs(Contender):
    """A snapshot of a subvolume that holds the image, between two file systems on loop devices."""

    name = "btrfs send, mTLS"
    detail = "btrfs send --proto 2 | socat, TLS 1.3 with certificates | btrfs receive, on loop devices with direct I/O"

    def __init__(self) -> None:
        self._source: Path | None = None

    @asynccontextmanager
    async def prepared(self, lab: Lab, image: Image) -> AsyncIterator[None]:
        """The source's file system, with the image in it."""
        async with self._filled(lab.folder, image) as source:
            self._source = source
            yield
        self._source = None

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
            async with AsyncExitStack() as stack:
                enter = stack.enter_async_context
                if cycles or self._source is None:
                    source = await enter(self._filled(Path(folder), image))
                else:
                    source = self._source
                target = await enter(mounted(Path(folder), "target", image.size + _BTRFS_MORE))
                nursery = await enter(flat_nursery())
                yield _BtrfsPair(_Tunnel(lab, nursery), source, target)
                for point in source.glob("point-*"):
                    await run(["btrfs", "-q", "subvolume", "delete", "-C", point])

    @asynccontextmanager
    async def _filled(self, folder: Path, image: Image) -> AsyncIterator[Path]:
        async with mounted(folder, "source", image.size + _BTRFS_MORE) as source:
            await run(["btrfs", "-q", "subvolume", "create", source / "vm"])
            place = source / "vm" / "disk.raw"
            await run(["cp", "--sparse=auto", "--reflink=never", image.path, place])
            await run(["sync", "-f", source])
            yield source


@asynccontextmanager
async def mounted(folder: Path, name: str, size: int) -> AsyncIterator[Path]:
    """A new btrfs in a file on a loop device. Needs root."""
    file, place = folder / f"{name}.btrfs", folder / name
    with file.open("wb") as opened:
        opened.truncate(size)
    await run(["mkfs.btrfs", "-q", file])
    place.mkdir()
    device = await output(["losetup", "--find", "--show", "--direct-io=on", file])
    try:
        await run(["mount", "-t", "btrfs", device, place])
        try:
            yield place
        finally:
            with trio.CancelScope(shield=True):
                await run(["umount", place])
    finally:
        with trio.CancelScope(shield=True):
            await run(["losetup", "--detach", device])
            file.unlink()
            place.rmdir()


class _RsyncPair(Pair):
    def __init__(self, source: Path, target: Path, url: str) -> None:
        self._source = source
        self._target = target
        self._url = url

    async def seed(self, meter: Meter) -> None:
        del meter
        await run(["rsync", "-aI", "--inplace", self._source, self._url])
        await sync_file(self._target)

    async def check(self) -> None:
        await same(self._source, self._target)

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        await trio.to_thread.run_sync(change, self._source, offsets, pieces)

    async def warm(self) -> None:
        """It reads all of both sides."""
        await trio.to_thread.run_sync(warm, self._source, self._target)

    async def cycle(self, meter: Meter) -> None:
        await self.seed(meter)


class Rsync(Contender):
    """rsync's daemon, spoken to through stunnel."""

    name = "rsync, TLS-PSK"
    detail = "rsync -aI --inplace to its daemon, through stunnel with TLS-PSK on both sides"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            folder, source = Path(name), image.path
            if cycles:
                source = folder / "source.raw"
                await run(["cp", "--sparse=always", image.path, source])
            (folder / "target").mkdir()
            entrance, between, inside = free_port(), free_port(), free_port()
            rsyncd = ["use chroot = no", f"port = {inside}", "address = 127.0.0.1", "[vm]"]
            rsyncd += [f"path = {folder}/target", "read only = no", "uid = 0", "gid = 0"]
            server = [f"accept = 127.0.0.1:{between}", f"connect = 127.0.0.1:{inside}"]
            client = [f"accept = 127.0.0.1:{entrance}", f"connect = 127.0.0.1:{between}"]
            client.append("client = yes")
            secrets = f"PSKsecrets = {lab.psk}/keys.psk"
            _write(folder / "rsyncd.conf", rsyncd)
            for side, lines in (("server", server), ("client", client)):
                head = ["foreground = yes", "pid =", "debug = 3", f"[{side}]", "ciphers = PSK"]
                _write(folder / f"{side}.conf", [*head, secrets, *lines])
            daemons: list[tuple[Command, int]] = [
                (["rsync", "--daemon", "--no-detach", f"--config={folder}/rsyncd.conf"], inside),
                (["stunnel", folder / "server.conf"], between),
                (["stunnel", folder / "client.conf"], entrance),
            ]
            async with AsyncExitStack() as stack:
                for command, port in daemons:
                    log = folder / f"{port}.log"
                    await stack.enter_async_context(daemon(command, log, port=port))
                target = folder / "target" / source.name
                yield _RsyncPair(source, target, f"rsync://127.0.0.1:{entrance}/vm/")


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


__all__ = ["Btrfs", "Rsync", "Zstd", "mounted"]
