# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk that is served over NBD, as a sparse file: under a name of its own until it is whole and durable."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import trio

from replicator import durable
from replicator.errors import RefusedError, ReplicatorError, UsageError, WireError
from replicator.nbd.client import NbdClient, open_nbd
from replicator.nursery import flat_nursery

CHUNK = 1 << 20
DEPTH = 8
#: How much of the disk is asked for its holes at once; bounds the answer.
_STATUS_RANGE = 1 << 30
_ALLOCATION = "base:allocation"
#: The flag of base:allocation that says that a range reads as zeros.
_ZERO = 2

Piece = tuple[int, int]


def partial_path(target: Path) -> Path:
    """Where a file lies until it is whole."""
    return target.with_name(target.name + ".partial")


def check_target(target: Path, *, force: bool) -> None:
    """Raise UsageError if ``target`` cannot be made, or is there and may not be replaced. Touches nothing."""
    partial = partial_path(target)
    if not target.parent.is_dir():
        raise UsageError(f"--to {target}: {target.parent} is not a directory")
    # Renaming over a device node, a link or a pipe would take it away from whoever uses it: not even by force.
    for path in (target, partial):
        what = _irregular(path)
        if what is not None:
            raise UsageError(
                f"--to {target}: {path} is {what}; only a regular file can be replaced"
            )
    if force:
        return
    if os.path.lexists(target):
        raise UsageError(f"--to {target}: it exists; --force replaces it")
    if os.path.lexists(partial):
        raise UsageError(
            f"--to {target}: {partial} is left of an export, or one is running; --force replaces it"
        )


def _irregular(path: Path) -> str | None:
    """What lies at ``path`` if it is there and no regular file; links are not followed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"--to {path}: {error.strerror}") from error
    if stat.S_ISREG(mode):
        return None
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISLNK, "a symbolic link"))
    for is_kind, name in (*kinds, (stat.S_ISBLK, "a block device"), (stat.S_ISFIFO, "a pipe")):
        if is_kind(mode):
            return name
    return "a device or a socket"


async def copy_disk(
    socket: Path,
    export: str,
    size: int,
    target: Path,
    *,
    force: bool,
    report: Callable[[int], None],
) -> int:
    """Copy the export of ``size`` bytes to ``target``; returns how many bytes were read (holes are not).

    The file is whole and durable when this returns. Raises NbdError, ReplicatorError for what cannot be written; then,
    and when cancelled, nothing is left behind. ``report`` is told how far into the disk it is.
    """
    await trio.to_thread.run_sync(lambda: check_target(target, force=force))
    partial = partial_path(target)
    file = await trio.to_thread.run_sync(_create, partial, size, force)
    try:
        async with open_nbd(socket, export, contexts=(_ALLOCATION,), depth=DEPTH) as nbd:
            if nbd.size != size:
                raise WireError(f"the receiver said {size} bytes and serves {nbd.size}")
            read = await _copy(nbd, file, report)
        await trio.to_thread.run_sync(_finish, file, partial, target)
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(durable.unlink, partial)
        raise
    finally:
        file.close()
    return read


def _create(partial: Path, size: int, force: bool) -> durable.DurableFile:
    try:
        if force:
            _remove_leftover(partial)
        file = durable.DurableFile(partial, create=True, exclusive=True)
    except OSError as error:
        raise _cannot_write(partial, error) from error
    try:
        _lock(file, partial)
        file.truncate(size)
    except RefusedError:
        file.close()
        raise
    except OSError as error:
        file.close()
        durable.unlink(partial)
        raise _cannot_write(partial, error) from error
    return file


def _remove_leftover(partial: Path) -> None:
    """Unlink what an export left that is over; raises RefusedError if it is not."""
    try:
        leftover = durable.DurableFile(partial)
    except FileNotFoundError:
        return
    with leftover:
        _lock(leftover, partial)
        durable.unlink(partial)


def _lock(file: durable.DurableFile, partial: Path) -> None:
    """Hold the file for as long as it is open: two exports to one file would mix."""
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(f"another export is writing {partial}") from None


async def _copy(nbd: NbdClient, file: durable.DurableFile, report: Callable[[int], None]) -> int:
    send, receive = trio.open_memory_channel[Piece](0)
    read = 0

    async def work(pieces: trio.MemoryReceiveChannel[Piece]) -> None:
        nonlocal read
        # Not ``async with``: while that waits, others may report that all workers are gone, and hide why.
        with pieces:
            async for offset, length in pieces:
                data = await nbd.read(offset, length)
                read += length
                await trio.to_thread.run_sync(_write, file, data, offset)
                report(offset + length)

    async with flat_nursery() as nursery, send:
        async with receive:
            for _ in range(DEPTH):
                nursery.start_soon(work, receive.clone())
        for start in range(0, nbd.size, _STATUS_RANGE):
            length = min(_STATUS_RANGE, nbd.size - start)
            for piece in await _pieces(nbd, start, length):
                await send.send(piece)
    report(nbd.size)
    return read


async def _pieces(nbd: NbdClient, start: int, length: int) -> list[Piece]:
    """The parts of a range that have to be read, none longer than CHUNK."""
    ranges = [(start, length)]
    if _ALLOCATION in nbd.contexts:
        status = await nbd.block_status(start, length, _ALLOCATION)
        ranges = [(extent.offset, extent.length) for extent in status if not extent.flags & _ZERO]
    return [
        (at, min(CHUNK, offset + count - at))
        for offset, count in ranges
        for at in range(offset, offset + count, CHUNK)
    ]


def _write(file: durable.DurableFile, data: bytes, offset: int) -> None:
    if data.count(0) == len(data):
        return
    try:
        file.write_at(data, offset)
    except OSError as error:
        raise _cannot_write(file.path, error) from error


def _finish(file: durable.DurableFile, partial: Path, target: Path) -> None:
    try:
        file.sync()
        durable.rename(partial, target)
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(path: str | Path, error: OSError) -> ReplicatorError:
    return ReplicatorError(f"cannot write {path}: {error.strerror}")


__all__ = ["check_target", "copy_disk", "partial_path"]
