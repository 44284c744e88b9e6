# SPDX-License-Identifier: AGPL-3.0-or-later
"""Putting an image together: a full one from its data, then deltas, each checked before and after it is written.

The image is a sparse file; beside it, in scratch, stands the map of its grains' digests, whose root says what the image is.
Nothing is read back: what is written was digested in the same memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from bacula_adapter.restore.files import open_own
from bacula_adapter.restore.lane import Lane, cpus
from bacula_adapter.restore.plan import Step
from replicator import durable
from replicator.direct import BLOCK, PastCache
from replicator.errors import DamageError, PhcbtError
from replicator.imagemap import ImageMap, MapWriter
from replicator.phcbt import NEED_DATA, DataRecord, Decoder, Header, ZeroRecord
from replicator.phcbt.format import Algorithm, GrainRun, StreamHeader

#: What is digested and written in one step; the largest grain, so that no grain lies in two.
WINDOW: Final = 1 << 20
#: Windows, or records, on their way at once.
DEPTH: Final = 6
#: Bytes of records on their way at once, whatever their size.
_AHEAD: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """How an image is digested."""

    algorithm: Algorithm = Algorithm.XXH3_128
    grain: int = 64 << 10

    @classmethod
    def of(cls, step: Step) -> Shape:
        """That of a part."""
        return cls(Algorithm(step.part.algorithm), step.part.grain)


class Image:
    """A disk's image on its way: the file at ``path``, ``size`` bytes, and its map. All methods block; ``close`` any time."""

    def __init__(self, path: Path, scratch: Path, size: int, shape: Shape) -> None:
        """Begin an image of zeros. What a restore that was killed has left under that name is overwritten."""
        self.path = path
        self.shape = shape
        self._scratch = scratch
        self._file = open_own(path)
        self.direct = PastCache(self._file)
        try:
            self._file.truncate(0)
            self._file.truncate(size)
            self.direct.open()
            self.map = self._new_map(size)
        except BaseException:
            self.discard()
            raise

    def _new_map(self, size: int) -> ImageMap:
        self._scratch.unlink(missing_ok=True)
        return ImageMap.create(self._scratch, self.shape.algorithm, self.shape.grain, size, 0)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.map.disk_size

    @property
    def root(self) -> bytes:
        """What the image is, by its map."""
        return self.map.root()

    def grow(self, size: int) -> None:
        """Make the file as long as the disk of the next part."""
        self._file.truncate(size)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write through the page cache."""
        self._file.write_at(data, offset)

    def write_aligned(self, view: memoryview, offset: int) -> None:
        """Write aligned memory from a block border on: past the page cache as far as that goes."""
        whole = len(view) // BLOCK * BLOCK
        if not self.direct.write(view[:whole], offset):
            whole = 0
        if whole < len(view):
            self._file.write_at(view[whole:], offset + whole)

    def clear(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        self._file.punch(offset, length)

    def reshape(self, shape: Shape) -> None:
        """Digest the whole file anew, in another way; reads where it holds data."""
        size = self.size
        self.map.close()
        self.shape = shape
        self.map = self._new_map(size)
        writer = self.map.write(size, 1)
        for first, count in self._windows(size):
            data = self._file.read_at(count, first)
            digests = shape.algorithm.digest_grains(data, shape.grain)
            writer.put(
                GrainRun(first // shape.grain, len(digests) // shape.algorithm.digest_size, digests)
            )
        writer.finish()

    def _windows(self, size: int) -> Iterator[tuple[int, int]]:
        at: int | None = 0
        while at is not None and at < size:
            at = self._file.next_data(at)
            if at is None or at >= size:
                return
            start = at // WINDOW * WINDOW
            yield start, min(WINDOW, size - start)
            at = start + WINDOW

    def sync(self) -> None:
        """Make the image durable."""
        self._file.sync()

    def close(self) -> None:
        """Close the file, which stays, and forget the map."""
        self.direct.close()
        self._file.close()
        if hasattr(self, "map"):
            self.map.close()
        self._scratch.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close and remove the file."""
        self.close()
        durable.unlink(self.path)


class FullFold:
    """A full image from its data: ascending, holes left out or sent as zeros. ``close`` in any case."""

    def __init__(self, image: Image, nursery: trio.Nursery, name: str) -> None:
        self._image = image
        self._name = name
        self._writer = image.map.write(image.size, 1)
        self._lane: Lane[GrainRun] = Lane(
            nursery, DEPTH, partial(_put_runs, self._writer, image.shape)
        )
        self._free: list[memoryview] = []
        self._window = -1  # where the open window begins
        self._buffer: memoryview | None = None
        self._at = 0  # first byte after what has come

    async def put(self, offset: int | None, data: bytes) -> None:
        """Take data. Raises DamageError where they are not after the last ones and inside the disk."""
        start = self._at if offset is None else offset
        end = start + len(data)
        if start < self._at or end > self._image.size:
            raise DamageError(
                f"{self._name}: data for bytes {start} to {end} after byte {self._at} of a disk of {self._image.size} bytes"
            )
        view = memoryview(data)
        while view:
            window = start // WINDOW * WINDOW
            if window != self._window:
                await self._dispatch()
                self._open(window)
            assert self._buffer is not None
            piece = view[: window + WINDOW - start]
            begin = start - window
            self._fill(begin)
            self._buffer[begin : begin + len(piece)] = piece
            start += len(piece)
            self._at = start
            view = view[len(piece) :]

    async def finish(self) -> None:
        """All data have come: what is missing is zeros."""
        await self._dispatch()
        await self._lane.drain()
        await trio.to_thread.run_sync(self._writer.finish, limiter=cpus())

    async def close(self) -> None:
        """Wait until nothing is under way."""
        await self._lane.stop()

    def _open(self, window: int) -> None:
        self._buffer = self._free.pop() if self._free else memoryview(mmap.mmap(-1, WINDOW))
        self._window = window
        self._at = max(self._at, window)

    def _fill(self, until: int) -> None:
        """Zeros from what has come up to byte ``until`` of the window."""
        begin = self._at - self._window
        if until > begin:
            assert self._buffer is not None
            self._buffer[begin:until] = bytes(until - begin)

    async def _dispatch(self) -> None:
        if self._buffer is None:
            return
        length = min(WINDOW, self._image.size - self._window)
        self._fill(length)
        buffer, self._buffer = self._buffer, None
        await self._lane.submit(partial(self._store, self._window, buffer, length))

    def _store(self, window: int, buffer: memoryview, length: int) -> GrainRun:
        """Digest a window and write what of it is not zeros; in a thread."""
        shape = self._image.shape
        digests = shape.algorithm.digest_grains(buffer[:length], shape.grain)
        for begin, end in _data_grains(digests, shape.algorithm.digest_size):
            piece = buffer[begin * shape.grain : min(end * shape.grain, length)]
            self._image.write_aligned(piece, window + begin * shape.grain)
        self._free.append(buffer)
        count = len(digests) // shape.algorithm.digest_size
        return GrainRun(window // shape.grain, count, digests)


def _data_grains(digests: bytes, size: int) -> Iterator[tuple[int, int]]:
    """Runs of grains that are not zeros: the first, and the one after the last."""
    zero, start = bytes(size), -1
    count = len(digests) // size
    for index in range(count):
        is_zero = digests[index * size : (index + 1) * size] == zero
        if is_zero and start >= 0:
            yield start, index
            start = -1
        elif not is_zero and start < 0:
            start = index
    if start >= 0:
        yield start, count


def _put_runs(writer: MapWriter, shape: Shape, runs: list[GrainRun]) -> None:
    zero = bytes(shape.algorithm.digest_size)
    for run in runs:
        if run.digests is not None and run.digests == zero * run.count:
            continue  # zeros as they are already
        writer.put(run)


class DeltaFold:
    """A delta onto an image, as its bytes come. ``close`` in any case."""

    def __init__(self, image: Image, step: Step, nursery: trio.Nursery) -> None:
        self._image = image
        self._step = step
        self._nursery = nursery
        self._decoder = Decoder()
        self._received = 0
        self._writer: MapWriter | None = None
        self._lane: Lane[GrainRun] | None = None

    async def put(self, offset: int | None, data: bytes) -> None:
        """Take the next bytes of the stream. Raises DamageError."""
        if offset is not None and offset != self._received:
            raise DamageError(f"{self._step.file}: bytes {self._received} to {offset} are missing")
        self._received += len(data)
        try:
            self._decoder.receive_data(data)
            while (event := self._decoder.next_event()) is not NEED_DATA:
                if isinstance(event, Header):
                    await self._begin(event.header)
                elif isinstance(event, DataRecord | ZeroRecord):
                    await self._submit(event)
        except (PhcbtError, DamageError) as error:
            raise self._damage(error) from error

    async def finish(self) -> None:
        """The stream has ended: it must be whole, and the image what the part says. Raises DamageError."""
        try:
            self._decoder.close()
            assert self._lane is not None
            assert self._writer is not None
            await self._lane.drain()
            await trio.to_thread.run_sync(self._writer.finish, self._step.disk.root, limiter=cpus())
        except PhcbtError as error:
            raise self._damage(error) from error
        except DamageError as error:
            if self._image.root == self._step.disk.root:
                raise
            raise self._damage(error) from error

    async def close(self) -> None:
        """Wait until nothing is under way."""
        if self._lane is not None:
            await self._lane.stop()

    async def _begin(self, header: StreamHeader) -> None:
        step, image = self._step, self._image
        pairs: dict[str, tuple[object, object]] = {
            "VM": (header.vm, UUID(step.part.uuid)),
            "disk": (header.disk_id, step.disk.disk),
            "disk size": (header.disk_size, step.disk.size),
            "part": (header.target_point, step.part.number),
            "grain": (header.grain, image.shape.grain),
            "digest algorithm": (header.algorithm, image.shape.algorithm),
        }
        for what, (got, wanted) in pairs.items():
            if got != wanted:
                raise DamageError(f"its {what} is {got}, expected {wanted}")
        if header.is_full or header.base_root != image.root:
            raise DamageError("it does not start from what the image is so far")
        await trio.to_thread.run_sync(image.grow, header.disk_size, limiter=cpus())
        self._writer = image.map.write(header.disk_size, step.part.number)
        depth = max(2, min(DEPTH, _AHEAD // header.chunk))
        self._lane = Lane(self._nursery, depth, partial(_put_all, self._writer))

    async def _submit(self, event: DataRecord | ZeroRecord) -> None:
        header = self._decoder.header
        assert header is not None
        assert self._lane is not None
        await self._lane.submit(partial(self._store, header, event))

    def _store(self, header: StreamHeader, event: DataRecord | ZeroRecord) -> GrainRun:
        """Verify a record, then write it; in a thread."""
        if isinstance(event, ZeroRecord):
            self._image.clear(event.offset, event.length)
        else:
            self._image.write(event.plain(header), event.offset)
        return event.run(header)

    def _damage(self, error: Exception) -> DamageError:
        return DamageError(f"{self._step.file} of job {self._step.part.job} is damaged: {error}")


def _put_all(writer: MapWriter, runs: list[GrainRun]) -> None:
    for run in runs:
        writer.put(run)


__all__ = ["DEPTH", "WINDOW", "DeltaFold", "FullFold", "Image", "Shape"]
