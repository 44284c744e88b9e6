# SPDX-License-Identifier: AGPL-3.0-or-later
"""What Prism tells, as this project needs it: the same for v3 and v4. Ids are Prism's own (UUIDs as text, v3's disk
handles paths); sizes in bytes; times in microseconds since the epoch, UTC.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import msgspec

from replicator.disk import Extent
from replicator.hardware import Hardware


class Capability(StrEnum):
    """Which of Prism's interfaces is used."""

    V3 = "v3"
    V4 = "v4"


class Consistency(StrEnum):
    """What a snapshot is worth to what runs in the guest."""

    CRASH = "crash"
    APPLICATION = "application"


class Kind(StrEnum):
    """What we make on a cluster. The value is the purpose in an object's name."""

    SNAPSHOT = "rp"
    VOLUME_GROUP = "vg"
    IMAGE = "img"
    VM = "rst"


class Cluster(msgspec.Struct, frozen=True):
    """A cluster behind Prism Central. ``address`` is its Element's, ``data_services`` the DSIP; None where not set."""

    uuid: str
    name: str
    address: str | None
    data_services: str | None
    version: str
    available: bool
    cvms: tuple[str, ...] = ()


class VmDisk(msgspec.Struct, frozen=True):
    """A disk of a VM; no CD-ROM. ``identity`` is the device's UUID, the same in v3 and v4 and over the disk's life.

    ``backing``: the id of what holds its bytes now, which a restore or a migration changes. ``volume_group``: the disk is
    one of a volume group, and not in a snapshot of the VM.
    """

    identity: str
    backing: str
    bus: str
    index: int
    size: int
    container: str | None
    volume_group: str | None = None


class Vm(msgspec.Struct, frozen=True):
    """A VM. ``config`` is Prism's whole description (v4: the object; v3: spec, metadata and status), to rebuild it from."""

    uuid: str
    name: str
    cluster: str
    power: str
    disks: tuple[VmDisk, ...]
    quiesce: bool
    """Whether its guest tools say that they can make a snapshot application consistent."""
    migrating: bool
    config: dict[str, Any]


class VmSummary(msgspec.Struct, frozen=True):
    """A VM in a list."""

    uuid: str
    name: str
    cluster: str
    power: str


class DiskSnapshot(msgspec.Struct, frozen=True):
    """A disk in a snapshot. ``handle``: v4 the disk recovery point's id, v3 the file's path; ``part``: v4 the id of the VM's
    part of the recovery point, v3 empty. ``disk`` is VmDisk.identity, ``backing`` is VmDisk.backing at the instant.
    """

    disk: str
    backing: str
    handle: str
    part: str
    size: int


class VmSnapshot(msgspec.Struct, frozen=True):
    """A snapshot of all disks of a VM at one instant, in the order of the VM's disks."""

    uuid: str
    name: str
    vm: str
    cluster: str
    taken_at_us: int
    consistency: Consistency
    disks: tuple[DiskSnapshot, ...]


class RegionPage(msgspec.Struct, frozen=True):
    """One page of changed regions (or of a full map): clipped to ``file_size``, ascending, disjoint."""

    file_size: int
    regions: tuple[Extent, ...]


class Secrets(msgspec.Struct, frozen=True):
    """CHAP: ``target`` proves the initiator to the target, ``client`` the target to the initiator (None: one-way)."""

    target: str
    client: str | None

    def __repr__(self) -> str:
        return "Secrets(…)"


class VolumeGroup(msgspec.Struct, frozen=True):
    """A volume group. ``target``: what its iSCSI targets' names contain; ``disk_sizes`` by index."""

    uuid: str
    name: str
    target: str
    disk_sizes: dict[int, int]


class Attachment(msgspec.Struct, frozen=True):
    """An initiator that may log in to a volume group. ``uuid``: v4 the client's id, v3 the initiator's name."""

    uuid: str
    initiator: str


class Found(msgspec.Struct, frozen=True):
    """An object on the cluster whose name begins as asked. The rest where Prism tells it."""

    kind: Kind
    uuid: str
    name: str
    cluster: str | None = None
    vm: str | None = None
    created_at_us: int | None = None


class Subnet(msgspec.Struct, frozen=True, kw_only=True):
    """A network that NICs are put into. ``clusters``: where it is; empty for one that is on all."""

    uuid: str
    name: str
    clusters: tuple[str, ...] = ()
    vlan: int | None = None


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """A storage container. ``internal``: the cluster's own, not for disks."""

    uuid: str
    name: str
    cluster: str
    internal: bool = False


class NewDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of a new VM, a copy of an image. ``bus``: SCSI, SATA, IDE or PCI; size in bytes; ``container`` an id."""

    image: str
    bus: str
    index: int
    size: int
    container: str


class NewVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that is to be made, off. Of ``hardware`` all is taken but name, description, cluster and disks; the subnets of its NICs
    are ids at the target, and NICs without a MAC get one from Prism.
    """

    name: str
    description: str
    cluster: str
    hardware: Hardware
    disks: tuple[NewDisk, ...]


#: The duties of the account that a job runs with.
BACKUP: Final = "backup"
VMS: Final = "VM administration"
CLUSTERS: Final = "clusters read-only"


class Access(msgspec.Struct, frozen=True):
    """One of the account's rights that was looked at. ``granted`` None: could not be seen.

    ``lacks``: Prism's names of all that is known to be missing, with ", " between them. ``remedy``: what to do, where no
    permission mends it; ``detail`` is then a sentence about what is wrong.
    """

    duty: str
    granted: bool | None
    lacks: str | None = None
    detail: str = ""
    remedy: str | None = None
