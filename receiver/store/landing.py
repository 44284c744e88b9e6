# SPDX-License-Identifier: AGPL-3.0-or-later
"""A push on its way in: each disk's stream is checked record by record and lands in a partial file.

Nothing here is a recovery point. What is acknowledged has been verified (structure, digests of the plain bytes), synced and
journalled; what a crash leaves behind that is cut off before the push goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from replicator import durable
from replicator.domain.model import file_stem
from replicator.errors import PhcbtError, WireError
from replicator.phcbt.decode import NEED_DATA, DataRecord, Header
from replicator.phcbt.format import StreamHeader
from replicator.phcbt.read import StoredDelta
from replicator.phcbt.resume import resume_partial
from replicator.wire.messages import Open, OpenDisk, vm_uuid


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

    def __init__(self, path: Path, expected: Expected, watermark: int) -> None:
        self.path = path
        self._expected = expected
        self._file = durable.DurableFile(path, create=True)
        try:
            limit = min(self._file.size, expected.disk.have, watermark)
            self._decoder, self.position = resume_partial(self._file.fd, limit)
            if self._decoder.header is not None:
                expected.check(self._decoder.header)
            if self._file.size > self.position:
                self._file.truncate(self.position)
        except BaseException:
            self._file.close()
            raise
        self.received = self.position
        self.durable = self.position

    @property
    def ended(self) -> bool:
        """Whether the stream is whole."""
        return self._decoder.ended

    def feed(self, offset: int, payload: bytes | memoryview) -> None:
        """Take the next piece of the stream. Raises WireError or PhcbtError; then the push is refused."""
        if offset != self.received:
            raise WireError(f"{self.path.name}: data at {offset}, expected at {self.received}")
        self._decoder.receive_data(payload)
        while (event := self._decoder.next_event()) is not NEED_DATA:
            if isinstance(event, Header):
                self._expected.check(event.header)
            elif isinstance(event, DataRecord):
                assert self._decoder.header is not None
                event.plain(self._decoder.header)
            self.position = self._decoder.position
        self._file.write_at(payload, offset)
        self.received += len(payload)

    def sync(self) -> int:
        """Make what is verified durable; returns the position up to which it is."""
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
        """Close the file; it stays."""
        self._file.close()


class Landing:
    """All disks of one push."""

    def __init__(
        self, folder: Path, opened: Open, expected: list[Expected], watermarks: list[int]
    ) -> None:
        self.opened = opened
        self.folder = folder
        durable.make_dir(folder)
        self.disks: list[DiskLanding] = []
        try:
            for disk, watermark in zip(expected, watermarks, strict=True):
                path = folder / f"{file_stem(disk.disk.disk, disk.disk.since)}.phcbt"
                self.disks.append(DiskLanding(path, disk, watermark))
            durable.sync_dir(folder)
        except BaseException:
            self.close()
            raise

    @property
    def positions(self) -> tuple[int, ...]:
        """Where each disk's stream goes on."""
        return tuple(disk.position for disk in self.disks)

    def sync(self) -> list[int]:
        """Make everything verified so far durable; the positions up to which it is."""
        return [disk.sync() for disk in self.disks]

    def finish(self) -> None:
        """All streams are whole and durable. Raises PhcbtError that names the disk that is not."""
        for disk in self.disks:
            if not disk.ended:
                raise PhcbtError(disk.received, f"{disk.path.name}: the stream has no end")
            disk.sync()

    def close(self) -> None:
        """Close all files; they stay."""
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
