# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changed regions by v3: the cluster's Element computes them between two files of one vmdisk (nutanix-v3.md, section 9)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

from replicator.disk import Extent
from replicator.errors import SourceError
from replicator.prism.answers import Node
from replicator.prism.errors import (
    PrismAnswerError,
    PrismError,
    PrismNotFoundError,
    PrismRefusedError,
    RegionsLostError,
)
from replicator.prism.region_pages import RegionPages
from replicator.prism.types import DiskSnapshot, RegionPage, VmSnapshot
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_read import vmdisk_of
from replicator.prism.v3_snapshots import Snapshots

PATH: Final = "data/changed_regions"
_PAGES_MAX: Final = 1_000_000
_REGIONS_MAX: Final = 1_000_000

Since = tuple[VmSnapshot, DiskSnapshot] | None


async def region_pages(
    element: V3Host,
    snapshots: Snapshots,
    snapshot: VmSnapshot,
    disk: DiskSnapshot,
    since: Since,
) -> AsyncGenerator[RegionPage, None]:
    """As ``Prism.regions``."""
    lost = f"changed regions of disk {disk.disk} cannot be had"
    # No key at all without a reference: an explicit null is refused.
    body: dict[str, Any] = {"snapshot_file_path": disk.handle}
    if since is not None:
        older, old_disk = since
        lost = f"changed regions of disk {disk.disk} against snapshot {older.uuid} cannot be had"
        if older.cluster != snapshot.cluster:
            raise RegionsLostError(f"{lost}: that snapshot is on another cluster")
        if vmdisk_of(old_disk.handle) != vmdisk_of(disk.handle):
            raise RegionsLostError(f"{lost}: it is of another vmdisk, as after a restore")
        body["reference_snapshot_file_path"] = old_disk.handle
    pages = RegionPages(
        f"{element.where}: changed regions of disk {disk.disk}",
        None if since is None else since[1].size,
    )
    for _ in range(_PAGES_MAX):
        try:
            answer = await element.call("POST", PATH, {**body, "start_offset": pages.offset})
        except PrismError as error:
            raise await _why(error, lost, snapshots, since) from None
        root = answer.node()
        following = root.number("next_offset", 0)
        extents = pages.take(_regions(root), following, root.number("file_size"))
        if extents or pages.done:
            yield RegionPage(pages.file_size, tuple(extents))
        if pages.done:
            return
    raise PrismAnswerError(f"{element.where}: changed regions have no end")


async def _why(error: PrismError, lost: str, snapshots: Snapshots, since: Since) -> SourceError:
    """The error to raise for a call that failed: that the reference cannot serve, where Prism refuses it."""
    broken = type(error) is PrismError and error.status is not None
    if not broken and not isinstance(error, (PrismRefusedError, PrismNotFoundError)):
        return error
    if since is not None and await snapshots.is_gone(since[0].uuid):
        return RegionsLostError(f"{lost}: that snapshot is gone (expired, or deleted by somebody)")
    return RegionsLostError(f"{lost}: {error}")


def _regions(root: Node) -> list[Extent]:
    items = root.nodes("region_list")
    if len(items) > _REGIONS_MAX:
        raise root.error("region_list", f"at most {_REGIONS_MAX} regions")
    regions = []
    for item in items:
        # Versions differ in the field's name.
        name = "type" if item.has("type") else "region_type"
        kind = item.text(name).upper()
        if kind not in {"REGULAR", "ZEROED"}:
            raise item.error(name, "REGULAR or ZEROED")
        length = item.number("length")
        if length:
            regions.append(Extent(item.number("offset"), length, zero=kind == "ZEROED"))
    return regions
