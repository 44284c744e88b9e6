# SPDX-License-Identifier: AGPL-3.0-or-later
"""What our objects in a QEMU process and in a working directory are called: all begin with
``replctl-``.

An id tells the push by itself, except a node's: QEMU allows node names 31 characters, so they carry
a hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from replicator import durable
from replicator.errors import SourceError

PREFIX = "replctl-"
#: Pushes of others than `replctl run`: a chain of Bacula's backups is a family of its own, whose objects it alone removes.
_FAMILY = re.compile(r"([a-z0-9]{5})\.[0-9a-f]{16}")
_FAMILY_NODE = re.compile(r"replctl-([a-z0-9]{5})\.")
_OWN_SERVER = "-own"
_PUSH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"replctl-(?P<push>.+?)(?:-(?P<index>\d{1,4})\.(?:qcow2|raw)|\.json(?:\.new)?)")
_RECORD_LENGTH_MAX = 1 << 20


def check_push_id(push_id: str) -> str:
    """``push_id`` itself; raises SourceError if it cannot be part of a file's and an object's name."""
    if not _PUSH_ID.fullmatch(push_id):
        raise SourceError(f"{push_id!r} cannot name a snapshot")
    return push_id


def family_of(push_id: str) -> str:
    """The family that a push belongs to; empty for those of `replctl run`."""
    match = _FAMILY.fullmatch(push_id)
    return match[1] if match else ""


def family_of_node(name: str) -> str:
    """The family of a scratch node of ours."""
    match = _FAMILY_NODE.match(name)
    return match[1] if match else ""


def bitmap_name(push_id: str) -> str:
    """Name of the dirty bitmap that records changes since the push's snapshot, on each disk."""
    return PREFIX + check_push_id(push_id)


def object_id(push_id: str, index: int) -> str:
    """Id of a disk's backup job, and the name of its export."""
    return f"{bitmap_name(push_id)}-{index}"


def export_id(push_id: str, index: int, *, own_server: bool) -> str:
    """Id of a disk's export; it tells whether the NBD server that it is on was started by us."""
    return object_id(push_id, index) + (_OWN_SERVER if own_server else "")


def tells_own_server(export: str) -> bool:
    """Whether the export with this id is ours and on an NBD server that we started."""
    return push_of_object(export) is not None and export.endswith(_OWN_SERVER)


def push_of_object(name: str) -> str | None:
    """The push that the job or export with this id was made for; None if it is not ours."""
    if not name.startswith(PREFIX):
        return None
    disk = name.removeprefix(PREFIX).removesuffix(_OWN_SERVER)
    push_id, _, index = disk.rpartition("-")
    return push_id if push_id and index.isdigit() else None


def push_of_bitmap(name: str) -> str | None:
    """The push that a bitmap was made for; None if it is not ours."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def node_prefix(push_id: str) -> str:
    """What the names of a push's scratch nodes begin with."""
    family = family_of(push_id)
    short = hashlib.sha256(check_push_id(push_id).encode()).hexdigest()[:12]
    return f"{PREFIX}{family}.{short}-" if family else f"{PREFIX}{short}-"


def node_name(push_id: str, index: int) -> str:
    """Name of a disk's scratch node."""
    return f"{node_prefix(push_id)}{index}"


def scratch_path(working_dir: Path, push_id: str, index: int) -> Path:
    """Where a disk's scratch image lies: what the guest overwrites goes there first."""
    return working_dir / f"{object_id(push_id, index)}.qcow2"


def clone_path(working_dir: Path, push_id: str, index: int) -> Path:
    """Where the clone of a plain image lies."""
    return working_dir / f"{object_id(push_id, index)}.raw"


def record_path(working_dir: Path, push_id: str) -> Path:
    """Where the record of a snapshot lies."""
    return working_dir / f"{bitmap_name(push_id)}.json"


def push_of_file(name: str) -> str | None:
    """The push that a file in the working directory was made for; None if it is not ours."""
    match = _FILE.fullmatch(name)
    return match["push"] if match else None


def is_record(name: str) -> bool:
    """Whether a file of ours is a record, which lives as long as its bitmap, not only as the
    snapshot.
    """
    return name.endswith(".json")


def is_data(name: str) -> bool:
    """Whether a file of ours holds data of a disk: a scratch image or a clone."""
    return name.endswith((".qcow2", ".raw"))


def socket_key(qmp_socket: Path) -> str:
    """A short name for the QEMU process behind a QMP socket."""
    return hashlib.sha256(bytes(qmp_socket)).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk of a snapshot, sizes in bytes.

    ``reference_size``: how long the disk was at the reference. ``lost``: why changes since then are
    not known.
    """

    identity: str
    node: str
    size: int
    reference_size: int
    lost: str | None


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """What must outlive the process that took a snapshot. ``taken_at_us`` 0: it was not taken yet."""

    push_id: str
    reference: str | None
    taken_at_us: int
    disks: tuple[DiskRecord, ...]

    def taken(self, at_us: int) -> SnapshotRecord:
        """The same, taken at ``at_us``."""
        return replace(self, taken_at_us=at_us)

    def save(self, working_dir: Path) -> None:
        """Write the record durably. Blocking."""
        durable.write_file(
            record_path(working_dir, self.push_id), json.dumps(asdict(self)).encode()
        )

    @classmethod
    def load(cls, working_dir: Path, push_id: str) -> SnapshotRecord | None:
        """The record, or None if there is none; raises SourceError if it is damaged. Blocking."""
        path = record_path(working_dir, push_id)
        try:
            with path.open("rb") as file:
                data = file.read(_RECORD_LENGTH_MAX)
        except FileNotFoundError:
            return None
        try:
            return cls._decode(json.loads(data), push_id)
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"snapshot record {path} is damaged") from error

    @classmethod
    def _decode(cls, raw: Any, push_id: str) -> SnapshotRecord:
        disks = tuple(
            DiskRecord(
                str(disk["identity"]),
                str(disk["node"]),
                int(disk["size"]),
                int(disk["reference_size"]),
                None if disk["lost"] is None else str(disk["lost"]),
            )
            for disk in raw["disks"]
        )
        reference = raw["reference"]
        if raw["push_id"] != push_id or not (reference is None or isinstance(reference, str)):
            raise ValueError("record of another push")
        return cls(push_id, reference, int(raw["taken_at_us"]), disks)


def our_files(working_dir: Path) -> list[str]:
    """Names of the files in ``working_dir`` that are ours, sockets aside. Blocking."""
    try:
        return sorted(p.name for p in working_dir.iterdir() if push_of_file(p.name) is not None)
    except FileNotFoundError:
        return []


def held_files(working_dir: Path) -> dict[str, int]:
    """The pushes whose scratch images or clones lie in ``working_dir``, each with the time of its oldest file in microseconds
    since the epoch. Blocking.
    """
    held: dict[str, int] = {}
    for name in our_files(working_dir):
        push_id = push_of_file(name)
        if push_id is not None and is_data(name):
            try:
                made_us = (working_dir / name).stat().st_mtime_ns // 1000
            except FileNotFoundError:
                continue  # it was removed meanwhile
            held[push_id] = min(made_us, held.get(push_id, made_us))
    return held
