# SPDX-License-Identifier: AGPL-3.0-or-later
"""The bytes of simulated disks: real, sparse files below one directory. Copies are clones where the file system can.

What changed between two snapshots is found by comparing their files, so it is true whoever wrote to the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_FICLONE = 0x40049409
_CANNOT_CLONE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})
_COPY_MAX = 1 << 30
_COMPARE = 1 << 20

Region = tuple[int, int, bool]


class Storage:
    """Files of one simulator. Every method blocks: call it from a worker thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("disks", "snapshots", "groups", "images", "vms"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def disk(self, backing: str) -> Path:
        """The file of a VM's disk."""
        return self.root / "disks" / f"{backing}.raw"

    def snapshot(self, uuid: str) -> Path:
        """The file of a disk in a snapshot."""
        return self.root / "snapshots" / f"{uuid}.raw"

    def group_disk(self, uuid: str) -> Path:
        """The file of a volume group's disk."""
        return self.root / "groups" / f"{uuid}.raw"

    def image(self, uuid: str) -> Path:
        """The file of an image."""
        return self.root / "images" / f"{uuid}.img"

    def lock_path(self, vm: str) -> Path:
        """What every writer to a VM's disks holds a shared lock (flock) on while it writes."""
        return self.root / "vms" / f"{vm}.lock"

    @contextmanager
    def held(self, vms: list[str]) -> Iterator[None]:
        """Nobody writes to these VMs' disks meanwhile who keeps to the lock."""
        with ExitStack() as stack:
            for vm in sorted(vms):
                fd = os.open(self.lock_path(vm), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self, vm: str) -> Iterator[None]:
        """For a writer: no snapshot of the VM is taken meanwhile."""
        fd = os.open(self.lock_path(vm), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)


def make_blank(path: Path, size: int) -> None:
    """A file of ``size`` zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


def copy(source: Path, target: Path, size: int | None = None) -> None:
    """``target`` becomes a copy of ``source``, grown with zeros to ``size`` if that is larger. Removed if it fails."""
    try:
        with source.open("rb") as old, target.open("wb") as new:
            try:
                fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    raise
                _copy_data(old.fileno(), new.fileno())
            length = os.fstat(old.fileno()).st_size
            new.truncate(max(length, size or 0))
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _copy_data(source: int, target: int) -> None:
    os.ftruncate(target, os.fstat(source).st_size)
    for start, end in data_ranges(source, 0, os.fstat(source).st_size):
        at = start
        while at < end:
            count = os.copy_file_range(source, target, min(end - at, _COPY_MAX), at, at)
            if not count:
                return  # it became shorter meanwhile
            at += count


def data_ranges(fd: int, start: int, end: int) -> Generator[tuple[int, int], None, None]:
    """The ranges of a file that hold data, inside ``start`` to ``end``."""
    at = start
    while at < end:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if begin >= end:
            return
        at = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        yield begin, at


def changed(
    path: Path, reference: Path | None, start: int, end: int, *, block: int, limit: int
) -> tuple[list[Region], int | None]:
    """Regions (offset, length, zeroed) of ``path`` that differ from ``reference``, in whole blocks, and where to go on.

    Without a reference: data, and holes as zeroed. At most ``limit`` regions; a block at the end may reach past the file.
    """
    with ExitStack() as stack:
        new = stack.enter_context(path.open("rb")).fileno()
        size = os.fstat(new).st_size
        end = min(end, size)
        start = start // block * block
        if reference is None:
            pieces = _map_of(new, start, end, block)
        else:
            old = stack.enter_context(reference.open("rb")).fileno()
            pieces = _differences(new, old, start, end, block)
        found: list[Region] = []
        for offset, length, zeroed in pieces:
            last = found[-1] if found else None
            if last is not None and last[0] + last[1] == offset and last[2] == zeroed:
                found[-1] = (last[0], last[1] + length, zeroed)
                continue
            if len(found) == limit:
                return found, offset
            found.append((offset, length, zeroed))
    return found, None


def _widened(ranges: Iterator[tuple[int, int]], end: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges in whole blocks, joined where they meet."""
    open_start, open_end = -1, -1
    for first, last in ranges:
        begin, stop = first // block * block, -(-last // block) * block
        if open_start >= 0 and begin <= open_end:
            open_end = max(open_end, stop)
            continue
        if open_start >= 0:
            yield open_start, open_end
        open_start, open_end = begin, stop
    if open_start >= 0:
        yield open_start, min(open_end, -(-end // block) * block)


def _map_of(fd: int, start: int, end: int, block: int) -> Iterator[Region]:
    at = start
    for begin, stop in _widened(data_ranges(fd, start, end), end, block):
        if begin > at:
            yield at, begin - at, True
        yield begin, stop - begin, False
        at = stop
    if at < end:
        yield at, end - at, True


def _differences(new: int, old: int, start: int, end: int, block: int) -> Iterator[Region]:
    """Blocks that differ. Holes in both files are not looked at."""
    both = sorted([*data_ranges(new, start, end), *data_ranges(old, start, end)])
    for begin, stop in _widened(iter(both), end, block):
        at = begin
        while at < stop:
            step = min(_COMPARE, stop - at)
            one, two = os.pread(new, step, at), os.pread(old, step, at)
            if one != two:
                for inner in range(0, len(one), block):
                    piece = one[inner : inner + block]
                    other = two[inner : inner + block].ljust(len(piece), b"\0")
                    if piece != other:
                        yield at + inner, block, not any(piece)
            at += step
