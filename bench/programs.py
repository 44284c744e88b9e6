# SPDX-License-Identifier: AGPL-3.0-or-later
"""Running the programs that are measured: to their end, in a pipe, or as daemons for as long as a block lasts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from replicator.nursery import flat_nursery

_START_S: Final = 30
_STOP_S: Final = 30
_POLL_S: Final = 0.005
_LISTENS: Final = "0A"

Command = Sequence[str | Path]


class ProgramError(RuntimeError):
    """A program that is measured failed, or did not start."""


async def run(command: Command, env: Mapping[str, str] | None = None) -> None:
    """To its end; raises ProgramError with what it said."""
    await pipe([command], env=env)


async def pipe(
    commands: Sequence[Command], *, env: Mapping[str, str] | None = None, source: Path | None = None
) -> None:
    """Several programs, each reading what the one before it writes, to their ends; raises ProgramError.

    ``source``: what the first one reads.
    """
    async with AsyncExitStack() as stack:
        started, reads = [], os.open(source or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for number, command in enumerate(commands):
            if number < len(commands) - 1:
                reads_next, writes = os.pipe()
            else:
                reads_next, writes = -1, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                process = await trio.lowlevel.open_process(
                    [str(each) for each in command],
                    stdin=reads,
                    stdout=writes,
                    stderr=subprocess.PIPE,
                    env={**os.environ, **(env or {})},
                )
            finally:
                os.close(reads)
                os.close(writes)
                reads = reads_next
            stack.push_async_callback(_stop_shielded, process)
            started.append((command, process))
        async with flat_nursery() as nursery:
            for command, process in started:
                nursery.start_soon(_ended, command, process)


async def output(command: Command) -> str:
    """What a program writes, without blanks at its ends; raises ProgramError."""
    done = await trio.run_process(
        [str(each) for each in command], capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode:
        raise ProgramError(f"{command[0]}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8").strip()


async def _ended(command: Command, process: trio.Process) -> None:
    assert process.stderr is not None
    said = b"".join([piece async for piece in process.stderr])
    if await process.wait():
        text = said.decode("utf-8", "replace").strip()
        raise ProgramError(f"{command[0]} ended with {process.returncode}: {text[-2000:]}")


@asynccontextmanager
async def daemon(
    command: Command, log: Path, *, port: int | None = None, socket: Path | None = None
) -> AsyncIterator[trio.Process]:
    """A program that runs for as long as the block, from when it listens at ``port`` (TCP, loopback) or ``socket``.

    What it says goes to ``log``, and into the ProgramError if it does not start.
    """
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(
            [str(each) for each in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        with trio.move_on_after(_START_S) as limit:
            while process.poll() is None and not _is_up(port, socket):  # noqa: ASYNC110 - another process's
                await trio.sleep(_POLL_S)
        if process.returncode is not None or limit.cancelled_caught:
            text = (await trio.Path(log).read_text("utf-8", "replace")).strip()
            raise ProgramError(f"{command[0]} does not listen: {text[-2000:]}")
        yield process
    finally:
        await _stop_shielded(process)


def _is_up(port: int | None, socket: Path | None) -> bool:
    if socket is not None:
        return socket.exists()
    if port is None:
        return True
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text("ascii").splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


async def _stop_shielded(process: trio.Process) -> None:
    """End it if it runs: in order if it can, and in any case."""
    if process.poll() is not None:
        return
    with trio.CancelScope(shield=True):
        process.send_signal(signal.SIGTERM)
        with trio.move_on_after(_STOP_S):
            await process.wait()
            return
        process.kill()
        await process.wait()


async def listening(port: int) -> None:
    """Wait until somebody listens at a TCP port; raises ProgramError."""
    with trio.move_on_after(_START_S):
        while not _is_up(port, None):  # noqa: ASYNC110 - another process's
            await trio.sleep(_POLL_S)
        return
    raise ProgramError(f"nobody listens at port {port}")


async def sync_file(path: Path) -> None:
    """Make a file durable, in a process of its own, so that its processor time counts."""
    await run(["sync", path])


async def same(one: Path, other: Path) -> None:
    """Raises ProgramError if two files differ."""
    await run(["cmp", one, other])


def warm(*paths: Path) -> None:
    """Read files, so that what is measured is not the disk's reads."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def change(path: Path, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
    """Overwrite places of a file, durable."""
    with path.open("r+b") as file:
        for offset, piece in zip(offsets, pieces, strict=True):
            file.seek(offset)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


__all__ = [
    "ProgramError",
    "change",
    "daemon",
    "listening",
    "pipe",
    "run",
    "same",
    "sync_file",
    "warm",
]
