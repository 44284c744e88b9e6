# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a job's part of a VM's chain is: which disks, from which part it goes on, and what the VM is made of.

The same bytes stand in the catalogue (a restore object, so that all of a chain is known before the first file of a restore) and
as an ordinary file in the backup (jobs that the catalogue has forgotten). They are one line of JSON behind a line with a
checksum. Bacula's own numbering is not relied on: parts are told by their ids, and each names its parent.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from replicator.hardware import Hardware

#: Name of the restore object of a VM, before its UUID.
OBJECT: Final = "replicator/"


class PartDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk in a part. ``file``: its name in the backup. ``root``: the image's root (docs/image-root.md) that it leads to;
    ``base_root``: what a delta starts from, empty for a full image. ``bytes``: data in the file, holes left out.
    """

    disk: str
    identity: str
    size: int
    kind: Literal["full", "delta"]
    file: str
    root: bytes
    base_root: bytes = b""
    bytes: int = 0


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A part: what one job has of one VM. ``parent``: the id of the part that its deltas start from, empty if all disks are full.

    ``job``: Bacula's unique name; ``level`` what Bacula asked for. Times in microseconds since the epoch.
    """

    version: int = 1
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


__all__ = ["OBJECT", "Description", "PartDisk"]
