# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a restore that is killed leaves behind: written down before it is made, removed or finished by the next one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from bacula_adapter.restore.files import lock_folder
from replicator import durable
from replicator.errors import RefusedError
from replicator.log import EventLog

_logger = logging.getLogger(__name__)

_FILES: Final = "restore/file/"
_NAMES: Final = "restore/names"


class Leftovers:
    """The journal of one restore's files."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._count = 0

    async def note(self, path: Path, folder: Path) -> None:
        """A file is about to be made below ``folder``, which this restore has locked; durable on return."""
        self._count += 1
        await self._log.journal_put(f"{_FILES}{self._count:06}", [str(path), str(folder)])

    async def note_names(self, names: Sequence[tuple[Path, Path]]) -> None:
        """These files are whole, and are about to get their final names: from here on they will."""
        await self._log.journal_put(_NAMES, [[str(old), str(new)] for old, new in names])

    async def settle(self) -> None:
        """Nothing is left."""
        for key in await self._log.journal_items("restore/"):
            await self._log.journal_delete(key)
        self._count = 0

    async def sweep(self, scratch: Path) -> None:
        """Finish or remove what a restore that was killed has left, and empty ``scratch``. Raises OSError."""
        names = await self._log.journal_get(_NAMES) or []
        files = await self._log.journal_items(_FILES)
        paths = [(Path(path), Path(folder)) for path, folder in files.values()]
        found = await trio.to_thread.run_sync(
            _sweep, [(Path(old), Path(new)) for old, new in names], paths, scratch
        )
        for text in found:
            _logger.warning("a restore that did not end has left %s", text)
        await self.settle()


def _sweep(
    names: list[tuple[Path, Path]], paths: list[tuple[Path, Path]], scratch: Path
) -> list[str]:
    found = []
    for old, new in names:
        if old.is_file() and not old.is_symlink():
            durable.rename(old, new)
            found.append(f"{new}, which was whole: it stays")
    found += [f"{path}: removed" for path, folder in paths if _remove(path, folder)]
    if scratch.is_dir():
        for entry in scratch.iterdir():
            if entry.is_file() or entry.is_symlink():
                durable.unlink(entry)
    return found


def _remove(path: Path, folder: Path) -> bool:
    """Remove a file unless another restore is at work there by now."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        lock = lock_folder(folder)
    except (RefusedError, OSError):
        return False
    try:
        durable.unlink(path)
    finally:
        os.close(lock)
    return True


__all__ = ["Leftovers"]
