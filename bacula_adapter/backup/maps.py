# SPDX-License-Identifier: AGPL-3.0-or-later
"""The image maps of a chain: for each part that a job may go on from, one of every disk. Everything blocks but ``MapFeed``.

``maps/<part>/disk-N.map`` below the chain's folder. A part's maps are made while its disks are read, and count when its event
is in the log; what no event knows is removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

import trio

from replicator import durable
from replicator.domain.backup import BackupDisk, BackupPart
from replicator.errors import DamageError, StateError
from replicator.imagemap import ImageMap
from replicator.phcbt.format import Algorithm, GrainRun

_FICLONE: Final = 0x40049409
_CANNOT_CLONE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
)
_COPY: Final = 1 << 20
#: Runs that are put into a map in one go by a worker thread.
_BATCH: Final = 64


class ChainMaps:
    """The maps in ``folder``, which the caller holds alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, part: str, disk: str) -> Path:
        """Where the map of a disk of a part is."""
        return self._folder / part / f"{disk}.map"

    def begin(self, part: str) -> None:
        """Make the folder of a part that is new."""
        durable.make_dir(self._folder)
        durable.make_dir(self._folder / part)

    def create(self, part: str, disk: str, algorithm: Algorithm, grain: int, size: int) -> ImageMap:
        """The map of a disk of zeros, to be written to. The caller closes it."""
        return ImageMap.create(self.path(part, disk), algorithm, grain, size, 0)

    def copy(self, base: str, part: str, disk: str) -> ImageMap:
        """A copy of the map that the disk has in ``base``, to be written to. The caller closes it.

        Raises DamageError, StateError.
        """
        target = self.path(part, disk)
        with (
            durable.DurableFile(self.path(base, disk)) as old,
            durable.DurableFile(target, create=True, exclusive=True) as new,
        ):
            _copy(old, new)
        return ImageMap.open(target)

    def misfit(self, part: BackupPart, disk: BackupDisk) -> str | None:
        """Why the map of a disk of this part cannot be used; None if it can."""
        try:
            with ImageMap.open(self.path(part.part, disk.disk)) as known:
                if known.root() == disk.root and known.disk_size == disk.size:
                    return None
                return f"the map of {disk.disk} is not that of part {part.number}"
        except (DamageError, StateError) as error:
            return str(error)

    def made_durable(self, part: str) -> None:
        """The names of a part's maps; what they hold is durable when they are finished."""
        durable.sync_dir(self._folder / part)

    def keep(self, parts: Collection[str]) -> None:
        """Remove the maps of all other parts. Can be repeated."""
        if not self._folder.is_dir():
            return
        for folder in sorted(self._folder.iterdir()):
            if folder.name in parts:
                continue
            for path in sorted(folder.iterdir()):
                durable.unlink(path)
            durable.remove_dir(folder)
        durable.sync_dir(self._folder)


def _copy(old: durable.DurableFile, new: durable.DurableFile) -> None:
    """A clone of the file where the file system can, else a copy of what is no hole."""
    durable.observe("write", new.path)
    try:
        fcntl.ioctl(new.fd, _FICLONE, old.fd)
    except OSError as error:
        if error.errno not in _CANNOT_CLONE:
            raise OSError(error.errno, error.strerror, new.path) from error
    else:
        return
    size, at = old.size, 0
    while (start := old.next_data(at)) is not None:
        at = os.lseek(old.fd, start, os.SEEK_HOLE)
        while start < at:
            piece = old.read_at(min(_COPY, at - start), start)
            new.write_at(piece, start)
            start += len(piece)
    if new.size != size:
        new.truncate(size)


class MapFeed:
    """Takes the digests of a disk as it is read, in ascending order, and is the map's content at the end."""

    def __init__(self, image: ImageMap, size: int, number: int) -> None:
        """``image`` belongs to this object from now on."""
        self._image = image
        self._writer = image.write(size, number)
        self._runs: list[GrainRun] = []

    async def put(self, run: GrainRun) -> None:
        """The next grains. Raises OSError, ValueError."""
        self._runs.append(run)
        if len(self._runs) >= _BATCH:
            await trio.to_thread.run_sync(self._put)

    async def finish(self) -> bytes:
        """The disk's root; the map is durable, but for its name."""
        return await trio.to_thread.run_sync(self._finish)

    def _put(self) -> None:
        runs, self._runs = self._runs, []
        for run in runs:
            self._writer.put(run)

    def _finish(self) -> bytes:
        self._put()
        return self._writer.finish()

    def close(self) -> None:
        """Close the map; what was not finished is good for nothing."""
        self._image.close()


__all__ = ["ChainMaps", "MapFeed"]
