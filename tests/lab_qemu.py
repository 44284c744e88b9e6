# SPDX-License-Identifier: AGPL-3.0-or-later
"""A ``qemu-storage-daemon`` with disks, for tests: change tracking and snapshots without a guest,
up in 40 ms.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from replicator.nbd.client import NbdClient, open_nbd
from replicator.sources.qemu_inventory import take_inventory
from replicator.sources.qmp import QmpClient, QmpGoneError, open_qmp
from tests.limits import HANG_S


def require(program: str) -> str:
    """Path of a program; the test fails, and says what to do, if it is missing."""
    found = shutil.which(program)
    assert found is not None, f"{program} is missing: run scripts/setup"
    return found


class StorageDaemon:
    """One daemon and its disks below ``root``, a short path (Unix sockets). ``size`` is each
    disk's, in bytes.
    """

    def __init__(self, root: Path, disks: Mapping[str, int], *, image_format: str = "raw") -> None:
        self.root = root
        self.qmp_socket = root / "qmp"
        self.nbd_socket = root / "nbd"
        self.disks = dict(disks)
        self.format = image_format
        self.limit_file_size = False
        self._process: subprocess.Popen[bytes] | None = None
        self._writers: dict[str, NbdClient] = {}
        self._stack = AsyncExitStack()

    def image(self, disk: str) -> Path:
        """Where a disk's image lies."""
        return self.root / f"{disk}.{self.format}"

    async def start(self, *, nbd_server: bool = True) -> None:
        """Make missing images, start the daemon and connect a writer to each disk.

        Without ``nbd_server`` the daemon has none: disks are exported as vhost-user, and there is
        no writer.
        """
        command = [require("qemu-storage-daemon")]
        command += ["--chardev", f"socket,path={self.qmp_socket},server=on,wait=off,id=qmp"]
        command += ["--monitor", "chardev=qmp"]
        if nbd_server:
            command += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket}"]
        for disk, size in self.disks.items():
            if not self.image(disk).exists():
                make = [require("qemu-img"), "create", "-q", "-f", self.format]
                await trio.run_process([*make, str(self.image(disk)), str(size)])
            file = f"driver=file,filename={self.image(disk)},node-name={disk}-file,discard=unmap"
            node = f"driver={self.format},file={disk}-file,node-name={disk},discard=unmap"
            command += ["--blockdev", file, "--blockdev", node]
            export = f"id=w-{disk},node-name={disk},writable=on"
            if nbd_server:
                command += ["--export", f"type=nbd,name={disk},{export}"]
            else:
                vhost = f"addr.type=unix,addr.path={self.root}/{disk}.vhost"
                command += ["--export", f"type=vhost-user-blk,{vhost},{export}"]
        self.qmp_socket.unlink(missing_ok=True)
        # A write beyond a file size limit is to fail, not to kill the daemon: Python ignores
        # SIGXFSZ.
        self._process = subprocess.Popen(  # noqa: ASYNC220 - starts at once; stop() waits in a thread
            command, restore_signals=False
        )
        await self._wait_until_up()
        if nbd_server:
            for disk in self.disks:
                self._writers[disk] = await self._stack.enter_async_context(
                    open_nbd(self.nbd_socket, disk)
                )

    async def _wait_until_up(self) -> None:
        """A command is answered only after the whole command line took effect."""
        assert self._process is not None
        with trio.fail_after(HANG_S):
            while True:
                assert self._process.poll() is None, "qemu-storage-daemon ended at its start"
                try:
                    async with self.qmp() as qmp:
                        await qmp.execute("query-block-exports")
                except QmpGoneError:
                    await trio.sleep(0.005)
                else:
                    return

    def writer(self, disk: str) -> NbdClient:
        """What plays the guest."""
        return self._writers[disk]

    @asynccontextmanager
    async def qmp(self) -> AsyncIterator[QmpClient]:
        """A QMP connection."""
        async with open_qmp(self.qmp_socket) as qmp:
            yield qmp

    async def resize(self, disk: str, size: int) -> None:
        """Grow a disk, which cannot be done while it is exported; its writer is connected anew."""
        await self._writers[disk].aclose()
        async with self.qmp() as qmp:
            await qmp.execute("block-export-del", id=f"w-{disk}", mode="hard")
            await qmp.wait_event(lambda e: e["event"] == "BLOCK_EXPORT_DELETED", HANG_S)
            await qmp.execute("block_resize", node_name=disk, size=size)
            await qmp.execute(
                "block-export-add",
                type="nbd",
                id=f"w-{disk}",
                name=disk,
                node_name=disk,
                writable=True,
            )
        self.disks[disk] = size
        self._writers[disk] = await self._stack.enter_async_context(open_nbd(self.nbd_socket, disk))

    async def leftovers(self) -> list[str]:
        """Everything of ours in the daemon: jobs, exports, nodes, bitmaps."""
        async with self.qmp() as qmp:
            inventory = await take_inventory(qmp)
        found = [*inventory.jobs, *inventory.exports, *inventory.nodes]
        found += [bitmap for node in inventory.nodes.values() for bitmap in node.bitmaps]
        return sorted(name for name in found if name.startswith("replctl-"))

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon: SIGTERM in order, SIGKILL as a crash. Can be repeated."""
        await self._stack.aclose()
        self._writers.clear()
        if self._process is not None:
            self._process.send_signal(how)
            await trio.to_thread.run_sync(self._process.wait)
            self._process = None


@asynccontextmanager
async def storage_daemon(
    disks: Mapping[str, int], *, image_format: str = "raw", nbd_server: bool = True
) -> AsyncIterator[StorageDaemon]:
    """A started daemon in a directory of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rq", dir="/tmp") as root:
        daemon = StorageDaemon(Path(root), disks, image_format=image_format)
        try:
            await daemon.start(nbd_server=nbd_server)
            yield daemon
        finally:
            with trio.CancelScope(shield=True):
                await daemon.stop(signal.SIGKILL)
