# SPDX-License-Identifier: AGPL-3.0-or-later
"""From what a plugin says of a job to who does the work. Loads only what the job needs: it is waited for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from bacula_adapter.backend.dialogue import Word
from bacula_adapter.backend.interface import (
    BackupHandler,
    JobInfo,
    JobKind,
    Level,
    ListingHandler,
    OpenBackup,
    OpenListing,
    OpenRestore,
    RestoreHandler,
)
from bacula_adapter.backend.job_info import decide_streams, parse_job
from bacula_adapter.backend.packets import ProtocolError
from bacula_adapter.backend.params import Params, load_params
from replicator import __version__
from replicator.config import Config
from replicator.errors import UsageError

_logger = logging.getLogger(__name__)

_KINDS = {
    Word.BACKUP_START: JobKind.BACKUP,
    Word.ESTIMATE_START: JobKind.ESTIMATE,
    Word.LISTING_START: JobKind.ESTIMATE,
    Word.QUERY_START: JobKind.ESTIMATE,
    Word.RESTORE_START: JobKind.RESTORE,
}
#: The product's phase of a mode (shared with operators by the first message of each job).
_PHASES = {
    "backup": "F2",
    "estimate": "F2",
    "seed": "F8.1",
    "bitmap-push": "F8.2",
    "receiver": "F8.3",
    "failover-test": "F8.4",
    "failover-planned": "F8.4",
    "failover-unplanned": "F8.4",
    "failover-undo": "F8.4",
    "failover-perm": "F8.4",
}


@dataclass(frozen=True, slots=True)
class Work:
    """A job that can begin. ``path`` of a listing, ``parameter`` of a query; both None: an estimate."""

    job: JobInfo
    config: Config
    path: str | None = None
    parameter: str | None = None


class Handlers(Protocol):
    """Who does the work. Opening raises UsageError, RefusedError, StateError before anything is touched."""

    def prepare(
        self, job_lines: Sequence[str], params: Sequence[str], start: Word, *, extended: bool
    ) -> Work:
        """What the lines say, checked. Raises ProtocolError, UsageError."""
        ...

    def backup(self, work: Work) -> AbstractAsyncContextManager[BackupHandler]:
        """For a backup."""
        ...

    def listing(self, work: Work) -> AbstractAsyncContextManager[ListingHandler]:
        """For an estimate, a listing or a query."""
        ...

    def restore(self, work: Work) -> AbstractAsyncContextManager[RestoreHandler]:
        """For a restore."""
        ...


class Product:
    """The product's own handlers."""

    def prepare(
        self, job_lines: Sequence[str], params: Sequence[str], start: Word, *, extended: bool
    ) -> Work:
        """See ``Handlers``. Reads the configuration; logs the first message of the job."""
        job = parse_job(job_lines, extended=extended)
        if job.kind is not _KINDS[start]:
            raise ProtocolError(
                f"{start.value[3:]} in a job of type {job.kind.value}: the plugin contradicts itself"
            )
        loaded = load_params(params, extended=extended)
        config = _with_mode(job, loaded)
        _logger.info(
            "replicator backend up (v%s) phase=%s mode=%s vm=%s",
            __version__,
            phase(job, config),
            config.mode,
            config.vm,
        )
        for key in loaded.exposed:
            _logger.warning(
                "%s stands in the plugin string, and so in clear in Bacula's catalogue, on its volumes and in its logs:"
                " set it in the configuration file",
                key,
            )
        if job.kind is JobKind.BACKUP:
            job = replace(job, addressed=decide_streams(job, config))
        query = loaded.query if start is not Word.QUERY_START else loaded.query or ""
        listing = loaded.listing if start is not Word.LISTING_START else loaded.listing or "/"
        return Work(job, config, None if query is not None else listing, query)

    def backup(self, work: Work) -> AbstractAsyncContextManager[BackupHandler]:
        """See ``Handlers``."""
        if work.config.mode != "backup":
            from bacula_adapter.backend.modes import open_command  # noqa: PLC0415 - see the module's docstring

            return open_command(work.job, work.config)
        from bacula_adapter.backup import open_backup  # noqa: PLC0415 - the same

        opener: OpenBackup = open_backup
        return opener(work.job, work.config)

    def listing(self, work: Work) -> AbstractAsyncContextManager[ListingHandler]:
        """See ``Handlers``."""
        if work.config.mode not in ("backup", "estimate"):
            from bacula_adapter.backend.modes import open_command_listing  # noqa: PLC0415 - the same

            return open_command_listing(work.job, work.config)
        from bacula_adapter.backup import open_listing  # noqa: PLC0415 - the same

        opener: OpenListing = open_listing
        return opener(work.job, work.config)

    def restore(self, work: Work) -> AbstractAsyncContextManager[RestoreHandler]:
        """See ``Handlers``."""
        if work.config.mode != "restore":
            from bacula_adapter.backend.modes import open_report_restore  # noqa: PLC0415 - the same

            return open_report_restore(work.job, work.config)
        from bacula_adapter.restore import open_restore  # noqa: PLC0415 - the same

        opener: OpenRestore = open_restore
        return opener(work.job, work.config)


def _with_mode(job: JobInfo, params: Params) -> Config:
    """The configuration with the mode that the job has. Raises UsageError where job and mode do not fit."""
    config = params.config
    if job.kind is JobKind.RESTORE and config.mode in ("backup", "estimate"):
        # The string is that of the backup.
        return msgspec.structs.replace(config, mode="restore")
    if job.kind is JobKind.BACKUP and config.mode == "restore":
        raise UsageError("mode: restore is for restore jobs; this job backs up")
    if config.from_ and config.mode not in ("backup", "restore", "estimate"):
        raise UsageError(f"from: says what to back up; it contradicts mode = {config.mode}")
    return config


def phase(job: JobInfo, config: Config) -> str:
    """The product's phase of a job."""
    if job.kind is JobKind.RESTORE and config.mode == "restore":
        if config.target_format != "raw":
            return "F6"
        return "F5" if config.target_cluster else "F4"
    if config.mode in ("backup", "estimate") and job.level is not Level.FULL:
        return "F3"
    return _PHASES.get(config.mode, "F4")


__all__ = ["Handlers", "Product", "Work", "phase"]
