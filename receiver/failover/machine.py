# SPDX-License-Identifier: AGPL-3.0-or-later
"""A clone's virtual machine: QEMU under software emulation, without a network that leads anywhere.

Whether /dev/kvm opens says nothing about whether a guest runs on it, so emulation is used, which works everywhere.
QEMU is a child that dies with this process, whatever ends it; it knows nothing of points and events.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from receiver.failover.console import FirstLine, clean_line
from replicator.durable import DurableFile
from replicator.errors import SourceError
from replicator.sources.qmp import open_qmp

_logger = logging.getLogger(__name__)

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 512
#: How much of the console is kept in its file; a guest that goes on talking does not fill the disk.
CONSOLE_BYTES_MAX = 4 << 20
#: How long QEMU may take to end after it was asked to, before it is killed.
QUIT_S = 5.0
_STDERR_KEPT = 8 << 10
_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of the clone: its name and its qcow2 overlay."""

    disk: str
    overlay: Path


@dataclass(frozen=True, slots=True)
class BootResult:
    """How far the guest came: its first console line and the seconds to it, or why there is none."""

    console: str | None = None
    console_s: float | None = None
    reason: str | None = None

    @property
    def booted(self) -> bool:
        """Whether the guest spoke."""
        return self.console is not None


def missing_programs() -> str | None:
    """Why no machine can be started here, naming the package; None if one can."""
    for program, package in ((QEMU, "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} is not installed: install the package {package}"
    return None


def command_line(drives: Sequence[Drive], name: str, qmp: Path) -> list[str]:
    """QEMU's command line: console on standard output, boot order as the disks stand, one NIC on a hub of its own."""
    # setpriv has the kernel kill QEMU with us; a function run between fork and exec would not be safe here.
    words = ["setpriv", "--pdeathsig", "KILL", "--", QEMU, "-name", _escaped(name), "-accel", "tcg"]
    words += [
        "-M",
        "q35",
        "-nodefaults",
        "-no-user-config",
        "-m",
        str(MEMORY_MIB),
        "-display",
        "none",
    ]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=qmp,path={_escaped(str(qmp))},server=on,wait=off"]
    words += ["-mon", "chardev=qmp,mode=control"]
    # A card that the guest can configure, on a wire that ends in nothing; no ROM: nothing to boot from there.
    words += [
        "-netdev",
        "hubport,id=net0,hubid=0",
        "-device",
        "virtio-net-pci,netdev=net0,romfile=",
    ]
    for index, drive in enumerate(drives):
        node = {
            "driver": "qcow2",
            "node-name": f"drive{index}",
            "discard": "unmap",
            # The overlay lives as long as the test: a flush that waits for the host's disk gains nothing.
            "cache": {"no-flush": True},
            "file": {"driver": "file", "filename": str(drive.overlay), "discard": "unmap"},
        }
        words += ["-blockdev", json.dumps(node)]
        device = f"virtio-blk-pci,drive=drive{index},bootindex={index + 1},serial={drive.disk[:20]}"
        words += ["-device", device]
    return words


def _escaped(text: str) -> str:
    return text.replace(",", ",,")


class Machine:
    """One QEMU process. ``run`` it as a task; cancelling that task ends QEMU."""

    def __init__(self, command: Sequence[str], qmp: Path, console_file: Path) -> None:
        self._command = list(command)
        self._qmp = qmp
        self.console_file = console_file
        self._first = FirstLine()
        self._console_s: float | None = None
        self._started_at = 0.0
        self._stderr = bytearray()
        self._ended: str | None = None
        self._news = trio.Event()

    async def run(self) -> None:
        """Start QEMU and look after it until it ends or the task is cancelled. Why it did not start is kept."""
        try:
            console = await trio.to_thread.run_sync(_open_console, self.console_file)
            try:
                await self._run(_Console(self, console))
            finally:
                console.close()
        except OSError as error:
            self._end(f"QEMU cannot be started: {error}")
        finally:
            self._end("the clone was stopped")

    async def _run(self, console: _Console) -> None:
        process, stdout, stderr = self._start()
        try:
            async with trio.open_nursery() as readers:
                readers.start_soon(_read_pipe, stdout, console.take)
                readers.start_soon(_read_pipe, stderr, self._take_stderr)
                await _wait_exit(process)
            self._end(self._reason(process.returncode))
        finally:
            with trio.CancelScope(shield=True):
                await self._stop(process)

    def _start(self) -> tuple[subprocess.Popen[bytes], int, int]:
        # In this thread on purpose: "die with the parent" means the thread that started it, and a worker thread ends
        # when it has been idle for a while.
        self._started_at = trio.current_time()
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=self.console_file.parent,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            return process, os.dup(process.stdout.fileno()), os.dup(process.stderr.fileno())

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask QEMU to end, and kill it if it does not. Shielded by the caller, bounded by QUIT_S."""
        if process.returncode is not None:
            return
        with trio.move_on_after(QUIT_S):
            await quit_qemu(self._qmp)
            await _wait_exit(process)
        if process.returncode is None:
            process.kill()
            await _wait_exit(process)

    def _end(self, reason: str) -> None:
        if self._ended is None:
            self._ended = reason
        self._news.set()

    def _reason(self, status: int | None) -> str:
        lines = [clean_line(line) for line in bytes(self._stderr).splitlines()]
        said = [line for line in lines if line]
        return f"QEMU ended with status {status}" + (f": {said[-1]}" if said else "")

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended, or could not be started."""
        return self._ended is not None

    async def _take_stderr(self, data: bytes) -> None:
        self._stderr += data
        del self._stderr[:-_STDERR_KEPT]

    def said(self, data: bytes) -> None:
        """The guest printed something."""
        if self._console_s is None and self._first.feed(data):
            self._console_s = trio.current_time() - self._started_at
            self._news.set()

    async def wait_console(self, limit_s: float) -> BootResult:
        """Wait for the guest's first console line, at most ``limit_s`` seconds; QEMU goes on running either way."""
        with trio.move_on_after(limit_s):
            await self._news.wait()
        line = self._first.line if self._console_s is not None else self._first.give_up()
        if line is not None:
            seconds = self._console_s
            if seconds is None:
                seconds = trio.current_time() - self._started_at
            return BootResult(line, round(seconds, 3))
        reason = self._ended or f"nothing on its serial console within {limit_s:g} s"
        return BootResult(reason=reason)


class _Console:
    """Keeps the beginning of the console in a file, and looks for the first line."""

    def __init__(self, machine: Machine, file: DurableFile) -> None:
        self._machine = machine
        self._file = file
        self._size = 0
        self._full = False

    async def take(self, data: bytes) -> None:
        """Note more output; a file that cannot be written does not stop the guest."""
        if not self._full:
            piece = data[: CONSOLE_BYTES_MAX - self._size]
            self._full = len(piece) < len(data)
            try:
                await trio.to_thread.run_sync(self._file.write_at, piece, self._size)
            except OSError as error:
                _logger.error("%s: %s", self._file.path, error.strerror)
                self._full = True
            self._size += len(piece)
        self._machine.said(data)


def _open_console(path: Path) -> DurableFile:
    file = DurableFile(path, create=True)
    file.truncate(0)
    return file


async def _read_pipe(fd: int, take: Callable[[bytes], Awaitable[None]]) -> None:
    async with trio.lowlevel.FdStream(fd) as stream:
        async for data in stream:
            await take(bytes(data))


async def _wait_exit(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended, without a thread; it is reaped then."""
    while process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)


async def quit_qemu(qmp: Path) -> bool:
    """Ask the QEMU behind a QMP socket to end; False if there is none or it does not listen."""
    try:
        async with open_qmp(qmp, timeout_s=QUIT_S) as client:
            await client.execute("quit")
    except SourceError as error:
        _logger.debug("%s: %s", qmp, error)
        return False
    return True
