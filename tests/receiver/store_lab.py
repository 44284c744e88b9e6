# SPDX-License-Identifier: AGPL-3.0-or-later
"""A receiver's store of one VM without a network: pushes are made here and landed through the store's own methods.

A push can be taken whole (``StoreFixture.push``) or in steps (``prepare``, ``land``, ``commit``), and every point's
expected content is kept, so that a test compares what it reads with what was sent, never with what was stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import trio

from receiver.store.landing import Landing
from receiver.store.stores import Stores
from receiver.store.vm_store import VmStore
from replicator.config import Config
from replicator.disk import DiskView
from replicator.domain.model import Point, PushKind
from replicator.imagemap import RootBuilder, vm_root
from replicator.log import EventLog, open_log
from replicator.nursery import flat_nursery
from replicator.phcbt import Algorithm, StreamHeader, StreamWriter, encode_chunk
from replicator.wire.messages import FinalDisk, Finish, Open, OpenDisk
from tests.limits import HANG_S

VM = UUID("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01")
NAME = "vm-a"
#: When point 1 was taken; each later point a minute after. Microseconds.
TAKEN_AT_US = 1_700_000_000_000_000
MINUTE_US = 60_000_000
_FEED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """A disk's content: its size and the grains that are not zeros, each padded to a whole grain."""

    size: int
    grain: int
    grains: Mapping[int, bytes]

    @classmethod
    def of(cls, content: bytes | Path | Image, grain: int) -> Image:
        """From bytes, or from a raw image file, of which holes are not read."""
        if isinstance(content, Image):
            assert content.grain == grain
            return content
        pieces = (
            _file_pieces(content, grain) if isinstance(content, Path) else _pieces(content, grain)
        )
        found = {number: data.ljust(grain, b"\0") for number, data in pieces if any(data)}
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        return cls(size, grain, found)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        first, last = offset // self.grain, (offset + length - 1) // self.grain
        zeros = bytes(self.grain)
        joined = b"".join(self.grains.get(number, zeros) for number in range(first, last + 1))
        start = offset - first * self.grain
        return joined[start : start + length]

    def sha256(self) -> str:
        """SHA-256 of the whole disk, hexadecimal."""
        digest = hashlib.sha256()
        for at in range(0, self.size, 1 << 20):
            digest.update(self.read(at, min(1 << 20, self.size - at)))
        return digest.hexdigest()

    def changed_since(self, old: Image) -> list[int]:
        """Numbers of the grains that differ, ascending."""
        numbers = sorted(self.grains.keys() | old.grains.keys())
        return [n for n in numbers if self.grains.get(n) != old.grains.get(n)]

    def root(self, algorithm: Algorithm) -> bytes:
        """The disk's root."""
        builder = RootBuilder(algorithm, self.grain, self.size)
        for number in sorted(self.grains):
            builder.add(number, algorithm.digest_grains(self.grains[number], self.grain), 1)
        return builder.root()


def _pieces(content: bytes, grain: int) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(content), grain):
        yield at // grain, content[at : at + grain]


def _file_pieces(path: Path, grain: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // grain * grain
            except OSError:  # ENXIO: only holes are left
                return
            end = max(os.lseek(file.fileno(), at, os.SEEK_HOLE), at + grain)
            while at < min(end, size):
                yield at // grain, os.pread(file.fileno(), grain, at)
                at += grain


@dataclass(frozen=True, slots=True)
class Prepared:
    """A push as a source would send it."""

    opened: Open
    streams: list[bytes]
    finish: Finish
    images: dict[str, Image]


@dataclass(slots=True)
class StoreFixture:
    """One VM's store, and what every point of it must read as. Make it with ``open_store``."""

    state_dir: Path
    log: EventLog
    stores: Stores
    store: VmStore
    nursery: trio.Nursery
    config: Config
    grain: int = 4096
    chunk: int = 64 << 10
    algorithm: Algorithm = Algorithm.XXH3_128
    #: Expected content by point and disk; the test hands it on to the fixture of a restarted receiver.
    expected: dict[int, dict[str, Image]] = field(default_factory=dict)

    def prepare(
        self,
        contents: Mapping[str, bytes | Path | Image],
        *,
        kind: PushKind | None = None,
        whole: bool = False,
    ) -> Prepared:
        """A push of these disks as the next point: a seed if there is no point yet, else a cycle.

        A cycle's stream holds the grains that changed; with ``whole`` all of the disk, as after lost tracking. A disk
        that the newest point lacks begins a chain of its own.
        """
        newest = self.store.vm.newest
        number = newest.number + 1 if newest else 1
        kind = kind or (PushKind.CYCLE if newest else PushKind.SEED)
        images = {disk: Image.of(content, self.grain) for disk, content in contents.items()}
        disks, streams, finals = [], [], []
        for disk, image in images.items():
            old = newest.disk(disk) if newest and kind is PushKind.CYCLE else None
            base = self.expected[newest.number][disk] if newest and old else None
            header = StreamHeader(
                algorithm=self.algorithm,
                grain=self.grain,
                chunk=self.chunk,
                disk_size=image.size,
                vm=self.store.uuid,
                base_point=newest.number if newest and old else 0,
                target_point=number,
                base_root=old.root if old else bytes(32),
                disk_id=disk,
            )
            stream, stream_root = _encode(header, image, base, whole)
            since = old.since if old else number
            disks.append(OpenDisk(disk, f"id-{disk}", image.size, since, len(stream)))
            streams.append(stream)
            finals.append(FinalDisk(image.root(self.algorithm), stream_root))
        opened = Open(
            vm=str(self.store.uuid),
            name=self.store.vm.name,
            epoch=self.store.vm.epoch,
            push_id=f"{number:016x}",
            kind=kind,
            point=number,
            parent=newest.number if newest else 0,
            parent_root=newest.root if newest else None,
            taken_at_us=TAKEN_AT_US + number * MINUTE_US,
            disks=tuple(disks),
        )
        root = vm_root([(d.disk, d.size, f.root) for d, f in zip(disks, finals, strict=True)])
        finish = Finish(opened.push_id, root, tuple(finals), 1_000_000)
        return Prepared(opened, streams, finish, images)

    async def land(self, push: Prepared) -> Landing:
        """Open the push (or go on with it) and land all streams, durable; the caller commits or closes it."""
        landing = await self.store.open_push(push.opened)
        try:
            for disk, stream in zip(landing.disks, push.streams, strict=True):
                for at in range(disk.position, len(stream), _FEED_BYTES):
                    piece = stream[at : at + _FEED_BYTES]
                    await trio.to_thread.run_sync(disk.feed, at, piece)
            await self.store.sync(landing)
        except BaseException:
            landing.close()
            raise
        return landing

    async def commit(self, push: Prepared, landing: Landing) -> Point:
        """Make a landed push a point, and remember what it must read as."""
        # Before the commit: if that is cut short, the point may exist all the same.
        self.expected[push.opened.point] = push.images
        try:
            return await self.store.commit(
                landing, push.finish, push.opened.taken_at_us + 1_000_000
            )
        finally:
            landing.close()

    async def push(
        self,
        contents: Mapping[str, bytes | Path | Image],
        *,
        kind: PushKind | None = None,
        whole: bool = False,
    ) -> Point:
        """Prepare, land and commit; the delta is applied later (``settle``)."""
        push = self.prepare(contents, kind=kind, whole=whole)
        return await self.commit(push, await self.land(push))

    async def settle(self) -> None:
        """Wait until there is nothing left to apply or to let go of; a store in trouble never settles."""
        with trio.fail_after(HANG_S):
            await self.store.settled.wait()

    async def check_point(self, number: int) -> None:
        """Every byte of every disk of a point is what was pushed."""
        async with self.store.hold(number) as point:
            assert {disk.disk for disk in point.disks} == set(self.expected[number])
            for disk in point.disks:
                async with self.store.open_disk(point, disk) as view:
                    await check_content(view, self.expected[number][disk.disk])


async def check_content(view: DiskView, expected: Image) -> None:
    """A view has this size and these bytes, and its extents leave nothing out."""
    assert view.size == expected.size
    covered: set[int] = set()
    async with aclosing(view.extents()) as extents:
        async for extent in extents:
            first, last = extent.offset // expected.grain, (extent.end - 1) // expected.grain
            covered.update(range(first, last + 1))
            for at in range(extent.offset, extent.end, 1 << 20):
                length = min(1 << 20, extent.end - at)
                assert await view.read(at, length) == expected.read(at, length), f"at byte {at}"
    assert covered.issuperset(expected.grains)


def _encode(
    header: StreamHeader, image: Image, base: Image | None, whole: bool
) -> tuple[bytes, bytes]:
    """The stream of a disk, and its root."""
    if base is None:
        numbers = sorted(image.grains)
    elif whole:
        numbers = list(range(header.grains(image.size)))
    else:
        numbers = image.changed_since(base)
    writer = StreamWriter(header)
    pieces: list[bytes | memoryview] = [writer.start()]
    for first, count in _runs(numbers, header.chunk // header.grain):
        offset = first * header.grain
        length = min(count * header.grain, image.size - offset)
        for record in encode_chunk(header, offset, image.read(offset, length), 1):
            pieces += writer.add(record)
    pieces.append(writer.finish())
    return b"".join(pieces), writer.root


def _runs(numbers: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring grains together, cut where the disk's chunks end."""
    at = 0
    while at < len(numbers):
        first, count = numbers[at], 1
        while (
            at + count < len(numbers)
            and numbers[at + count] == first + count
            and (first + count) % most
        ):
            count += 1
        yield first, count
        at += count


@asynccontextmanager
async def open_store(
    state_dir: Path,
    *,
    keep: int = 7,
    apply: bool = True,
    expected: dict[int, dict[str, Image]] | None = None,
    prepare: Callable[[StoreFixture], None] = lambda _: None,
) -> AsyncIterator[StoreFixture]:
    """The store in ``state_dir`` as a receiver has it after its start; leaving it is a clean stop.

    For a restart open the same folder again, with the ``expected`` of the fixture before. ``prepare`` may change grain,
    chunk and digest before anything is pushed.
    """
    config = Config(
        state_dir=state_dir, dr_restore_points=keep, push_apply_remote=apply, dr_listen="x:1"
    )
    # Nothing kept beside the log: its commits would come between the steps that tests count.
    async with open_log(state_dir / "events", kept=()) as log, flat_nursery() as nursery:
        await log.register(VM, NAME, "receiver")
        stores = Stores(config, log, nursery)
        await stores.start()
        store = stores.find(NAME)
        fixture = StoreFixture(state_dir, log, stores, store, nursery, config)
        fixture.expected = {} if expected is None else expected
        prepare(fixture)
        try:
            yield fixture
        finally:
            nursery.cancel_scope.cancel()
