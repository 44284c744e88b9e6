# SPDX-License-Identifier: AGPL-3.0-or-later
"""Running a `replctl` command in a process of its own: what it logs is logged here, its answer is returned.

The configuration, plugin string included, is handed over in memory that only this user can read: no secret is on a command
line or on a disk. The process does not outlive this one.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from replicator.errors import ReplicatorError
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

_CODE: Final = "import sys; from replicator.cli.main import main; sys.exit(main())"
_ANSWER_MAX: Final = 8 << 20
_LINE_MAX: Final = 16 << 10
#: After SIGINT the command puts things in order; after SIGTERM it has had its time.
_INTERRUPT_S: Final = 60.0
_TERMINATE_S: Final = 10.0
#: A line of `replctl`'s log (replicator/cli/logs.py).
_LOGGED: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) +(.*)")
_UP: Final = "replicator backend up "


async def run_command(words: Sequence[str], config: str) -> bytes:
    """What `replctl --json` with these words answers. Raises ReplicatorError with its own last words where it fails.

    Cancelled, it gets SIGINT and time to put things in order; then SIGTERM; then it is killed.
    """
    last, answer = [""], bytearray()
    with _in_memory(config) as fd, _started(words, fd) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out = trio.lowlevel.FdStream(os.dup(process.stdout.fileno()))
        err = trio.lowlevel.FdStream(os.dup(process.stderr.fileno()))
        async with out, err:
            try:
                async with flat_nursery() as nursery:
                    nursery.start_soon(_collect, out, answer)
                    nursery.start_soon(_forward, err, last)
                    await _wait(process)
            finally:
                await _end(process, err)
    if process.returncode:
        raise ReplicatorError(last[0] or f"{' '.join(words)} failed ({process.returncode})")
    return bytes(answer)


@contextmanager
def _started(words: Sequence[str], fd: int) -> Iterator[subprocess.Popen[bytes]]:
    setpriv = shutil.which("setpriv")
    # The command ends with the thread that starts it: so this is the main thread, and it does not wait for anything.
    wrapper = [setpriv, "--pdeathsig", "INT", "--"] if setpriv else []
    program = [sys.executable, "-c", _CODE, "--config", f"/proc/self/fd/{fd}", "--json", *words]
    with subprocess.Popen(
        [*wrapper, *program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[fd],
    ) as process:
        yield process


async def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has ended."""
    await trio.lowlevel.checkpoint()
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        process.wait()


async def _end(process: subprocess.Popen[bytes], err: trio.abc.ReceiveStream) -> None:
    """End what still runs, gently first. What it says of that is logged."""
    if process.poll() is not None:
        return
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_forward, err, [""])
            await _signal(process)
            nursery.cancel_scope.cancel()


async def _signal(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in (
        (signal.SIGINT, _INTERRUPT_S),
        (signal.SIGTERM, _TERMINATE_S),
        (signal.SIGKILL, math.inf),
    ):
        process.send_signal(number)
        with trio.move_on_after(patience_s):
            await _wait(process)
        if process.returncode is not None:
            return


async def _collect(stream: trio.abc.ReceiveStream, answer: bytearray) -> None:
    async for chunk in stream:
        answer += chunk
        if len(answer) > _ANSWER_MAX:
            raise ReplicatorError(f"the command answered more than {_ANSWER_MAX} bytes")


async def _forward(stream: trio.abc.ReceiveStream, last: list[str]) -> None:
    """Log each line as what it was logged as, without the time; remember the last that was no log record."""
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _tell(line, last)
        if len(rest) > _LINE_MAX:
            _tell(rest, last)
            rest = b""
    _tell(rest, last)


def _tell(line: bytes, last: list[str]) -> None:
    text = line.decode("utf-8", "replace").strip()
    match = _LOGGED.fullmatch(text)
    if match is None:
        if text:
            last[0] = text.removeprefix("replctl: ")
        return
    if not match[2].startswith(_UP):  # this job has said so itself
        _logger.log(logging.getLevelNamesMapping()[match[1]], "%s", match[2])


@contextmanager
def _in_memory(text: str) -> Iterator[int]:
    """The descriptor of a file that is in memory only, and for this user only, with this text."""
    fd = os.memfd_create("replicator.conf", os.MFD_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        data = memoryview(text.encode())
        while data:
            data = data[os.write(fd, data) :]
        yield fd
    finally:
        os.close(fd)


__all__ = ["run_command"]
