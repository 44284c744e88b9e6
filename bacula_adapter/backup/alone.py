# SPDX-License-Identifier: AGPL-3.0-or-later
"""Turns of several jobs on a VM whose platform has one snapshot at a time. The lock goes with the process that held it."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import Final

import trio

from replicator import durable

_logger = logging.getLogger(__name__)

#: How often it is looked whether the other job has ended. Seconds.
_LOOK_S: Final = 0.5


class Alone:
    """A turn, held from ``take`` to ``give_up``."""

    def __init__(self, path: Path, what: str) -> None:
        """``what`` is held, for messages."""
        self._path = path
        self._what = what
        self._file: durable.DurableFile | None = None

    async def take(self) -> None:
        """Wait for the turn. Raises OSError. Cancelled, it is not held."""
        file = durable.DurableFile(self._path, create=True)
        told = False
        try:
            while not _lock(file):
                if not told:
                    told = True
                    _logger.info("%s: waiting for another Bacula job on this VM", self._what)
                await trio.sleep(_LOOK_S)
        except BaseException:
            file.close()
            raise
        self._file = file

    def give_up(self) -> None:
        """Let the next one have it; can be repeated."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: durable.DurableFile) -> bool:
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


__all__ = ["Alone"]
