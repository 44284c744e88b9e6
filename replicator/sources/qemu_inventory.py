# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is in a QEMU process: its disks, and what is ours. Read over QMP, never changed here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from replicator.errors import SourceError
from replicator.sources.qmp import QmpClient, QmpError
from replicator.sources.snapshot_names import PREFIX

#: Drivers that a block job of another program puts on top of a disk while it runs.
_JOB_FILTERS = frozenset({"copy-before-write", "mirror_top", "commit_top", "backup-top"})
_IDENTITY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap on one node."""

    name: str
    recording: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A block node that has a name."""

    name: str
    driver: str
    read_only: bool
    size: int
    keeps_bitmaps: bool
    bitmaps: Mapping[str, Bitmap]


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that concerns us in one QEMU process at one time."""

    nodes: Mapping[str, Node]
    jobs: Mapping[str, str]
    exports: Mapping[str, str]
    nbd_exports: int

    @property
    def our_nodes(self) -> list[str]:
        """Names of scratch nodes of any push."""
        return [name for name in self.nodes if name.startswith(PREFIX)]


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the VM: what it is called for good, and the node on which its bitmaps live."""

    identity: str
    node: Node


async def take_inventory(qmp: QmpClient) -> Inventory:
    """Read nodes, jobs and exports. Raises QmpError."""
    nodes = await qmp.execute("query-named-block-nodes", flat=True)
    jobs = await qmp.execute("query-jobs")
    exports = await qmp.execute("query-block-exports")
    try:
        return Inventory(
            {raw["node-name"]: _node(raw) for raw in nodes},
            {raw["id"]: raw["status"] for raw in jobs},
            {raw["id"]: raw["node-name"] for raw in exports},
            sum(raw["type"] == "nbd" for raw in exports),
        )
    except (KeyError, TypeError) as error:
        raise QmpError("QEMU described its block nodes in an unknown way") from error


def _node(raw: Mapping[str, Any]) -> Node:
    image = raw["image"]
    detail = image.get("format-specific", {})
    keeps = detail.get("type") == "qcow2" and detail["data"].get("compat") != "0.10"
    bitmaps = {
        bitmap["name"]: Bitmap(
            bitmap["name"], bitmap["recording"], bool(bitmap.get("inconsistent", False))
        )
        for bitmap in raw.get("dirty-bitmaps", [])
        if "name" in bitmap
    }
    return Node(raw["node-name"], raw["drv"], raw["ro"], image["virtual-size"], keeps, bitmaps)


async def read_uuid(qmp: QmpClient) -> UUID | None:
    """The VM's UUID; None in a storage daemon or where QEMU was given none."""
    try:
        answer = await qmp.execute("query-uuid")
    except QmpError as error:
        if error.kind == "CommandNotFound":
            return None
        raise
    uuid = UUID(answer["UUID"])
    return uuid if uuid.int else None


async def read_name(qmp: QmpClient) -> str | None:
    """The VM's name as QEMU knows it; None in a storage daemon or where it was given none."""
    try:
        answer = await qmp.execute("query-name")
    except QmpError as error:
        if error.kind == "CommandNotFound":
            return None
        raise
    name = answer.get("name")
    return str(name) if name else None


async def find_disks(qmp: QmpClient, inventory: Inventory) -> list[Disk]:
    """The VM's disks: in QEMU what its devices hold, in the machine's own order, so that the first
    is what it boots from; in a storage daemon what it exports writable, by identity.

    Left out: removable media, what is read-only, and the firmware's flash. Raises SourceError.
    """
    try:
        await qmp.execute("query-name")
    except QmpError as error:
        if error.kind != "CommandNotFound":
            raise
        named = sorted(_exported(inventory), key=lambda disk: disk[1])
    else:
        named = _devices(await qmp.execute("query-block"))
    disks: dict[str, Disk] = {}
    for fallback, node_name in named:
        node = inventory.nodes.get(node_name)
        if node is None or node.read_only:
            continue
        if node.driver in _JOB_FILTERS:
            raise SourceError(f"another block job is at work on {fallback or node_name}")
        identity = _identity(fallback if node_name.startswith("#") else node_name)
        if identity in disks:
            if disks[identity].node.name == node_name:
                continue
            raise SourceError(f"two disks are called {identity}")
        disks[identity] = Disk(identity, node)
    if not disks:
        raise SourceError("QEMU has no writable disk")
    return list(disks.values())


def _exported(inventory: Inventory) -> list[tuple[str, str]]:
    return [
        (export, node)
        for export, node in inventory.exports.items()
        if not export.startswith(PREFIX)
    ]


def _devices(blocks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Fallback identity and node of each device's medium."""
    found: list[tuple[str, str]] = []
    for block in blocks:
        inserted = block.get("inserted")
        device = block.get("device") or ""
        qdev = block.get("qdev") or ""
        flash = device.startswith("pflash") or qdev.startswith("/machine/system.flash")
        if inserted is None or block.get("removable") or flash:
            continue
        found.append((device or qdev, inserted["node-name"]))
    return found


def _identity(name: str) -> str:
    """``name`` if it can be a disk's id, else what of it can be, made unique by a hash."""
    if _IDENTITY.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[-40:]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
