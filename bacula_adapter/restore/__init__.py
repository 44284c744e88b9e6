# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images and VMs out of the virtual files of Bacula backups."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from bacula_adapter.backend.interface import JobInfo, RestoreHandler
from replicator.config import Config


def open_restore(job: JobInfo, config: Config) -> AbstractAsyncContextManager[RestoreHandler]:
    """A restore of whatever Bacula hands over; see ``OpenRestore``. Raises RefusedError if too many are at work on this host."""
    from bacula_adapter.restore import handler  # noqa: PLC0415 - other parts of this package are used by backups

    return handler.open_restore(job, config)


__all__ = ["open_restore"]
