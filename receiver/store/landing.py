# SPDX-License-Identifier: AGPL-3.0-or-later
"""A push on its way in: each disk's stream is checked record by record and lands in a partial file.

Nothing here is a recovery point. What is acknowledged has been verified (structure, digests of the plain bytes), synced and
journalled; what a crash leaves behind that is cut off before the push goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from replicator import durable
from replicator.direct import Appender, Staging
from replicator.domain.model import file_stem
from replicator.errors import DamageError, PhcbtError, WireError
from replicator.phcbt.decode import NEED_DATA, DataRecord, Header
from replicator.phcbt.format import StreamHeader
from replicator.phcbt.read import StoredDelta
from replicator.phcbt.resume import resume_partial
from replicator.wire.messages import DATA_MAX, Open, OpenDisk, vm_uuid

#: How much of what a crash left is read at once when it is checked again, bytes.
_TAKE_UP = 1 << 20


class StreamMismatchError(WireError):
    """A stream is not the one that the Open message announced."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stream's header must say, from the Open message and the log."""

    open: Open
    disk: OpenDisk
    base_root: bytes
    grain: int | None
    algorithm: int | None

    def check(self, header: StreamHeader) -> None:
        """Raise StreamMismatchError where the header is not the push's."""
        base = 0 if self.disk.since == self.open.point else self.open.parent
        pairs = {
            "VM": (header.vm, vm_uuid(self.open.vm)),
            "disk": (header.disk_id, self.disk.disk),
            "disk size": (header.disk_size, self.disk.size),
            "base point": (header.base_point, base),
            "base root": (header.base_root, self.base_root if base else bytes(32)),
            "target point": (header.target_point, self.open.point),
            "grain": (header.grain, self.grain or header.grain),
            "digest algorithm": (int(header.algorithm), self.algorithm or int(header.algorithm)),
        }
        for what, (got, wanted) in pairs.items():
            if got != wanted:
                shown = "other" if isinstance(wanted, bytes) else wanted
                raise StreamMismatchError(
                    f"{self.disk.disk}: the stream's {what} is not the push's ({shown})"
                )


class DiskLanding:
    """One disk's partial file. All methods block and are called by one task at a time."""

    def __init__(self, path: Path, expected: Expected, watermark: int, staging: Staging) -> None:
        self.path = path
        self._expected = expected
        self._file = durable.DurableFile(path, create=True)
        try:
            limit = min(self._file.size, expected.disk.have)
            self._decoder, self.position = resume_partial(self._file.fd, min(limit, watermark))
            if self._decoder.header is not None:
                expected.check(self._decoder.header)
            self._checked = self.position
            if limit > self.position:
                self._take_up(limit)
            if self._file.size > self.position:
                self._file.truncate(self.position)
            if self.position > watermark:
                self._file.sync()
        except BaseException:
            self._file.close()
            raise
        self.received = self.position
        self.durable = self.position
        self._appender = Appender(self._file, self.position, staging)
        self._ahead: list[int] = []  # ends of records that are checked and not all written

    def _take_up(self, limit: int) -> None:
        """Go on over what lies behind the durable part, up to stream byte ``limit``: written by a process that ended before it
        could make it durable. Only what proves to be right is taken, record by record, as if it came again.
        """
        at = self.position
        try:
            while at < limit and (piece := self._file.read_at(min(_TAKE_UP, limit - at), at)):
                at += len(piece)
                self._check(piece)
        except (WireError, PhcbtError, DamageError):
            pass  # torn, or never written: it comes again from the last good record on
        # What follows must begin at a record, and this decoder has seen a part of what will be cut off.
        self._decoder, self.position = resume_partial(self._file.fd, self._checked)

    @property
    def checked(self) -> int:
        """The end of the last record that is whole and right, written or not."""
        return self._checked

    @property
    def ended(self) -> bool:
        """Whether the stream is whole."""
        return self._decoder.ended

    def feed(self, offset: int, payload: bytes | memoryview) -> None:
        """Take the next piece of the stream. Raises WireError or PhcbtError; then the push is refused.

        ``position`` is the end of the last record that is written; the end of a piece may wait for the next one, or for
        ``flush``.
        """
        if offset != self.received:
            raise WireError(f"{self.path.name}: data at {offset}, expected at {self.received}")
        self._check(payload)
        self._appender.append(payload)
        self.received += len(payload)
        self._move_on()

    def flush(self) -> None:
        """Write what waits for more."""
        self._appender.flush()
        self._move_on()

    def _move_on(self) -> None:
        """Bring ``position`` to the last end of a record that is written."""
        if self._checked > (self._ahead[-1] if self._ahead else self.position):
            self._ahead.append(self._checked)
        while self._ahead and self._ahead[0] <= self._appender.written:
            self.position = self._ahead.pop(0)

    def _check(self, payload: bytes | memoryview) -> None:
        self._decoder.receive_data(payload)
        while (event := self._decoder.next_event()) is not NEED_DATA:
            if isinstance(event, Header):
                self._expected.check(event.header)
            elif isinstance(event, DataRecord):
                assert self._decoder.header is not None
                event.plain(self._decoder.header)
            self._checked = self._decoder.position

    def sync(self) -> int:
        """Make what is verified and written durable; returns the position up to which it is. May run beside ``feed``."""
        position = self.position
        if position > self.durable:
            self._file.sync()
            self.durable = position
        return self.durable

    def stream_root(self) -> bytes:
        """The root of the whole stream."""
        with StoredDelta(self.path) as delta:
            return delta.root

    def close(self) -> None:
        """Close the file; it stays, up to ``position`` at least."""
        self._appender.close()
        self._file.close()


class Landing:
    """All disks of one push."""

    def __init__(
        self, folder: Path, opened: Open, expected: list[Expected], watermarks: list[int]
    ) -> None:
        self.opened = opened
        self.folder = folder
        #: When it began, or went on after a break, microseconds since the epoch.
        self.since_us = time.time_ns() // 1000
        self.closed = False
        durable.make_dir(folder)
        self.disks: list[DiskLanding] = []
        staging = Staging(DATA_MAX)
        try:
            for disk, watermark in zip(expected, watermarks, strict=True):
                path = folder / f"{file_stem(disk.disk.disk, disk.disk.since)}.phcbt"
                self.disks.append(DiskLanding(path, disk, watermark, staging))
            durable.sync_dir(folder)
        except BaseException:
            self.close()
            raise

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each disk's stream goes on."""
        return tuple(disk.position for disk in self.disks)

    @property
    def received(self) -> int:
        """Bytes of all streams that have come."""
        return sum(disk.received for disk in self.disks)

    @property
    def unfinished(self) -> int:
        """Bytes of records that have begun and are not whole: all that is kept in memory of the streams."""
        return sum(disk.received - disk.checked for disk in self.disks)

    def feed(self, index: int, offset: int, payload: bytes | memoryview, *, last: bool) -> None:
        """Take the next piece of a disk's stream; ``last``: no other one is there for now, so that nothing is to wait for it."""
        self.disks[index].feed(offset, payload)
        if last:
            self.flush()

    def flush(self) -> None:
        """Write what of any disk waits for more."""
        for disk in self.disks:
            disk.flush()

    def sync(self) -> list[int]:
        """Make everything verified so far durable; the positions up to which it is."""
        return [disk.sync() for disk in self.disks]

    def finish(self) -> None:
        """All streams are whole and durable. Raises PhcbtError that names the disk that is not."""
        for disk in self.disks:
            if not disk.ended:
                raise PhcbtError(disk.received, f"{disk.path.name}: the stream has no end")
            disk.flush()
            disk.sync()

    def close(self) -> None:
        """Close all files; they stay."""
        self.closed = True
        for disk in self.disks:
            disk.close()


def remove_folder(folder: Path, keep: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Unlink the files in a folder (one level) that ``keep`` does not want, then the folder if it is empty."""
    removed: list[Path] = []
    if not folder.is_dir():
        return removed
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not keep(entry):
            durable.unlink(entry)
            removed.append(entry)
    if not os.listdir(folder):
        durable.remove_dir(folder)
    return removed
