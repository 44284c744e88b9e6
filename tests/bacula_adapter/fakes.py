# SPDX-License-Identifier: AGPL-3.0-or-later
"""Handlers that do what a test tells them, and remember what was asked of them and how it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from bacula_adapter.backend.dialogue import Word
from bacula_adapter.backend.dispatch import Work
from bacula_adapter.backend.interface import (
    Answer,
    BackupOutput,
    FileEntry,
    RestoredFile,
)
from bacula_adapter.backend.job_info import parse_job
from replicator.config import Config, check

Step = Callable[[], Awaitable[None]]

IMAGE = "@image/web/disks/disk-0.raw"
NOTE = "@image/web/description.000001-0badcafe.json"


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


async def small_backup(output: BackupOutput) -> None:
    """An image with holes, a file without, an object."""
    await output.begin(FileEntry(name=IMAGE, size=300_000, mtime_s=5, addressed=True))
    await output.data(65_536, b"a" * 1000)
    await output.data(200_000, b"b" * 10)
    await output.end()
    await output.begin(FileEntry(name=NOTE, size=4, mtime_s=6))
    await output.data(0, b"note")
    await output.end()
    await output.restore_object("replicator/web", b"object")
    await output.plugin_options("RestoreOptions", "# Plugin configuration file\n")


@dataclass
class Fakes:
    """See ``Handlers``. ``log``: what happened, in order."""

    run_backup: Callable[[BackupOutput], Awaitable[None]] = small_backup
    opening: Step = nothing
    concluding: Step = nothing
    undoing: Step = nothing
    finishing: Step = nothing
    taking: Step = nothing
    answers: dict[str, Answer] = field(default_factory=dict)
    entries: Sequence[FileEntry] = ()
    config: Config = field(default_factory=lambda: check({"debug_log": "/dev/null"}))
    log: list[str] = field(default_factory=list)
    work: Work | None = None
    restored: dict[str, list[tuple[int | None, bytes]]] = field(default_factory=dict)
    objects: list[tuple[str, int, int, bytes]] = field(default_factory=list)
    _kept: bool = False
    _file: str = ""

    def prepare(
        self, job_lines: Sequence[str], params: Sequence[str], start: Word, *, extended: bool
    ) -> Work:
        job = parse_job(job_lines, extended=extended)
        path = "/" if start is Word.LISTING_START else None
        parameter = "vm" if start is Word.QUERY_START else None
        self.log.append(" ".join(["prepared", *params]))
        self.work = Work(job, self.config, path, parameter)
        return self.work

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Fakes]:
        await self.opening()
        self.log.append("opened")
        try:
            yield self
        finally:
            if self._kept:
                self.log.append("kept")
            else:
                with trio.CancelScope(shield=True):
                    await self.undoing()
                self.log.append("undone")

    def backup(self, work: Work) -> AbstractAsyncContextManager[Fakes]:
        assert work is self.work
        return self._open()

    restore = backup

    @asynccontextmanager
    async def listing(self, work: Work) -> AsyncIterator[FakeListing]:
        assert work is self.work
        async with self._open():
            yield FakeListing(self)

    # A backup

    claims = ("@image/",)

    async def run(self, output: BackupOutput) -> None:
        await self.run_backup(output)
        self.log.append("ran")

    async def exists(self, name: str) -> bool:
        await trio.lowlevel.checkpoint()
        return name == IMAGE

    async def conclude(self, status: str) -> None:
        await self.concluding()
        self.log.append(f"concluded {status}")
        self._kept = status == "T"

    # A restore

    async def restore_object(self, name: str, kind: int, job_id: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.objects.append((name, kind, job_id, data))

    async def create(self, file: RestoredFile) -> Answer:
        await trio.lowlevel.checkpoint()
        self.log.append(f"created {file.name} {file.size} {file.mtime_s} {file.file_index}")
        self._file = file.name
        self.restored[file.name] = []
        return self.answers.get(file.name, Answer.SEND)

    async def data(self, offset: int | None, data: bytes) -> None:
        await self.taking()
        self.restored[self._file].append((offset, data))

    async def close(self, *, whole: bool) -> None:
        await trio.lowlevel.checkpoint()
        self.log.append(f"closed {self._file} {whole}")

    async def finish(self) -> None:
        await self.finishing()
        self.log.append("finished")


@dataclass
class FakeListing:
    """See ``ListingHandler``."""

    fakes: Fakes

    async def estimate(self) -> AsyncIterator[FileEntry]:
        await trio.lowlevel.checkpoint()
        for entry in self.fakes.entries:
            yield entry

    async def listing(self, path: str) -> AsyncIterator[FileEntry]:
        self.fakes.log.append(f"listed {path}")
        async for entry in self.estimate():
            yield entry

    async def query(self, parameter: str) -> AsyncIterator[tuple[str, str]]:
        await trio.lowlevel.checkpoint()
        yield parameter, "web"
        yield parameter, "two\nlines"
