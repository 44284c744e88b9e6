# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads a snapshot's disk where iSCSI cannot: an image of it, fetched in one piece into a file (nutanix-data-path.md, part E).

Slow, and all of the disk travels each time: for clusters whose data services nobody can reach.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from replicator import durable
from replicator.errors import SourceError
from replicator.sources.nutanix.expose import Making, Wanted, make_image
from replicator.sources.nutanix.site import NutanixSite

_logger = logging.getLogger(__name__)

#: Runs of zeros of this length become holes.
_HOLE: Final = 64 << 10
_ZEROS: Final = bytes(_HOLE)


class FileReader:
    """A disk's bytes in a file that has no name any more."""

    def __init__(self, fd: int, size: int, limiter: trio.CapacityLimiter) -> None:
        self._fd = fd
        self.size = size
        self._limiter = limiter

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, in a worker thread. Raises SourceError."""
        return await trio.to_thread.run_sync(self._read, offset, length, limiter=self._limiter)

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        try:
            while view:
                count = os.preadv(self._fd, [view], offset)
                if not count:
                    raise SourceError("the file that a disk was fetched into has been cut short")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise SourceError(
                f"what was fetched of a disk cannot be read: {error.strerror}"
            ) from None
        return bytes(data)


def write_sparse(fd: int, offset: int, data: bytes) -> None:
    """Write a piece, leaving holes where it is zero. Blocks; raises OSError."""
    view = memoryview(data)
    at = 0
    while at < len(view):
        length = min(_HOLE - (offset + at) % _HOLE, len(view) - at)
        part = view[at : at + length]
        if part != _ZEROS[:length]:
            done = 0
            while done < length:
                done += os.pwrite(fd, part[done:], offset + at + done)
        at += length


@asynccontextmanager
async def expose_by_rest(
    site: NutanixSite, wanted: Wanted, limiter: trio.CapacityLimiter
) -> AsyncGenerator[FileReader, None]:
    """The disk, readable from a file of this host until the block is left; the image is gone by then.

    Raises PrismError (PrismRefusedError where Prism makes no image of a snapshot's disk) and SourceError: no room, a file of
    another size.
    """
    folder = site.settings.working_dir
    try:
        fd = await trio.to_thread.run_sync(_open_unnamed, folder)
    except OSError as error:
        raise SourceError(f"working_dir: {folder}: {error.strerror}") from None
    try:
        making = Making(site, wanted)
        try:
            image = await make_image(making)
            await _fetch(site, wanted, image, fd, limiter)
        finally:
            await making.undo()
        yield FileReader(fd, wanted.disk.size, limiter)
    finally:
        os.close(fd)


def _open_unnamed(folder: Path) -> int:
    """A file that is gone when this process is."""
    durable.make_dir(folder)
    fd, path = tempfile.mkstemp(prefix="disk-", suffix=".part", dir=folder)
    os.unlink(path)
    return fd


async def _fetch(
    site: NutanixSite, wanted: Wanted, image: str, fd: int, limiter: trio.CapacityLimiter
) -> None:
    size, at = wanted.disk.size, 0
    _logger.info("disk %s: fetching an image of %d bytes over REST", wanted.disk.disk, size)
    try:
        await trio.to_thread.run_sync(os.ftruncate, fd, size, limiter=limiter)
        async with aclosing(site.prism.image_file(image)) as pieces:
            async for piece in pieces:
                if at + len(piece) > size:
                    raise SourceError(f"image {image} holds more than the {size} bytes of its disk")
                await trio.to_thread.run_sync(write_sparse, fd, at, piece, limiter=limiter)
                at += len(piece)
    except OSError as error:
        raise SourceError(
            f"disk {wanted.disk.disk} does not get into {site.settings.working_dir}: {error.strerror} (working_dir needs room for"
            " what the disk holds)"
        ) from None
    if at != size:
        raise SourceError(f"image {image} ended after {at} of {size} bytes")


__all__ = ["FileReader", "expose_by_rest", "write_sparse"]
