# SPDX-License-Identifier: AGPL-3.0-or-later
"""A real ``tgtd`` with disks that are files, for tests: no root, a loopback address and a port of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from replicator.iscsi import Chap, IscsiSettings, Portal
from tests.limits import HANG_S

INITIATOR: Final = "iqn.2026-01.example:worker-1"
TARGET: Final = "iqn.2010-06.com.nutanix:vg-a-tgt0"
_CONTROL: Final = "7"


def require(program: str) -> str:
    """Path of a program; the test fails, and says what to do, if it is missing."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert found is not None, f"{program} is missing: run scripts/setup"
    return found


def settings(
    *,
    chap: Chap | None = None,
    depth: int = 16,
    read_size: int = 256 << 10,
    task_timeout_s: float = HANG_S,
) -> IscsiSettings:
    """Settings of the lab's initiator; nothing times out unless the test is about that."""
    return IscsiSettings(
        INITIATOR,
        chap,
        depth=depth,
        read_size=read_size,
        connect_timeout_s=HANG_S,
        login_timeout_s=HANG_S,
        task_timeout_s=task_timeout_s,
    )


def free_portal() -> Portal:
    """A loopback address that nobody else has by chance, and a port that is free on it."""
    a, b, c = secrets.token_bytes(3)
    host = f"127.{a}.{b}.{c % 254 + 1}"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return Portal(host, probe.getsockname()[1])


class TargetDaemon:
    """One tgtd. ``root`` is a short path: it holds the control socket, and the disks' files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.portal = free_portal()
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(root / "ctl")}
        self._process: subprocess.Popen[bytes] | None = None
        self._log = root / "log"

    async def start(self) -> None:
        """Start it and wait until it takes commands."""
        portal = f"portal={self.portal.host}:{self.portal.port}"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - starts at once; stop() waits in a thread
                [require("tgtd"), "-f", "-C", _CONTROL, "--iscsi", portal],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        with trio.fail_after(HANG_S):
            while not await self._is_up():
                assert self._process.poll() is None, self._log.read_text("utf-8", "replace")
                await trio.sleep(0.005)

    async def _is_up(self) -> bool:
        command = [require("tgtadm"), "-C", _CONTROL, "--lld", "iscsi", "--mode", "sys", "--op"]
        done = await trio.run_process(
            [*command, "show"],
            env=self._environment,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
        )
        return done.returncode == 0

    async def admin(self, mode: str, operation: str, *arguments: str) -> str:
        """One call of tgtadm; what it printed."""
        command = [require("tgtadm"), "-C", _CONTROL, "--lld", "iscsi", "--mode", mode]
        done = await trio.run_process(
            [*command, "--op", operation, *arguments],
            env=self._environment,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
        )
        assert done.returncode == 0, (mode, operation, done.stderr)
        return done.stdout.decode()

    async def add_target(self, tid: int = 1, name: str = TARGET, allow: str = INITIATOR) -> None:
        """A target that ``allow`` (an initiator's name, or ALL) may use."""
        await self.admin("target", "new", f"--tid={tid}", f"--targetname={name}")
        option = "--initiator-address" if allow == "ALL" else "--initiator-name"
        await self.admin("target", "bind", f"--tid={tid}", f"{option}={allow}")

    async def add_disk(self, file: Path, tid: int = 1, lun: int = 1) -> None:
        """A disk of a target, served from ``file``."""
        where = (f"--tid={tid}", f"--lun={lun}")
        await self.admin("logicalunit", "new", *where, f"--backing-store={file}", "--bstype=rdwr")
        parameters = f"thin_provisioning=1,vendor_id=NUTANIX,product_id=VDISK,scsi_sn=SN{tid}-{lun}"
        await self.admin("logicalunit", "update", *where, f"--params={parameters}")

    async def add_account(
        self, user: str, secret: str, tid: int = 1, *, outgoing: bool = False
    ) -> None:
        """CHAP of a target: who comes in, or (outgoing) as whom it proves itself."""
        await self.admin("account", "new", f"--user={user}", f"--password={secret}")
        more = ["--outgoing"] if outgoing else []
        await self.admin("account", "bind", f"--tid={tid}", f"--user={user}", *more)

    async def set_target(self, tid: int, name: str, value: str) -> None:
        """A parameter of a target."""
        await self.admin("target", "update", f"--tid={tid}", f"--name={name}", f"--value={value}")

    async def redirect(self, tid: int, to: Portal) -> None:
        """Logins at a target are sent on."""
        await self.set_target(tid, "RedirectAddress", to.host)
        await self.set_target(tid, "RedirectPort", str(to.port))
        await self.set_target(tid, "RedirectReason", "Temporary")

    def signal(self, how: signal.Signals) -> None:
        """SIGSTOP: it hangs; SIGCONT; SIGKILL: it dies."""
        assert self._process is not None
        self._process.send_signal(how)

    async def stop(self) -> None:
        """Kill it, hung or not. Can be repeated."""
        if self._process is not None:
            self._process.kill()
            await trio.to_thread.run_sync(self._process.wait)
            self._process = None


@asynccontextmanager
async def target_daemon() -> AsyncIterator[TargetDaemon]:
    """A started daemon in a directory of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ri", dir="/tmp") as root:
        daemon = TargetDaemon(Path(root))
        try:
            await daemon.start()
            yield daemon
        finally:
            with trio.CancelScope(shield=True):
                await daemon.stop()
