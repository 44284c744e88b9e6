# SPDX-License-Identifier: AGPL-3.0-or-later
"""Jobs that are no backup: a mode of the plugin string runs the `replctl` command of the same meaning in a process of its own.

Its answer, in JSON, is the one file of the job, ``@replicator/<mode>/<job>.json``; what it logs becomes messages of the job.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from bacula_adapter.backend.command import run_command
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
from replicator.errors import UsageError

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


__all__ = [
    "ROOT",
    "config_text",
    "name_of",
    "open_command",
    "open_command_listing",
    "open_report_restore",
    "words_of",
]
