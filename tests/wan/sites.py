# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl` at both ends of the line: processes with configuration files, as an operator runs them."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from tests.limits import HANG_S
from tests.wan.lab import ROOT, Wan

PORT: Final = 9848
_REPLCTL: Final = (
    sys.executable,
    "-c",
    "import sys; from replicator.cli.main import main; sys.exit(main())",
)


@dataclass(frozen=True, slots=True)
class WanSite:
    """A receiver that runs at one end, and a source that is set up at the other; see ``wan_site``."""

    line: Wan
    folder: Path

    async def push(self, command: str, *options: str) -> dict[str, Any]:
        """`replctl seed` or `replctl push` to its end: its JSON. Raises RuntimeError with its errors if it fails."""
        words = [*_REPLCTL, "--config", str(self.folder / "source.conf"), "--json", command]
        done = await trio.run_process(
            self.line.at_source(*words, *options),
            cwd=ROOT,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
        )
        with (self.folder / "source.log").open("ab") as log:
            log.write(done.stderr)
        if done.returncode:
            raise RuntimeError(
                f"replctl {command} ended with {done.returncode}: {done.stderr.decode()}"
            )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    @property
    def source_log(self) -> str:
        """What the source's commands have said."""
        return (self.folder / "source.log").read_text("utf-8")


@asynccontextmanager
async def wan_site(
    line: Wan, folder: Path, disks: Mapping[str, Path], **options: str
) -> AsyncIterator[WanSite]:
    """A receiver with its state in ``folder``/receiver, stopped in order at the end, and a source of images."""
    common = {"dr_auth_token": secrets.token_hex(32), "dr_port": str(PORT)}
    images = ",".join(f"{name}={path}" for name, path in disks.items())
    source = {"source": "image", "image_disks": images, "vm": "web"}
    for side, values in (
        ("receiver", {"dr_listen": line.receiver_address}),
        ("source", {"dr_host": line.receiver_address, **source, **options}),
    ):
        (folder / side).mkdir(mode=0o700)
        config = folder / f"{side}.conf"
        config.touch(mode=0o600)
        lines = {"state_dir": str(folder / side), **common, **values}
        config.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()), "utf-8")
    async with _receiver(line, folder):
        yield WanSite(line, folder)


@asynccontextmanager
async def _receiver(line: Wan, folder: Path) -> AsyncIterator[trio.Process]:
    """The receiver's process, from when it says that it listens."""
    words = line.at_receiver(*_REPLCTL, "--config", str(folder / "receiver.conf"), "receiver")
    with (
        (folder / "receiver.log").open("wb") as log,
        trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        await notices.bind(str(folder / "notify"))
        notify = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
        process = await trio.lowlevel.open_process(
            words, cwd=ROOT, env=notify, stdin=subprocess.DEVNULL, stderr=log
        )
        try:
            async with trio.open_nursery() as nursery:
                ready = trio.Event()
                nursery.start_soon(_listen, notices, ready)
                with trio.fail_after(HANG_S):
                    await ready.wait()
                yield process
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                process.terminate()
                with trio.move_on_after(HANG_S):
                    await process.wait()
                process.kill()
                await process.wait()


async def _listen(notices: trio.socket.SocketType, ready: trio.Event) -> None:
    """Take what the receiver tells the service manager: nobody reading would hold it up."""
    while True:
        if b"READY=1" in await notices.recv(4096):
            ready.set()


__all__ = ["PORT", "WanSite", "wan_site"]
