# SPDX-License-Identifier: AGPL-3.0-or-later
"""File operations that change what is on disk, in one place.

Every one of them calls ``observe`` with the name of the step and the path *before* it acts. In
production that does nothing; the crash tests put in a function that kills the process at the n-th
step, so that every point at which a crash can leave a half-finished state is visited by counting
and not by luck.

All calls block: callers run them in worker threads. Calls that a signal interrupts are repeated
(PEP 475). After an error from ``sync`` the content on disk is unknown: open the file anew and write
again what mattered.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

StrPath = str | os.PathLike[str]


def _nothing(step: str, path: str) -> None:
    del step, path


#: Called as ``observe(step, path)`` before each durable step; replaced only by tests.
observe: Callable[[str, str], None] = _nothing


class DurableFile:
    """A file opened for reading and writing whose every change passes ``observe``.

    Made with ``create``, its name is durable only after ``sync_dir`` of its directory: the caller
    does that once for all the files that it made there. ``exclusive`` (only with ``create``) raises
    FileExistsError if the file is there.
    """

    __slots__ = ("fd", "path")

    def __init__(self, path: StrPath, *, create: bool = False, exclusive: bool = False) -> None:
        if exclusive and not create:
            raise ValueError("exclusive means nothing without create")
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        self.path = os.fspath(path)
        if create:
            observe("create", self.path)
        self.fd = os.open(self.path, flags, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self.fd).st_size

    def read_at(self, length: int, offset: int) -> bytes:
        """Read ``length`` bytes at ``offset``; fewer only where the file ends."""
        data = os.pread(self.fd, length, offset)
        if len(data) == length or not data:
            return data
        pieces = [data]
        got = len(data)
        while got < length and (data := os.pread(self.fd, length - got, offset + got)):
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def next_data(self, offset: int) -> int | None:
        """Where data begins at ``offset`` or after it; None if only holes are left (SEEK_DATA)."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def has_data(self, offset: int, length: int) -> bool:
        """False if the range is known to be a hole, or beyond the end: then it reads as zeros."""
        found = self.next_data(offset)
        return found is not None and found < offset + length

    def write_at(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``; raises OSError, then the range is undefined."""
        observe("write", self.path)
        self._write(memoryview(data).cast("B"), offset)

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self.fd, view, offset)
            except OSError as error:
                # An operator has to know which file system is full.
                raise OSError(error.errno, error.strerror, self.path) from error
            if written == 0:
                raise OSError(errno.EIO, "nothing was written", self.path)
            view = view[written:]
            offset += written

    def truncate(self, length: int) -> None:
        """Set the file's length in bytes."""
        observe("truncate", self.path)
        os.ftruncate(self.fd, length)

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give back its space, where the file system can. The size
        stays.
        """
        if offset < 0 or length <= 0:
            raise ValueError(f"punch of {length} bytes at {offset}")
        observe("punch", self.path)
        try:
            done = _punch_hole(self.fd, offset, length)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        if not done:
            self._write_zeros(offset, min(offset + length, self.size))

    def _write_zeros(self, offset: int, end: int) -> None:
        zeros = memoryview(bytes(1 << 20))
        while offset < end:
            piece = zeros[: end - offset]
            self._write(piece, offset)
            offset += len(piece)

    def sync(self) -> None:
        """Make everything written so far survive a power cut (fdatasync)."""
        observe("fsync", self.path)
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def close(self) -> None:
        """Close the descriptor; calling it again does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _punch_hole(fd: int, offset: int, length: int) -> bool:
    """True if the hole was made, False where the file system has no holes. Raises OSError."""
    while True:
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(fd, mode, offset, length) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise OSError(code, os.strerror(code))


def make_dir(path: StrPath) -> None:
    """Make a directory (mode 0700) durably if it is not there; its parent must exist."""
    path = os.fspath(path)
    parent = os.path.dirname(path) or "."
    if not os.path.isdir(path):
        observe("mkdir", path)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):  # else another thread was faster
                raise
    elif not os.access(parent, os.R_OK | os.W_OK):
        return  # not made by us, so there is nothing of ours to make durable
    # Also when it was there: a crash may have come between the two steps last time.
    sync_dir(parent)


def sync_dir(path: StrPath) -> None:
    """Make the names in a directory durable."""
    path = os.fspath(path)
    observe("fsync", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: StrPath, target: StrPath) -> None:
    """Rename durably, replacing the target. A crash leaves one of the two names, never neither.

    What the file holds must have been synced before: the name may become durable ahead of it.
    """
    observe("rename", os.fspath(source))
    os.rename(source, target)
    into = os.path.dirname(os.fspath(target)) or "."
    out_of = os.path.dirname(os.fspath(source)) or "."
    sync_dir(into)
    if out_of != into:
        sync_dir(out_of)


def unlink(path: StrPath) -> None:
    """Remove a file if it is there.

    Not synced: after a power cut the name may be back, and a sweep at start removes it again.
    Whoever needs it gone for good before going on calls ``sync_dir``.
    """
    observe("unlink", os.fspath(path))
    Path(path).unlink(missing_ok=True)


def remove_dir(path: StrPath) -> None:
    """Remove an empty directory if it is there; raises OSError if it is not empty. Not synced, as
    ``unlink``.
    """
    observe("rmdir", os.fspath(path))
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


def write_file(path: StrPath, data: bytes) -> None:
    """Replace a small file as a whole: afterwards, and after any crash, it is the old one or the
    new one.

    A crash or an error can leave ``path + ".new"``; the next call overwrites it, and sweeps at
    start remove it.
    """
    temporary = os.fspath(path) + ".new"
    with DurableFile(temporary, create=True) as file:
        file.truncate(0)
        file.write_at(data, 0)
        file.sync()
    rename(temporary, path)
