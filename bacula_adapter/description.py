# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a job's part of a VM's chain is: which disks, from which part it goes on, and what the VM is made of.

It stands in the catalogue (a restore object, so that all of a chain is known before the first file of a restore) and as an
ordinary file in the backup (jobs that the catalogue has forgotten): JSON behind a line with its checksum. Bacula's own
numbering is not relied on: parts are told by their ids, and each names its parent.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import Final, Literal
from uuid import UUID

import msgspec

from bacula_adapter.names import ROOTS, parse_name
from replicator.errors import DamageError, RefusedError, StateError
from replicator.hardware import Hardware

#: Name of the restore object of a VM, before its UUID.
OBJECT: Final = "replicator/"
#: What Bacula carries in one object is less than this (shared/reference/bacula.md, section 7).
OBJECT_MAX: Final = 1_000_000
#: A longer object is compressed by the file daemon, unless that makes it no smaller.
_LEFT_ALONE: Final = 1000
#: What an object or a file may hold, unpacked.
_TEXT_MAX: Final = 16 << 20
_LAYERS: Final = 4

VERSION: Final = 1
DISKS_MAX: Final = 10_000
_SIZE_MAX: Final = 1 << 50
_I63: Final = (1 << 63) - 1
_TEXT_LENGTH: Final = 255

_LINE = re.compile(rb"replicator description ([0-9]{1,4}) sha256 ([0-9a-f]{64})\n")
_PART = re.compile(r"[0-9a-f]{8}")
_DISK = re.compile(r"disk-[0-9]{1,4}")
_ONE_LINE = re.compile(r"[^\0-\x1f\x7f]*")

# A field of PartDisk is called ``bytes``, and would be taken for the type.
_Digest = bytes


class PartDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk in a part. ``file``: its name in the backup. ``root``: the image's root (docs/image-root.md) that it leads to;
    ``base_root``: what a delta starts from, empty for a full image. ``bytes``: data in the file, holes left out.

    Only valid ones can be built, else ValueError.
    """

    disk: str
    identity: str
    size: int
    kind: Literal["full", "delta"]
    file: str
    root: _Digest
    base_root: _Digest = b""
    bytes: int = 0

    def __post_init__(self) -> None:
        if _DISK.fullmatch(self.disk) is None:
            raise ValueError(f"a disk is called {self.disk[:40]!r}")
        _check_text("identity", self.identity)
        if not 1 <= self.size <= _SIZE_MAX:
            raise ValueError(f"{self.disk} has {self.size} bytes")
        if not 0 <= self.bytes <= 2 * _SIZE_MAX:
            raise ValueError(f"{self.disk} has {self.bytes} bytes of data")
        if len(self.root) != 32 or len(self.base_root) != (32 if self.kind == "delta" else 0):
            raise ValueError(f"{self.disk} has a root of another length")


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A part: what one job has of one VM. ``parent``: the id of the part that its deltas start from, empty if all disks are full.

    ``chain``: the id of its first part, so that one whose state was lost is another. ``job``: Bacula's unique name; ``level`` what
    Bacula asked for. Times in microseconds since the epoch. Only valid ones can
    be built, else ValueError.
    """

    version: int = VERSION
    root_name: str
    vm: str
    uuid: str
    number: int
    part: str
    parent: str = ""
    parent_job: str = ""
    chain: str
    job: str
    job_id: int
    level: str
    taken_at_us: int
    grain: int
    algorithm: int
    disks: tuple[PartDisk, ...]
    point: int = 0
    hardware: Hardware | None = None

    def __post_init__(self) -> None:
        for name in ("chain", "job", "parent_job", "level"):
            _check_text(name, getattr(self, name))
        if self.version != VERSION:
            raise ValueError(f"version {self.version}")
        if self.root_name not in ROOTS:
            raise ValueError(f"names begin with {self.root_name[:40]!r}")
        if str(UUID(self.uuid)) != self.uuid:
            raise ValueError("the UUID is not written as UUIDs are")
        if _PART.fullmatch(self.part) is None or self.parent == self.part:
            raise ValueError("a part has no id of its own")
        if self.parent and _PART.fullmatch(self.parent) is None:
            raise ValueError("the parent has no id")
        if self.grain not in (1 << n for n in range(12, 21)) or self.algorithm not in (1, 2):
            raise ValueError(f"grain {self.grain}, digest {self.algorithm}")
        limits = {
            "number": (1, 9_999_999_999),
            "job_id": (0, _I63),
            "taken_at_us": (0, _I63),
            "point": (0, _I63),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}")
        if parse_name(f"{self.root_name}/{self.vm}/disks/disk-0.raw") is None:
            raise ValueError("the VM's name cannot be that of a folder")
        self._check_disks()

    def _check_disks(self) -> None:
        if len(self.disks) > DISKS_MAX:
            raise ValueError(f"{len(self.disks)} disks")
        if len({disk.disk for disk in self.disks}) != len(self.disks):
            raise ValueError("a disk stands in it twice")
        for disk in self.disks:
            name = parse_name(disk.file)
            if (
                name is None
                or (name.root, name.vm, name.disk) != (self.root_name, self.vm, disk.disk)
                or name.kind != ("raw" if disk.kind == "full" else "delta")
                or (
                    name.kind == "delta" and (name.number, name.part_id) != (self.number, self.part)
                )
            ):
                raise ValueError(f"{disk.disk} is not in a file of this part")
            if disk.kind == "delta" and not self.parent:
                raise ValueError(f"{disk.disk} is a delta, and the part has no parent")

    def disk(self, name: str) -> PartDisk | None:
        """The disk of that name in this part."""
        return next((disk for disk in self.disks if disk.disk == name), None)


def _check_text(name: str, text: str) -> None:
    if len(text) > _TEXT_LENGTH or _ONE_LINE.fullmatch(text) is None:
        raise ValueError(f"{name} is no line of text")


def encode_file(description: Description) -> bytes:
    """The description as the file in a backup: a line with the checksum, then JSON for people to read."""
    return _with_line(msgspec.json.format(msgspec.json.encode(description), indent=1) + b"\n")


def decode_file(data: bytes) -> Description:
    """What ``encode_file`` made. Raises DamageError, or StateError if a newer program made it."""
    try:
        return _decode(data)
    except ValueError as error:
        raise DamageError(
            f"the description of a part is damaged in the backup ({error}): restore the job that made it from a copy of its"
            " volume, or let the restore begin at a later Full"
        ) from None


def encode_object(description: Description) -> bytes:
    """The description as a restore object, so that every catalogue keeps it as it is (shared/reference/bacula.md, section 7).

    The file daemon does not compress it: it has at most 1000 bytes or is compressed already; its length divides by three,
    because a catalogue in SQLite damages others. Raises RefusedError if it is too long for Bacula.
    """
    plain = _with_line(msgspec.json.encode(description))
    data = _padded(plain, b"\n")
    while len(data) > _LEFT_ALONE and _gets_smaller(data):
        data = _padded(zlib.compress(data, 9), b"\0")
    if len(data) >= OBJECT_MAX:
        raise RefusedError(
            f"the description of VM {description.vm} ({len(description.disks)} disks) has {len(data)} bytes, compressed;"
            f" Bacula's catalogue takes less than {OBJECT_MAX}"
        )
    return data


def decode_object(data: bytes) -> Description:
    """What ``encode_object`` made. Raises DamageError that says what to do, or StateError if a newer program made it."""
    try:
        return _decode(_unpacked(data))
    except ValueError as error:
        raise DamageError(
            f"a restore object is damaged in Bacula's catalogue ({error}): check the catalogue; a restore from a bootstrap file"
            " of the jobs takes the description files from the volumes in its place"
        ) from None


def _padded(data: bytes, with_what: bytes) -> bytes:
    return data + with_what * (-len(data) % 3)


def _gets_smaller(data: bytes) -> bool:
    """Whether the file daemon would store something else, whatever its level is."""
    return any(len(zlib.compress(data, level)) < len(data) for level in (1, 6, 9))


def _unpacked(data: bytes) -> bytes:
    """The text in an object. Raises ValueError."""
    if len(data) >= OBJECT_MAX:
        raise ValueError(f"{len(data)} bytes")
    for _ in range(_LAYERS):
        if data[:1] != b"\x78":
            return data
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(data, _TEXT_MAX)
        except zlib.error:
            raise ValueError("it cannot be decompressed") from None
        if not unpacker.eof or unpacker.unused_data.strip(b"\0"):
            raise ValueError("it has another length")
        data = text
    raise ValueError("it is packed too often")


def _with_line(text: bytes) -> bytes:
    digest = hashlib.sha256(text.rstrip()).hexdigest()
    return f"replicator description {VERSION} sha256 {digest}\n".encode() + text


def _decode(data: bytes) -> Description:
    """Raises ValueError, StateError."""
    if len(data) > _TEXT_MAX:
        raise ValueError(f"{len(data)} bytes")
    line = _LINE.match(data)
    if line is None:
        raise ValueError("its first line is missing")
    text = data[line.end() :].rstrip()
    if hashlib.sha256(text).hexdigest().encode() != line[2]:
        raise ValueError("its checksum does not fit")
    if int(line[1]) != VERSION:
        raise StateError(
            f"a description of version {int(line[1])} is in the backup, this program reads {VERSION}:"
            " restore with the version that made it, or a later one"
        )
    try:
        return msgspec.json.decode(text, type=Description)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None


__all__ = [
    "DISKS_MAX",
    "OBJECT",
    "OBJECT_MAX",
    "Description",
    "PartDisk",
    "decode_file",
    "decode_object",
    "encode_file",
    "encode_object",
]
