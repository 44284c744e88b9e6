# SPDX-License-Identifier: AGPL-3.0-or-later
"""A guest at work: QEMU as a child process, and the conversation on its serial console."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.lab.guest import READY_LINE

#: Software emulation on a machine that does other work as well.
BOOT_SECONDS_MAX = 120
COMMAND_SECONDS_MAX = 120
OUTPUT_BYTES_MAX = 1 << 20

#: /dev/kvm is never used: where it exists it may start a machine that never runs an instruction.
MACHINE = (
    *("qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "256"),
    *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"),
)


class GuestError(Exception):
    """The guest ended, said too much or did not do what it was told; holds what it last said."""


def raw_disk(path: Path) -> list[str]:
    """QEMU's arguments for a raw image as the next virtio disk of the guest."""
    return ["-drive", f"file={path},format=raw,if=virtio,cache=writeback,discard=unmap"]


class Guest:
    """The console of a running guest. One task at a time may use it."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._output = bytearray()

    async def run(self, command: str) -> str:
        """Run a shell command in the guest and return what it printed.

        Raises GuestError if its status is not 0 and trio.TooSlowError after COMMAND_SECONDS_MAX.
        Cancelling leaves the command running and the console of no further use.
        """
        with trio.fail_after(COMMAND_SECONDS_MAX):
            await self._stdin.send_all(command.encode() + b"\n")
            found = await self._read_until(rb"replctl-guest: exit (\d+)\r?\n")
        output, status = found
        if status != "0":
            raise GuestError(f"{command!r} ended with status {status}: {output.strip()}")
        return output

    async def power_off(self) -> None:
        """End the guest from inside; what it has not written out by itself is lost."""
        with trio.fail_after(COMMAND_SECONDS_MAX):
            await self._stdin.send_all(b"poweroff -f\n")
            await self._process.wait()

    async def aclose(self) -> None:
        """Close the host's ends of the console."""
        await self._stdin.aclose()
        await self._stdout.aclose()

    async def wait_ready(self) -> None:
        """Wait for the guest's first line; raises trio.TooSlowError after BOOT_SECONDS_MAX."""
        with trio.fail_after(BOOT_SECONDS_MAX):
            await self._read_until(rb"(" + READY_LINE.encode() + rb")\r?\n")

    async def _read_until(self, pattern: bytes) -> tuple[str, str]:
        """What came before the line that fits, and the part of it in brackets."""
        while (found := re.search(pattern, self._output)) is None:
            data = await self._stdout.receive_some()
            if not data or len(self._output) > OUTPUT_BYTES_MAX:
                said = self._output[-2000:].decode(errors="replace")
                raise GuestError(f"no line {pattern!r} from the guest; it said: {said}")
            self._output += data
        # Taken out first: the match looks into the buffer, which is about to change.
        before = self._output[: found.start()].decode(errors="replace").replace("\r\n", "\n")
        bracketed = bytes(found[1]).decode()
        del self._output[: found.end()]
        return before, bracketed


@asynccontextmanager
async def running_guest(arguments: Sequence[str]) -> AsyncIterator[Guest]:
    """Start QEMU with disks (or a kernel) given by ``arguments``; yields when the guest is ready.

    QEMU is killed at the end, whatever happened: a guest that must end well is powered off first.
    """
    process = await trio.lowlevel.open_process(
        [*MACHINE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    guest = Guest(process)
    try:
        await guest.wait_ready()
        yield guest
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await guest.aclose()
