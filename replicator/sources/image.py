# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plain raw images and block devices as a source, without change tracking.

Where the file system can (``FICLONE``: XFS, btrfs), a snapshot is a clone of each image. Elsewhere
the images are read in place, and nobody may write to them meanwhile: inode, size and times are
recorded, and a change of any of them ends the snapshot. Best effort, both ways: writes between the
clones of two disks are seen by their times only, and a block device's times say nothing of writes
through it. A running VM needs ``source = qemu``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import UUID, uuid5

import trio

from replicator import durable
from replicator.disk import Extent
from replicator.errors import ReferenceLostError, SnapshotGoneError, SourceError, UsageError
from replicator.sources import snapshot_names as names
from replicator.sources.base import HeldSnapshot, SnapshotName, SourceDisk, VmIdentity

_UUID_NAMESPACE = UUID("0b7a4f6e-1c5d-5e0a-8a51-6a1f0b8f4d27")
_IDENTITY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_FICLONE = 0x40049409
_CANNOT_CLONE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
)
_READS_MAX = 16
_EXTENTS_AT_ONCE = 1024
_RECORD_LENGTH_MAX = 1 << 20
#: Times on files come from a clock that may tick this rarely: a younger time would hide a write
#: that follows.
_SETTLED_NS = 50_000_000
_SETTLE_TRIES = 100
_CHANGED = "image changed while it was being read: stop what writes to it or use source = qemu ({})"


@dataclass(frozen=True, slots=True)
class Token:
    """What changes when an image is written to. ``size`` in bytes, of a device by its end."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class _ImageRecord:
    identity: str
    path: str
    token: Token


@dataclass(frozen=True, slots=True)
class _Record:
    """What outlives the process. ``cloned``: the clones are read, not the images."""

    push_id: str
    taken_at_us: int
    cloned: bool
    images: tuple[_ImageRecord, ...]

    def save(self, working_dir: Path) -> None:
        path = names.record_path(working_dir, self.push_id)
        durable.write_file(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, working_dir: Path, push_id: str) -> _Record:
        """Raises SnapshotGoneError if there is none, SourceError if it is damaged."""
        path = names.record_path(working_dir, push_id)
        try:
            with path.open("rb") as file:
                raw = json.loads(file.read(_RECORD_LENGTH_MAX))
            images = tuple(
                _ImageRecord(str(i["identity"]), str(i["path"]), Token(**i["token"]))
                for i in raw["images"]
            )
            return cls(str(raw["push_id"]), int(raw["taken_at_us"]), bool(raw["cloned"]), images)
        except FileNotFoundError:
            raise SnapshotGoneError(f"no snapshot of push {push_id}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"snapshot record {path} is damaged") from error


class ImageView:
    """A ``DiskView`` of an open file or block device that nobody writes to."""

    def __init__(self, path: Path, size: int, limiter: trio.CapacityLimiter) -> None:
        """Opens ``path`` for reading; raises OSError. Blocking, briefly."""
        self._path = path
        self._size = size
        self._limiter = limiter
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes in a worker thread; raises SourceError."""
        if offset < 0 or length <= 0 or offset + length > self._size:
            raise ValueError(f"{length} bytes at {offset} of an image of {self._size} bytes")
        return await trio.to_thread.run_sync(self._read, offset, length, limiter=self._limiter)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_now(offset, memoryview(buffer))
        return bytes(buffer)

    def read_now(self, offset: int, room: memoryview) -> None:
        """See ``ReadsNow``."""
        if offset < 0 or offset + len(room) > self._size:
            raise ValueError(f"{len(room)} bytes at {offset} of an image of {self._size} bytes")
        view = room
        try:
            while view:
                count = os.preadv(self._fd, [view], offset)
                if not count:
                    raise SnapshotGoneError(_CHANGED.format(f"{self._path} is shorter now"))
                view = view[count:]
                offset += count
        except OSError as error:
            raise SourceError(f"cannot read {self._path}: {error.strerror}") from error

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        """Everything but holes. ``since`` anything raises ReferenceLostError: nobody recorded
        changes.
        """
        if since is not None:
            raise ReferenceLostError("plain images record no changes: digests are compared")
        at = 0
        while at < self._size:
            found, at = await trio.to_thread.run_sync(self._data, at, limiter=self._limiter)
            for extent in found:
                yield extent

    def _data(self, at: int) -> tuple[list[Extent], int]:
        """The next data ranges from ``at`` on, and where to go on."""
        found: list[Extent] = []
        try:
            while at < self._size and len(found) < _EXTENTS_AT_ONCE:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                if start >= self._size:
                    return found, self._size
                at = min(os.lseek(self._fd, start, os.SEEK_HOLE), self._size)
                found.append(Extent(start, at - start))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found, self._size
            if error.errno == errno.EINVAL:
                # A block device has no holes to tell of.
                return [Extent(at, self._size - at)], self._size
            raise SourceError(f"cannot read {self._path}: {error.strerror}") from error
        return found, at

    def close(self) -> None:
        """Close the file; can be repeated."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class ImageSnapshot:
    """Images that must not change while they are read, or clones that cannot."""

    def __init__(self, record: _Record, disks: list[SourceDisk], views: list[ImageView]) -> None:
        self._record = record
        self._disks = disks
        self._views = views

    @property
    def taken_at_us(self) -> int:
        """The instant, in microseconds since the epoch, UTC."""
        return self._record.taken_at_us

    @property
    def disks(self) -> Sequence[SourceDisk]:
        """Every disk, by identity."""
        return self._disks

    @property
    def lost_tracking(self) -> str | None:
        """None: comparing digests is how this source works, nothing was lost."""
        return None

    async def check(self) -> None:
        """Raise SnapshotGoneError if an image that is read in place was changed."""
        await trio.to_thread.run_sync(_check, self._record)

    async def aclose(self) -> None:
        """Close the files; can be repeated."""
        for view in self._views:
            view.close()
        await trio.lowlevel.checkpoint()


class ImageSource:
    """A VM given as plain images or block devices: ``disks`` is disk id to path. Implements
    ``Source``.

    ``working_dir`` belongs to this VM alone; clones need it on the images' file system. ``grain``
    is only checked: without change tracking nothing depends on it. Raises UsageError for disk ids
    that cannot be used.
    """

    def __init__(self, name: str, disks: Mapping[str, Path], working_dir: Path, grain: int) -> None:
        if not disks:
            raise UsageError(f"{name} has no disk")
        if grain <= 0 or grain & (grain - 1):
            raise UsageError(f"grain {grain} is not a power of two")
        for identity in disks:
            if not _IDENTITY.fullmatch(identity):
                raise UsageError(f"{identity!r} cannot be a disk's id")
        self._name = name
        self._paths = dict(sorted(disks.items()))
        self._dir = working_dir
        self._limiter = trio.CapacityLimiter(_READS_MAX)

    async def identify(self) -> VmIdentity:
        """A UUID made from the name."""
        await trio.lowlevel.checkpoint()
        return VmIdentity(uuid5(_UUID_NAMESPACE, self._name), self._name)

    async def take(self, name: SnapshotName) -> ImageSnapshot:
        """See ``Source``. Raises UsageError for a missing image, SourceError for one that is being
        written to.
        """
        names.check_push_id(name.push_id)
        tokens = await self._settled_tokens()
        record = await trio.to_thread.run_sync(self._take, name.push_id, tokens)
        return await trio.to_thread.run_sync(self._open, record)

    async def reopen(self, name: SnapshotName) -> ImageSnapshot:
        """See ``Source``."""
        record = await trio.to_thread.run_sync(_Record.load, self._dir, name.push_id)
        await trio.to_thread.run_sync(_check, record)
        return await trio.to_thread.run_sync(self._open, record)

    async def confirm(self, name: SnapshotName) -> None:
        """See ``Source``. A reference needs nothing kept here."""
        await trio.to_thread.run_sync(self._remove, name.push_id)

    async def abandon(self, name: SnapshotName) -> None:
        """See ``Source``."""
        await trio.to_thread.run_sync(self._remove, name.push_id)

    async def held(self) -> list[HeldSnapshot]:
        """See ``Source``. Images that are read in place take no room."""
        return await trio.to_thread.run_sync(self._held)

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        """See ``Source``."""
        del reference
        kept = keep.push_id if keep is not None else None
        return await trio.to_thread.run_sync(self._sweep, kept)

    async def _settled_tokens(self) -> dict[str, Token]:
        """Tokens whose times are old enough that any later write changes them."""
        for _ in range(_SETTLE_TRIES):
            tokens = await trio.to_thread.run_sync(self._tokens)
            newest = max(max(t.mtime_ns, t.ctime_ns) for t in tokens.values())
            if abs(time.time_ns() - newest) > _SETTLED_NS:
                return tokens
            await trio.sleep(_SETTLED_NS / 1e9)
        raise SourceError(_CHANGED.format("it is written to all the time"))

    def _tokens(self) -> dict[str, Token]:
        return {identity: _token(path) for identity, path in self._paths.items()}

    def _take(self, push_id: str, tokens: Mapping[str, Token]) -> _Record:
        durable.make_dir(self._dir)
        taken_at_us = time.time_ns() // 1000
        cloned = self._clone(push_id)
        if cloned and self._tokens() != tokens:
            self._remove(push_id)
            raise SourceError(_CHANGED.format("while it was cloned"))
        images = tuple(
            _ImageRecord(identity, str(path), tokens[identity])
            for identity, path in self._paths.items()
        )
        if cloned:
            images = tuple(
                _ImageRecord(
                    image.identity,
                    str(names.clone_path(self._dir, push_id, index)),
                    _token(names.clone_path(self._dir, push_id, index)),
                )
                for index, image in enumerate(images)
            )
        record = _Record(push_id, taken_at_us, cloned, images)
        record.save(self._dir)
        return record

    def _clone(self, push_id: str) -> bool:
        """Clone every image; False, and nothing left, where that cannot be done."""
        for index, path in enumerate(self._paths.values()):
            try:
                _clone(path, names.clone_path(self._dir, push_id, index))
            except OSError as error:
                self._remove(push_id)
                if error.errno in _CANNOT_CLONE:
                    return False
                raise SourceError(f"cannot clone {path}: {error.strerror}") from error
        return True

    def _open(self, record: _Record) -> ImageSnapshot:
        views: list[ImageView] = []
        try:
            for image in record.images:
                view = ImageView(Path(image.path), image.token.size, self._limiter)
                views.append(view)
        except OSError as error:
            for view in views:
                view.close()
            raise SnapshotGoneError(f"cannot open {error.filename}: {error.strerror}") from error
        disks = [
            SourceDisk(image.identity, view)
            for image, view in zip(record.images, views, strict=True)
        ]
        return ImageSnapshot(record, disks, views)

    def _remove(self, push_id: str) -> None:
        for name in names.our_files(self._dir):
            if names.push_of_file(name) == push_id:
                durable.unlink(self._dir / name)

    def _held(self) -> list[HeldSnapshot]:
        held = []
        for push_id, made_us in names.held_files(self._dir).items():
            try:
                taken_at_us = _Record.load(self._dir, push_id).taken_at_us
            except (
                SourceError
            ):  # the clones came first, or a record that is damaged: they take room all the same
                taken_at_us = made_us
            held.append(HeldSnapshot(push_id, taken_at_us))
        return sorted(held, key=lambda each: each.taken_at_us)

    def _sweep(self, kept: str | None) -> list[str]:
        strays = [n for n in names.our_files(self._dir) if names.push_of_file(n) != kept]
        for name in strays:
            durable.unlink(self._dir / name)
        return strays


def _token(path: Path) -> Token:
    """Raises UsageError where there is no image."""
    try:
        status = os.stat(path)
        size = status.st_size
        if stat.S_ISBLK(status.st_mode):
            size = _device_size(path)
        elif not stat.S_ISREG(status.st_mode):
            raise UsageError(f"image {path} is neither a file nor a block device")
    except OSError as error:
        raise UsageError(f"cannot use image {path}: {error.strerror}") from error
    if not size:
        raise UsageError(f"image {path} is empty")
    return Token(status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns)


def _device_size(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _clone(source: Path, target: Path) -> None:
    """Clone a file by reference; raises OSError, of _CANNOT_CLONE where the file system cannot."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EOPNOTSUPP, "a block device cannot be cloned")
        with durable.DurableFile(target, create=True) as file:
            durable.observe("clone", str(target))
            fcntl.ioctl(file.fd, _FICLONE, fd)
            file.sync()
    finally:
        os.close(fd)


def _check(record: _Record) -> None:
    """Raise SnapshotGoneError if what the record names is not what was recorded."""
    for image in record.images:
        try:
            now = _token(Path(image.path))
        except UsageError as error:
            raise SnapshotGoneError(_CHANGED.format(str(error))) from error
        if now != image.token:
            raise SnapshotGoneError(_CHANGED.format(image.path))
