# SPDX-License-Identifier: AGPL-3.0-or-later
"""Chains of backups made in memory, and a Bacula that hands them back: what, in which order, in which pieces."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid5

from bacula_adapter.backend.interface import (
    Answer,
    JobInfo,
    JobKind,
    RestoredFile,
    RestoreHandler,
)
from bacula_adapter.description import (
    OBJECT,
    Description,
    PartDisk,
    encode_file,
    encode_object,
)
from bacula_adapter.names import VirtualName
from bacula_adapter.restore import open_restore
from replicator.config import Config, check
from replicator.imagemap import RootBuilder
from replicator.phcbt import StreamHeader, StreamWriter, encode_chunk
from replicator.phcbt.format import Algorithm

GRAIN = 65536
CHUNK = 1 << 20
SIZE = 3 * CHUNK + 5 * GRAIN + 512
_SPACE = UUID("6f0a3c1e-2c55-5c7e-9d5e-7b1f0f3a9d21")


@dataclass
class Stored:
    """A file on a volume: its data by offset, None for a plain file."""

    name: str
    size: int
    blocks: list[tuple[int | None, bytes]]

    def pieces(self, length: int) -> list[tuple[int | None, bytes]]:
        """The data as Bacula hands them back."""
        return [
            (None if offset is None else offset + at, data[at : at + length])
            for offset, data in self.blocks
            for at in range(0, len(data), length)
        ]

    def flip(self, at: int) -> None:
        """Change one byte of what is stored."""
        for number, (offset, data) in enumerate(self.blocks):
            if at < len(data):
                changed = bytes([data[at] ^ 1])
                self.blocks[number] = (offset, data[:at] + changed + data[at + 1 :])
                return
            at -= len(data)
        raise AssertionError("the file is shorter")


@dataclass
class Part:
    """What one job has of one VM."""

    description: Description
    files: dict[str, Stored]
    images: dict[str, bytes]

    @property
    def object(self) -> tuple[str, bytes]:
        return f"{OBJECT}{self.description.uuid}", encode_object(self.description)

    @property
    def described(self) -> str:
        """The name of the description file."""
        return str(_name(self.description, "description"))


def without(part: Part, *names: str) -> Part:
    """The part, of which some files were not selected."""
    files = {
        name: file for name, file in part.files.items() if not any(each in name for each in names)
    }
    return Part(part.description, files, part.images)


def _name(part: Description, kind: str, disk: str = "") -> VirtualName:
    assert kind in ("description", "delta", "raw")
    return VirtualName(part.root_name, part.vm, kind, disk, part.number, part.part)  # type: ignore[arg-type]


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@dataclass
class Machine:
    """A VM and the chain of its backups."""

    vm: str = "web"
    root: str = "@nutanix"
    grain: int = GRAIN
    algorithm: Algorithm = Algorithm.XXH3_128
    addressed: bool = True
    first_job: int = 1
    disks: dict[str, bytearray] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    chain: str = "Nightly"
    uuid: UUID = field(init=False)

    def __post_init__(self) -> None:
        self.uuid = uuid5(_SPACE, self.vm)

    def add(self, disk: str, size: int = SIZE) -> None:
        """A disk with data here and there."""
        image = self.disks[disk] = bytearray(size)
        for at in range(0, size, 700_000):
            data = noise(len(self.disks) * 1000 + at, 150_000)
            image[at : at + 150_000] = data[: size - at]

    def write(self, disk: str, offset: int, data: bytes) -> None:
        self.disks[disk][offset : offset + len(data)] = data

    def backup(
        self,
        level: str = "I",
        *,
        base: Part | None = None,
        full: Iterable[str] = (),
        job: str = "",
    ) -> Part:
        """The next part: deltas from ``base`` (the last part) but for the disks in ``full``, and those that it has not."""
        number = len(self.parts) + 1
        if level == "F":
            base = None
        elif base is None:
            base = self.parts[-1]
        job_id = self.first_job + number - 1
        images = {disk: bytes(image) for disk, image in self.disks.items()}
        disks, files = [], {}
        part = uuid5(self.uuid, f"{self.chain}/{number}").hex[:8]
        for disk, image in images.items():
            before = base.images.get(disk) if base is not None and disk not in full else None
            kind = "full" if before is None else "delta"
            name = VirtualName(
                self.root, self.vm, "raw" if before is None else "delta", disk, number, part
            )
            stored = (
                self._raw(str(name), image)
                if before is None
                else self._delta(str(name), disk, (before, image), base, number)
            )
            files[stored.name] = stored
            disks.append(
                PartDisk(
                    disk=disk,
                    identity=f"{self.vm}-{disk}",
                    size=len(image),
                    kind=kind,  # type: ignore[arg-type]
                    file=stored.name,
                    root=self.image_root(image),
                    base_root=b"" if before is None else self.image_root(before),
                    bytes=sum(len(data) for _, data in stored.blocks),
                )
            )
        description = Description(
            root_name=self.root,
            vm=self.vm,
            uuid=str(self.uuid),
            number=number,
            part=part,
            parent=base.description.part if base is not None else "",
            parent_job=base.description.job if base is not None else "",
            chain=self.chain,
            job=job or f"{self.chain}.2026-11-{job_id:02}_10.00.00_03",
            job_id=job_id,
            level=level,
            taken_at_us=(1_700_000_000 + number * 3600) * 1_000_000,
            grain=self.grain,
            algorithm=int(self.algorithm),
            disks=tuple(disks),
        )
        text = encode_file(description)
        file = Stored(str(_name(description, "description")), len(text), [(None, text)])
        files[file.name] = file
        made = Part(description, files, images)
        self.parts.append(made)
        return made

    def image_root(self, image: bytes) -> bytes:
        builder = RootBuilder(self.algorithm, self.grain, len(image))
        digests = self.algorithm.digest_grains(image, self.grain)
        builder.add(0, digests, len(digests) // self.algorithm.digest_size)
        return builder.root()

    def _raw(self, name: str, image: bytes) -> Stored:
        if not self.addressed:
            return Stored(name, len(image), [(None, image)])
        step = 100_000  # of no use to anybody: blocks need not fit grains
        blocks = [
            (at, image[at : at + step])
            for at in range(0, len(image), step)
            if any(image[at : at + step])
        ]
        return Stored(name, len(image), list(blocks))

    def _delta(
        self, name: str, disk: str, images: tuple[bytes, bytes], base: Part | None, number: int
    ) -> Stored:
        before, after = images
        assert base is not None
        header = StreamHeader(
            algorithm=self.algorithm,
            grain=self.grain,
            chunk=CHUNK,
            disk_size=len(after),
            vm=self.uuid,
            base_point=base.description.number,
            target_point=number,
            base_root=self.image_root(before),
            disk_id=disk,
        )
        writer = StreamWriter(header)
        pieces: list[bytes | memoryview] = [writer.start()]
        before = before.ljust(len(after), b"\0")
        for at in range(0, len(after), self.grain):
            now = after[at : at + self.grain]
            if now != before[at : at + self.grain]:
                for record in encode_chunk(header, at, now, 1):
                    pieces += writer.add(record)
        pieces.append(writer.finish())
        stream = b"".join(map(bytes, pieces))
        return Stored(name, len(stream), [(None, stream)])


def chain(**kinds: object) -> Machine:
    """Full and two Incrementals of two disks, with grains that become zeros and a disk that grows."""
    machine = Machine(**kinds)  # type: ignore[arg-type]
    machine.add("disk-0")
    machine.add("disk-1", 1 << 20)
    machine.backup("F")
    machine.write("disk-0", 10 * GRAIN, noise(1, 3 * GRAIN))
    machine.write("disk-0", SIZE - 700, noise(2, 700))
    machine.backup()
    machine.write("disk-0", 11 * GRAIN, bytes(GRAIN))
    machine.write("disk-1", 5, noise(3, 100))
    machine.disks["disk-0"] += noise(4, 100_000)
    machine.backup()
    return machine


def restore_job(where: str | None, *, replace: str = "a", number: int = 9) -> JobInfo:
    return JobInfo(
        name=f"Restore.2026-11-30_10.00.00_{number:02}",
        job_id=100 + number,
        kind=JobKind.RESTORE,
        where=where,
        replace=replace,
    )


def config_in(folder: Path, **keys: str) -> Config:
    state = folder / "state"
    state.mkdir(exist_ok=True)
    return check({"state_dir": str(state), **keys})


@dataclass
class Bacula:
    """Hands back what was chosen. ``renamed``: what a regular expression does to names; ``piece``: bytes of one call."""

    where: str = ""
    piece: int = 65536
    answers: dict[str, Answer] = field(default_factory=dict)

    async def give(
        self,
        handler: RestoreHandler,
        parts: Sequence[Part],
        *,
        objects: bool = True,
        without: Sequence[str] = (),
        broken: str = "",
    ) -> None:
        """Objects of all parts, then their files but for those in ``without``; ``broken`` is not whole."""
        if objects:
            for part in parts:
                name, data = part.object
                await handler.restore_object(name, 25, part.description.job_id, data)
        for part in parts:
            for file in part.files.values():
                if not any(each in file.name for each in without):
                    await self.file(handler, file, whole=file.name != broken)

    async def file(self, handler: RestoreHandler, file: Stored, *, whole: bool = True) -> Answer:
        name = f"{self.where}/{file.name}" if self.where else file.name
        answer = await handler.create(
            RestoredFile(name=name, size=file.size, mtime_s=1_700_000_000)
        )
        self.answers[file.name] = answer
        if answer is Answer.SEND:
            for offset, data in file.pieces(self.piece):
                await handler.data(offset, data)
            await handler.close(whole=whole)
        return answer


async def restore(
    folder: Path,
    parts: Sequence[Part],
    *,
    job: JobInfo | None = None,
    config: Config | None = None,
    bacula: Bacula | None = None,
    status: str = "T",
    objects: bool = True,
    without: Sequence[str] = (),
    broken: str = "",
) -> Bacula:
    """A whole restore to ``folder / "out"``."""
    where = str(folder / "out")
    bacula = bacula or Bacula(where)
    async with open_restore(job or restore_job(where), config or config_in(folder)) as handler:
        await bacula.give(handler, parts, objects=objects, without=without, broken=broken)
        await handler.finish()
        await handler.conclude(status)
    return bacula


def out_of(folder: Path, part: Part, disk: str, suffix: str = "raw") -> Path:
    """Where a restored disk lies."""
    known = part.description
    return folder / "out" / known.root_name / known.vm / "disks" / f"{disk}.{suffix}"


def everything_below(folder: Path) -> list[Path]:
    """All files of a restore to ``folder``, whether they are good or not."""
    return sorted(each for each in (folder / "out").rglob("*") if each.is_file())
