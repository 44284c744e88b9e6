# SPDX-License-Identifier: AGPL-3.0-or-later
"""QEMU as a peer: `qemu-img convert` out of an NBD export, and the backup job with a dirty bitmap into one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from bench.contender import Contender, Lab, Pair, free_port
from bench.images import BLOCK, Image
from bench.meter import Meter
from bench.programs import Command, ProgramError, daemon, run, same, sync_file
from tests.lab_qemu import StorageDaemon, storage_daemon

_DISK: Final = "disk-0"
_JOB_S: Final = 900


class _ConvertPair(Pair):
    def __init__(self, source: Path, target: Path, command: Command) -> None:
        self._source = source
        self._target = target
        self._command = command

    async def seed(self, meter: Meter) -> None:
        del meter
        await run(self._command)
        await sync_file(self._target)

    async def check(self) -> None:
        await same(self._source, self._target)


class Convert(Contender):
    """`qemu-img convert` from `qemu-nbd`, written with direct I/O, which is its fastest way here."""

    def __init__(self, *, tls: bool) -> None:
        self._tls = tls
        self.name = "qemu-img, TLS-PSK" if tls else "qemu-img, plain"
        over = "TLS-PSK over a Unix socket" if tls else "plain over TCP"
        self.detail = f"qemu-img convert -t none from qemu-nbd, {over}"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        assert not cycles
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            folder = Path(name)
            target = folder / "target.raw"
            server: Command = ["qemu-nbd", "--read-only", "--persistent", "--format=raw"]
            convert: Command = ["qemu-img", "convert", "-O", "raw", "-t", "none"]
            if self._tls:
                at = folder / "nbd"
                server = [*server, "--object", _psk(lab, "server"), "--tls-creds=tls"]
                server = [*server, f"--socket={at}", image.path]
                source = f"driver=nbd,path={at},tls-creds=tls"
                convert = [*convert, "--object", _psk(lab, "client"), "--image-opts", source]
                up = daemon(server, folder / "nbd.log", socket=at)
            else:
                port = free_port()
                server = [*server, "--bind=127.0.0.1", f"--port={port}", image.path]
                convert = [*convert, "-f", "raw", f"nbd://127.0.0.1:{port}"]
                up = daemon(server, folder / "nbd.log", port=port)
            async with up:
                yield _ConvertPair(image.path, target, [*convert, target])


class _BackupPair(Pair):
    def __init__(self, source: StorageDaemon, target: Path) -> None:
        self._source = source
        self._target = target

    async def seed(self, meter: Meter) -> None:
        """All of it, and from the same instant on a bitmap of what changes."""
        del meter
        bitmap = {"node": _DISK, "name": "changes", "granularity": BLOCK}
        backup = {**_job("full"), "x-perf": {"max-chunk": 1 << 20}}
        actions = [
            {"type": "block-dirty-bitmap-add", "data": bitmap},
            {"type": "blockdev-backup", "data": backup},
        ]
        await self._backup("transaction", actions=actions)

    async def check(self) -> None:
        await same(self._source.image(_DISK), self._target)

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        writer = self._source.writer(_DISK)
        for offset, piece in zip(offsets, pieces, strict=True):
            await writer.write(offset, piece)
        await sync_file(self._source.image(_DISK))

    async def cycle(self, meter: Meter) -> None:
        del meter
        job = {**_job("incremental"), "bitmap": "changes"}
        await self._backup("blockdev-backup", **job)

    async def _backup(self, command: str, **arguments: Any) -> None:
        async with self._source.qmp() as qmp:
            await qmp.execute(command, **arguments)
            done = await qmp.wait_event(
                lambda e: e["event"] == "BLOCK_JOB_COMPLETED" and e["data"]["device"] == "backup",
                _JOB_S,
            )
        if done is None or "error" in done["data"]:
            raise ProgramError(f"the backup job did not end well: {done}")
        await sync_file(self._target)


def _job(sync: str) -> dict[str, Any]:
    return {"job-id": "backup", "device": _DISK, "target": "target", "sync": sync}


class Backup(Contender):
    """QEMU's backup job into an NBD export of the other side, with a bitmap of what changed."""

    name = "qemu backup, TLS-PSK"
    detail = "blockdev-backup (sync=full, then incremental) to qemu-nbd, cache=none, TLS-PSK over a Unix socket"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``. The image is written to through the source's daemon only."""
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            folder = Path(name)
            target, at = folder / "target.raw", folder / "nbd"
            with target.open("wb") as file:
                file.truncate(image.size)
            server: Command = ["qemu-nbd", "--persistent", "--format=raw", "--cache=none"]
            server = [*server, "--discard=unmap", "--detect-zeroes=unmap"]
            server = [*server, "--object", _psk(lab, "server"), "--tls-creds=tls"]
            async with (
                storage_daemon({}) as source,
                daemon([*server, f"--socket={at}", target], folder / "nbd.log", socket=at),
            ):
                await serve_disk(source, image, copy=cycles)
                await self._connect(source, lab, at)
                yield _BackupPair(source, target)

    async def _connect(self, source: StorageDaemon, lab: Lab, at: Path) -> None:
        where = {"type": "unix", "path": str(at)}
        options = {"driver": "nbd", "server": where, "tls-creds": "tls", "node-name": "target"}
        async with source.qmp() as qmp:
            await qmp.execute(
                "object-add",
                **{"qom-type": "tls-creds-psk", "id": "tls", "endpoint": "client"},
                dir=str(lab.psk),
                username="bench",
            )
            await qmp.execute("blockdev-add", **options)


async def serve_disk(daemon: StorageDaemon, image: Image, *, copy: bool) -> None:
    """Make the image the disk ``disk-0`` of a daemon that has none: the image itself, or a copy."""
    await daemon.stop()
    daemon.disks[_DISK] = image.size
    place = daemon.image(_DISK)
    if copy:
        await run(["cp", "--sparse=always", image.path, place])
    else:
        await trio.to_thread.run_sync(place.symlink_to, image.path)
    await daemon.start()


def _psk(lab: Lab, endpoint: str) -> str:
    user = ",username=bench" if endpoint == "client" else ""
    return f"tls-creds-psk,id=tls,dir={lab.psk},endpoint={endpoint}{user}"


def missing() -> list[str]:
    """Programs that this needs and that are not there."""
    needed = ("qemu-img", "qemu-nbd", "qemu-storage-daemon", "psktool")
    return [each for each in needed if shutil.which(each) is None]


__all__ = ["Backup", "Convert", "missing", "serve_disk"]
