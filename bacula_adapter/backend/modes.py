# SPDX-License-Identifier: AGPL-3.0-or-later
"""Jobs that are no backup: a mode of the plugin string runs the `replctl` command of the same meaning in a process of its own.

What the command logs becomes messages of the job. Its answer, in JSON, is the one file of the job,
``@replicator/<mode>/<job>.json``. The configuration, plugin string included, is handed over in memory that only this user can
read: no secret is on a command line or on a disk.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from bacula_adapter.backend.interface import (
    Answer,
    BackupHandler,
    BackupOutput,
    FileEntry,
    JobInfo,
    ListingHandler,
    RestoredFile,
    RestoreHandler,
)
from bacula_adapter.backend.params import values_of
from replicator.config import Config, parse_lines
from replicator.errors import ReplicatorError, UsageError
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

ROOT: Final = "@replicator/"
_COMMANDS: Final = {
    "estimate": ["estimate"],
    "seed": ["seed"],
    "bitmap-push": ["push"],
    "receiver": ["receiver"],
    "failover-test": ["failover", "test"],
    "failover-planned": ["failover", "planned"],
    "failover-unplanned": ["failover", "unplanned"],
    "failover-undo": ["failover", "undo"],
    "failover-perm": ["failover", "perm"],
}
#: These name the VM themselves; the others take those that the configuration chooses.
_OF_A_VM: Final = "failover-"
#: Modes in which ``point`` is asked for.
_WITH_POINT: Final = frozenset({"failover-test", "failover-unplanned"})
_CODE: Final = "import sys; from replicator.cli.main import main; sys.exit(main())"
_ANSWER_MAX: Final = 8 << 20
_LINE_MAX: Final = 16 << 10
#: After SIGINT the command puts things in order; after SIGTERM it has had its time.
_INTERRUPT_S: Final = 60.0
_TERMINATE_S: Final = 10.0
#: A line of `replctl`'s log (replicator/cli/logs.py).
_LOGGED: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) +(.*)")
_UP: Final = "replicator backend up "


def name_of(job: JobInfo, mode: str) -> str:
    """The name of the file with a command's answer."""
    return f"{ROOT}{mode}/{job.name}.json"


def words_of(config: Config) -> list[str]:
    """The words of the command that a mode stands for. Raises UsageError."""
    words = [*_COMMANDS[config.mode]]
    if not config.mode.startswith(_OF_A_VM):
        return words
    if not config.vm or set("*?[],") & set(config.vm) or config.vm.startswith("-"):
        raise UsageError(f"vm: mode = {config.mode} takes one VM, by name or UUID")
    if config.point is not None:
        if config.mode not in _WITH_POINT:
            raise UsageError(f"point: mode = {config.mode} takes no recovery point")
        words += ["--point", str(config.point)]
    return [*words, config.vm]


@asynccontextmanager
async def open_command(job: JobInfo, config: Config) -> AsyncIterator[BackupHandler]:
    """A backup job that runs a command. Raises UsageError."""
    words = words_of(config)
    text = config_text(config)
    await trio.lowlevel.checkpoint()
    yield _CommandJob(name_of(job, config.mode), words, text)


@asynccontextmanager
async def open_command_listing(job: JobInfo, config: Config) -> AsyncIterator[ListingHandler]:
    """The estimate of such a job: its one file, whose size nobody knows."""
    await trio.lowlevel.checkpoint()
    yield _CommandListing(name_of(job, config.mode))


@asynccontextmanager
async def open_report_restore(job: JobInfo, config: Config) -> AsyncIterator[RestoreHandler]:
    """A restore of such a job's file: Bacula writes it, as any other."""
    del job, config
    await trio.lowlevel.checkpoint()
    yield _ReportRestore()


def config_text(config: Config) -> str:
    """The configuration as a file's text. Raises UsageError where a value cannot stand in a file."""
    values = {key: value for key, value in values_of(config).items() if key != "mode"}
    text = "".join(f'{key} = "{value}"\n' for key, value in values.items())
    try:
        if parse_lines(text) == values:
            return text
    except UsageError:
        pass
    for key, value in values.items():
        if "\n" in value or parse_lines(f'{key} = "{value}"\n') != {key: value}:
            raise UsageError(
                f"{key}: its value cannot be handed to the command; it holds # or a quote"
            )
    raise AssertionError("a text that cannot be read back")


class _CommandJob:
    """See ``BackupHandler``."""

    claims: Sequence[str] = ()

    def __init__(self, name: str, words: list[str], config: str) -> None:
        self._name = name
        self._words = words
        self._config = config

    async def run(self, output: BackupOutput) -> None:
        """Run the command, and emit its answer. Cancelled, the command is interrupted and waited for."""
        answer = await run_command(self._words, self._config)
        now = math.floor(time.time())
        await output.begin(FileEntry(name=self._name, size=len(answer), mtime_s=now))
        await output.data(0, answer)
        await output.end()

    async def exists(self, name: str) -> bool:
        """No earlier answer belongs to this job."""
        del name
        await trio.lowlevel.checkpoint()
        return False

    async def conclude(self, status: str) -> None:
        """What the command did is done, whatever Bacula says of its answer."""
        del status
        await trio.lowlevel.checkpoint()


class _CommandListing:
    """See ``ListingHandler``."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def estimate(self) -> AsyncIterator[FileEntry]:
        """The one file."""
        await trio.lowlevel.checkpoint()
        yield FileEntry(name=self._name, size=0, mtime_s=math.floor(time.time()))

    async def listing(self, path: str) -> AsyncIterator[FileEntry]:
        """The one file, wherever one looks."""
        del path
        async for entry in self.estimate():
            yield entry

    async def query(self, parameter: str) -> AsyncIterator[tuple[str, str]]:
        """The command is all there is to ask for."""
        await trio.lowlevel.checkpoint()
        if parameter != "name":
            raise UsageError(f"query: {parameter} cannot be asked of a job that runs a command")
        yield parameter, self._name


class _ReportRestore:
    """See ``RestoreHandler``."""

    async def restore_object(self, name: str, kind: int, job_id: int, data: bytes) -> None:
        """There are none."""
        del name, kind, job_id, data
        await trio.lowlevel.checkpoint()

    async def create(self, file: RestoredFile) -> Answer:
        """Bacula writes it."""
        del file
        await trio.lowlevel.checkpoint()
        return Answer.CORE

    async def data(self, offset: int | None, data: bytes) -> None:
        """Never called."""
        raise AssertionError((offset, len(data)))

    async def close(self, *, whole: bool) -> None:
        """Never called."""
        raise AssertionError(whole)

    async def finish(self) -> None:
        """Bacula has written all."""
        await trio.lowlevel.checkpoint()

    async def conclude(self, status: str) -> None:
        """Nothing depends on it."""
        del status
        await trio.lowlevel.checkpoint()


async def run_command(words: Sequence[str], config: str) -> bytes:
    """What `replctl --json` with these words answers. Raises ReplicatorError with its own last words where it fails.

    Cancelled, it gets SIGINT and time to put things in order; then SIGTERM; then it is killed.
    """
    last = [""]
    answer = bytearray()
    with _in_memory(config) as fd:
        # Opened by the child as a file of its own.
        program = [sys.executable, "-c", _CODE, "--config", f"/proc/self/fd/{fd}", "--json", *words]
        process = await trio.lowlevel.open_process(
            program,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[fd],
        )
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            async with flat_nursery() as nursery:
                nursery.start_soon(_collect, process.stdout, answer)
                nursery.start_soon(_forward, process.stderr, last)
                await process.wait()
        finally:
            await _end(process)
    if process.returncode:
        raise ReplicatorError(last[0] or f"{' '.join(words)} failed ({process.returncode})")
    return bytes(answer)


async def _end(process: trio.Process) -> None:
    """End what still runs, gently first."""
    with trio.CancelScope(shield=True):
        for number, patience_s in (
            (signal.SIGINT, _INTERRUPT_S),
            (signal.SIGTERM, _TERMINATE_S),
            (signal.SIGKILL, math.inf),
        ):
            if process.returncode is not None:
                break
            process.send_signal(number)
            with trio.move_on_after(patience_s):
                await process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()


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


class _in_memory:  # noqa: N801 - used as a function
    """A file that is in memory only, and for this user only, with this text; its descriptor."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._fd = -1

    def __enter__(self) -> int:
        self._fd = os.memfd_create("replicator.conf", os.MFD_CLOEXEC)
        os.fchmod(self._fd, 0o600)
        data = memoryview(self._text.encode())
        while data:
            data = data[os.write(self._fd, data) :]
        return self._fd

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.close(self._fd)


__all__ = [
    "ROOT",
    "config_text",
    "name_of",
    "open_command",
    "open_command_listing",
    "open_report_restore",
    "run_command",
    "words_of",
]
