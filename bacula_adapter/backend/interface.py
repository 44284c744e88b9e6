# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the dialogue with the plugin asks of the work behind it, and what it offers to that work. No protocol, no disks.

A handler is opened for one job and one plugin string. Every method may raise ReplicatorError (or OSError): the job fails
with that message. Cancellation may come at any await; leaving the handler's context without ``conclude("T")`` undoes all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from replicator.config import Config
from replicator.domain.backup import director_name

#: Bacula's status of a job that ended well.
TERMINATED_OK = "T"


class JobKind(StrEnum):
    """What Bacula runs."""

    BACKUP = "B"
    RESTORE = "R"
    ESTIMATE = "E"


class Level(StrEnum):
    """How much a backup carries."""

    FULL = "F"
    DIFFERENTIAL = "D"
    INCREMENTAL = "I"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """A job as Bacula describes it.

    ``name``: unique (``JOB.2026-11-25_10.00.00_03``); ``previous``: that of the job this one goes on from, empty for none.
    ``since``: epoch seconds, 0 for none. ``where``: None with a regular expression; empty or ``/``: back to the platform.
    ``addressed``: the plugin takes files with holes. ``fd_config``: the file daemon's configuration file, if known.
    """

    name: str
    job_id: int
    kind: JobKind
    level: Level = Level.FULL
    since: int = 0
    previous: str = ""
    where: str | None = None
    regex_where: str = ""
    replace: str = "a"
    accurate: bool = False
    client: str = ""
    fd_version: str = ""
    fd_config: str = ""
    addressed: bool = False

    @property
    def job(self) -> str:
        """The job's name in the Director's configuration: ``name`` without the time that makes it unique."""
        return director_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A virtual file. ``size`` is what it is restored to, in bytes; of a file that is not ``addressed``, 0 says that it is not
    known before its end (a delta). ``addressed``: its holes are not sent, if the plugin can.
    """

    name: str
    size: int
    mtime_s: int
    addressed: bool = False
    mode: int = 0o600


class BackupOutput(Protocol):
    """Where a backup puts its files, one after the other. Methods wait while Bacula does not take more."""

    async def begin(self, entry: FileEntry) -> None:
        """Begin a file."""
        ...

    async def data(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Bytes at ``offset``, which ascends; gaps are zeros (sent as such where the file is not addressed).

        The memory of ``data`` is the caller's again when this returns: it must be written, or copied, by then.
        """
        ...

    async def end(self) -> None:
        """The file is whole; what is missing up to its size is zeros if it is addressed. Raises ValueError if bytes of a file
        that is not addressed, and whose size is not 0, are missing or too many.
        """
        ...

    async def restore_object(self, name: str, data: bytes) -> None:
        """An object for the catalogue; after the last file."""
        ...

    async def plugin_options(self, name: str, text: str) -> None:
        """Options that an operator can set at a restore; nothing where the plugin cannot take them."""
        ...


class BackupHandler(Protocol):
    """A backup of the VMs that the configuration chooses."""

    @property
    def claims(self) -> Sequence[str]:
        """Prefixes of the names that are this backup's."""
        ...

    async def run(self, output: BackupOutput) -> None:
        """Emit everything. The references stay where they are."""
        ...

    async def exists(self, name: str) -> bool:
        """Whether a file of an earlier job still belongs to the VM's chain, though it was not sent this time."""
        ...

    async def conclude(self, status: str) -> None:
        """Bacula's verdict. Only with ``T`` the references move, durable on return; else everything is undone."""
        ...


class ListingHandler(Protocol):
    """What there is to back up, without backing it up."""

    def estimate(self) -> AsyncIterator[FileEntry]:
        """The files of the job and their sizes."""
        ...

    def listing(self, path: str) -> AsyncIterator[FileEntry]:
        """What is below a path: ``/`` has a folder a VM."""
        ...

    def query(self, parameter: str) -> AsyncIterator[tuple[str, str]]:
        """Keys and values of a parameter (vm, cluster, point …). Raises UsageError for one that is not known."""
        ...


class Answer(StrEnum):
    """What becomes of a file of a restore."""

    SEND = "OK"
    SKIP = "SKIP"
    CORE = "CORE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredFile:
    """A file that Bacula would restore. ``name``: as given by Bacula, ``where`` already applied."""

    name: str
    size: int
    mtime_s: int
    file_index: int = 0


class RestoreHandler(Protocol):
    """A restore. Objects first, then files in the order of their jobs, then ``finish`` and the verdict."""

    async def restore_object(self, name: str, kind: int, job_id: int, data: bytes) -> None:
        """An object from the catalogue: ``kind`` 25 (ours) or 28 (options that the operator has set)."""
        ...

    async def create(self, file: RestoredFile) -> Answer:
        """What to do with a file; ``data`` follow only after ``SEND``."""
        ...

    async def data(self, offset: int | None, data: bytes) -> None:
        """The next bytes; ``offset`` None: where the last ended."""
        ...

    async def close(self, *, whole: bool) -> None:
        """The file ended. ``whole`` False: Bacula says that it is not complete."""
        ...

    async def finish(self) -> None:
        """No more files: check everything, and bring it to its target. Nothing of it counts before ``conclude``."""
        ...

    async def conclude(self, status: str) -> None:
        """Bacula's verdict. With ``T`` what was restored stays; else it is removed."""
        ...


class OpenBackup(Protocol):
    """Makes a backup's handler."""

    def __call__(self, job: JobInfo, config: Config) -> AbstractAsyncContextManager[BackupHandler]:
        """Opened for the job; raises UsageError, RefusedError, StateError before anything is touched."""
        ...


class OpenListing(Protocol):
    """Makes the handler of an estimate, a listing or a query."""

    def __call__(self, job: JobInfo, config: Config) -> AbstractAsyncContextManager[ListingHandler]:
        """Opened for the job; raises as ``OpenBackup``."""
        ...


class OpenRestore(Protocol):
    """Makes a restore's handler."""

    def __call__(self, job: JobInfo, config: Config) -> AbstractAsyncContextManager[RestoreHandler]:
        """Opened for the job; raises as ``OpenBackup``."""
        ...


__all__ = [
    "TERMINATED_OK",
    "Answer",
    "BackupHandler",
    "BackupOutput",
    "FileEntry",
    "JobInfo",
    "JobKind",
    "Level",
    "ListingHandler",
    "OpenBackup",
    "OpenListing",
    "OpenRestore",
    "RestoreHandler",
    "RestoredFile",
]
