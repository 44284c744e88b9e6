# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bacula in memory: takes what a backup writes out, keeps it job by job, gives the verdict, and puts images together again."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from bacula_adapter.backend.interface import BackupHandler, FileEntry, JobInfo, JobKind, Level
from bacula_adapter.backup.handler import open_backup
from bacula_adapter.description import Description, decode_file, decode_object
from bacula_adapter.names import parse_name
from bacula_adapter.state import folder_of
from replicator.config import Config, check
from replicator.domain.backup import Backups
from replicator.imagemap import RootBuilder
from replicator.log import chains
from replicator.phcbt import DataRecord, Decoder, Header, ZeroRecord
from replicator.phcbt.decode import NEED_DATA
from replicator.phcbt.format import Algorithm

GRAIN = 65536
JOB = "Nightly"


@dataclass
class StoredFile:
    """A file as it is on a volume."""

    entry: FileEntry
    blocks: list[tuple[int, bytes]] = field(default_factory=list)
    whole: bool = False

    @property
    def stored(self) -> int:
        return sum(len(data) for _, data in self.blocks)

    @property
    def content(self) -> bytes:
        """With its holes; of a plain file whose size was not known, all of it."""
        end = max((offset + len(data) for offset, data in self.blocks), default=0)
        content = bytearray(max(self.entry.size, end))
        for offset, data in self.blocks:
            content[offset : offset + len(data)] = data
        return bytes(content)


@dataclass
class Volume:
    """Implements ``BackupOutput``: what one job wrote. ``gate`` is awaited before each block."""

    files: dict[str, StoredFile] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    gate: Any = None
    _open: StoredFile | None = None

    async def begin(self, entry: FileEntry) -> None:
        assert self._open is None
        assert entry.name not in self.files
        assert not self.objects, (
            "an object takes signature and compression from the files behind it"
        )
        assert parse_name(entry.name) is not None
        self._open = self.files[entry.name] = StoredFile(entry)
        await trio.lowlevel.checkpoint()

    async def data(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.gate is not None:
            await self.gate(self)
        assert self._open is not None
        assert len(data)
        blocks = self._open.blocks
        end = blocks[-1][0] + len(blocks[-1][1]) if blocks else 0
        assert offset >= end
        if not self._open.entry.addressed:
            assert offset == end
        blocks.append((offset, bytes(data)))
        await trio.lowlevel.checkpoint()

    async def end(self) -> None:
        assert self._open is not None
        entry = self._open.entry
        if entry.size:
            last = self._open.blocks[-1] if self._open.blocks else (0, b"")
            assert last[0] + len(last[1]) <= entry.size
            assert entry.addressed or self._open.stored == entry.size
        self._open.whole = True
        self._open = None
        await trio.lowlevel.checkpoint()

    async def restore_object(self, name: str, data: bytes) -> None:
        assert self._open is None
        self.objects[name] = data
        await trio.lowlevel.checkpoint()

    async def plugin_options(self, name: str, text: str) -> None:
        self.options[name] = text
        await trio.lowlevel.checkpoint()

    @property
    def bytes(self) -> int:
        """Of disks, descriptions left out."""
        return sum(f.stored for name, f in self.files.items() if "/disks/" in name)

    @property
    def descriptions(self) -> list[Description]:
        """One of each VM; the file and the object say the same."""
        found = [decode_object(data) for data in self.objects.values()]
        files = [
            decode_file(f.content) for name, f in self.files.items() if "/description." in name
        ]
        assert sorted(found, key=lambda d: d.uuid) == sorted(files, key=lambda d: d.uuid)
        return found

    def description(self, vm: str | None = None) -> Description:
        (found,) = (each for each in self.descriptions if vm in (None, each.vm))
        return found


@dataclass
class Catalogue:
    """The jobs of one Director, as its catalogue has them."""

    config: Config
    job: str = JOB
    volumes: dict[str, Volume] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def info(self, level: Level, previous: str | None = None, **more: Any) -> JobInfo:
        """The next job, going on from what Bacula would go on from."""
        number = next(self._numbers)
        return JobInfo(
            name=f"{self.job}.2026-11-25_10.{number // 60:02}.{number % 60:02}_03",
            job_id=number,
            kind=JobKind.BACKUP,
            level=level,
            previous=self.previous(level) if previous is None else previous,
            addressed=True,
            **more,
        )

    def previous(self, level: Level) -> str:
        """The last Full for a Differential, the last job of any level for an Incremental."""
        if level is Level.FULL:
            return ""
        fits = [
            name
            for name in self.volumes
            if level is Level.INCREMENTAL or self.levels[name] is Level.FULL
        ]
        return fits[-1] if fits else ""

    @asynccontextmanager
    async def opened(
        self, info: JobInfo, config: Config | None = None
    ) -> AsyncIterator[BackupHandler]:
        async with open_backup(info, config or self.config) as handler:
            yield handler

    async def run(
        self, level: Level, *, status: str = "T", previous: str | None = None, **more: Any
    ) -> Volume:
        """A job to its end; only one with status T is in the catalogue then."""
        info, volume = self.info(level, previous), Volume(**more)
        async with self.opened(info) as handler:
            await handler.run(volume)
            assert all(file.whole for file in volume.files.values())
            await handler.conclude(status)
        if status == "T":
            self.keep(info, volume)
        return volume

    def keep(self, info: JobInfo, volume: Volume) -> None:
        self.volumes[info.name] = volume
        self.levels[info.name] = info.level

    def known(self, uuid: str) -> Backups:
        """What the chain's log says."""
        chain = chains.read_chain(folder_of(self.config, "jobs", self.job, uuid))
        return Backups() if chain is None else chain.backups

    def images(self, job: str | None = None, vm: str | None = None) -> dict[str, bytes]:
        """The disks of a VM as of a job (the last), put together from what is on the volumes, checked at each step."""
        volumes = list(self.volumes.values())
        last = self.volumes[job] if job is not None else volumes[-1]
        part = last.description(vm)
        parts = {each.part: (each, volume) for volume in volumes for each in volume.descriptions}
        line = [parts[part.part]]
        while line[-1][0].parent:
            line.append(parts[line[-1][0].parent])
        return {disk.disk: _image(disk.disk, line) for disk in part.disks}


def _image(disk: str, line: list[tuple[Description, Volume]]) -> bytes:
    """``line``: from the newest part to the oldest."""
    image, root = bytearray(), b""
    needed = []
    for part, volume in line:
        found = part.disk(disk)
        assert found is not None
        needed.append((part, volume, found))
        if found.kind == "full":
            break
    for part, volume, found in reversed(needed):
        file = volume.files[found.file]
        if found.kind == "full":
            image = bytearray(file.content)
        else:
            assert found.base_root == root
            image += bytes(found.size - len(image))
            _apply(file.content, part, found.base_root, image)
        assert len(image) == found.size
        assert file.stored == found.bytes
        root = root_of(bytes(image), Algorithm(part.algorithm))
        assert root == found.root, (disk, part.number)
    return bytes(image)


def _apply(stream: bytes, part: Description, base_root: bytes, image: bytearray) -> None:
    decoder = Decoder()
    decoder.receive_data(stream)
    header = None
    while (event := decoder.next_event()) is not NEED_DATA:
        match event:
            case Header():
                header = event.header
                assert header.base_root == base_root
                assert (header.target_point, str(header.vm)) == (part.number, part.uuid)
            case DataRecord():
                assert header is not None
                image[event.offset : event.offset + event.length] = event.plain(header)
            case ZeroRecord():
                image[event.offset : event.offset + event.length] = bytes(event.length)
        if type(event).__name__ == "End":
            return
    raise AssertionError("the stream has no end")


def root_of(image: bytes, algorithm: Algorithm = Algorithm.XXH3_128) -> bytes:
    builder = RootBuilder(algorithm, GRAIN, len(image))
    count = -(-len(image) // GRAIN)
    builder.add(0, algorithm.digest_grains(image, GRAIN), count)
    return builder.root()


# A VM of plain images


@dataclass
class ImageVm:
    """Images that a test writes to, and the catalogue of their backups."""

    folder: Path
    disks: dict[str, Path]
    catalogue: Catalogue
    values: dict[str, str] = field(default_factory=dict)

    def write(self, disk: str, offset: int, data: bytes) -> None:
        with self.disks[disk].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def configure(self, **options: str) -> None:
        """Another configuration, for the disks that there are now."""
        values = {
            "source": "image",
            "vm": "web",
            "state_dir": str(self.folder / "state"),
            "image_disks": ",".join(f"{disk}={path}" for disk, path in self.disks.items()),
        }
        self.values = values | options
        self.catalogue.config = check(self.values)

    @property
    def contents(self) -> dict[str, bytes]:
        return {disk: path.read_bytes() for disk, path in self.disks.items()}

    @property
    def uuid(self) -> str:
        return next(iter(self.catalogue.volumes.values())).description().uuid


def image_vm(folder: Path, sizes: dict[str, int], **options: str) -> ImageVm:
    """Sparse images of these sizes."""
    disks = {}
    for disk, size in sizes.items():
        disks[disk] = folder / f"{disk}.img"
        with disks[disk].open("wb") as file:
            file.truncate(size)
    vm = ImageVm(folder, disks, Catalogue(check({})))
    vm.configure(**options)
    return vm
