# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a simulated Prism Central holds, the same whichever API asks. Ids are UUIDs as text; sizes in bytes; times are seconds
since the epoch, UTC. Everything but the bytes of disks is here, and is what the state directory keeps.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

PowerState = Literal["ON", "OFF", "PAUSED"]
TaskStatus = Literal["QUEUED", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED"]


class Entity(msgspec.Struct, kw_only=True):
    """Whatever has an id and a name. ``version`` grows with every change: v3's spec_version, and what v4's ETag is made of.

    ``v4``, ``v3``: what a client gave that nothing here interprets, kept so that it can be read back.
    """

    uuid: str
    name: str = ""
    description: str = ""
    version: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0
    v4: dict[str, Any] = {}
    v3: dict[str, Any] = {}


class Container(Entity, kw_only=True):
    """A storage container of a cluster."""

    cluster: str
    capacity: int = 10 << 40
    internal: bool = False


class Subnet(Entity, kw_only=True):
    """A network that NICs attach to. ``uplink`` False: nothing leaves it (the isolated one of tests)."""

    cluster: str
    vlan: int = 0
    uplink: bool = True


class Cluster(Entity, kw_only=True):
    """A cluster with its Element. Addresses are IPv4 as text: ``address`` the Element's, ``data_services`` the DSIP."""

    address: str
    data_services: str | None
    cvms: list[str] = []
    available: bool = True
    aos: str = "7.3.1.5"


class Disk(msgspec.Struct, kw_only=True):
    """A VM's disk. ``uuid`` is the device (v4 extId, v3 disk_list uuid), ``backing`` the vmdisk: the name of its file, another
    one after a restore. A CD-ROM has ``cdrom`` and maybe no backing. ``source``: the data source it was made from, as given.
    """

    uuid: str
    backing: str | None
    bus: str = "SCSI"
    index: int = 0
    size: int = 0
    container: str = ""
    cdrom: bool = False
    volume_group: str | None = None
    source: dict[str, Any] = {}


class Nic(msgspec.Struct, kw_only=True):
    """A VM's network card."""

    uuid: str
    subnet: str
    mac: str
    connected: bool = True
    model: str = "VIRTIO"
    v4: dict[str, Any] = {}
    v3: dict[str, Any] = {}


class Vm(Entity, kw_only=True):
    """A VM. ``tools``: guest tools are installed, reachable and can quiesce. ``acpi``: the guest obeys a shutdown request.
    ``qmp``: the control socket of a QEMU that runs from the disks' files, stopped while a snapshot is taken; empty: none.
    """

    cluster: str
    power: PowerState = "OFF"
    sockets: int = 1
    cores: int = 1
    threads: int = 1
    memory: int = 1 << 30
    machine: str = "PC"
    boot: dict[str, Any] = {}
    disks: list[Disk] = []
    nics: list[Nic] = []
    tools: bool = False
    acpi: bool = True
    migrating: bool = False
    qmp: str = ""
    categories: dict[str, str] = {}


class SnapshotDisk(msgspec.Struct, kw_only=True):
    """A disk in a snapshot: ``uuid`` is the disk recovery point, and the name of the file with its bytes."""

    uuid: str
    disk: str
    backing: str
    size: int
    container: str = ""
    cdrom: bool = False


class SnapshotVm(msgspec.Struct, kw_only=True):
    """A VM in a snapshot: ``uuid`` is the VM recovery point. ``config`` is the VM as it was."""

    uuid: str
    vm: str
    disks: list[SnapshotDisk]
    config: Vm


class Snapshot(Entity, kw_only=True):
    """A point in time of one or more VMs of a cluster. ``element``: made by v3's vm_snapshots on the Element, else a recovery
    point of Prism Central. ``number`` is the entity id in v3's file paths. ``expires_at`` None: never.
    """

    cluster: str
    vms: list[SnapshotVm]
    application_consistent: bool = False
    expires_at: float | None = None
    element: bool = False
    number: int = 0


class GroupDisk(msgspec.Struct, kw_only=True):
    """A disk of a volume group: ``uuid`` is also the name of its file. ``source``: as the client gave it."""

    uuid: str
    index: int
    size: int
    container: str
    source: dict[str, Any] = {}


class IscsiClient(msgspec.Struct, kw_only=True):
    """An initiator that may log in to a volume group; ``secret`` is what the target proves itself to it with."""

    uuid: str
    initiator: str
    secret: str | None = None
    targets: int = 32


class VolumeGroup(Entity, kw_only=True):
    """A volume group. ``target`` is the unique part of its iSCSI targets' names, ``secret`` proves initiators to it."""

    cluster: str
    target: str
    secret: str | None = None
    chap: bool = False
    load_balanced: bool = False
    shared: bool = False
    usage: str = "USER"
    created_by: str = ""
    disks: list[GroupDisk] = []
    clients: list[IscsiClient] = []
    vms: list[str] = []


class Image(Entity, kw_only=True):
    """An image; ``uuid`` is also the name of its file, which is there once ``size`` is not None."""

    kind: str = "DISK_IMAGE"
    size: int | None = None
    clusters: list[str] = []
    source: dict[str, Any] = {}
    checksum: dict[str, Any] = {}


class User(Entity, kw_only=True):
    """An account: ``name`` is the login. ``on_element``: it is valid on Elements as well. ``keys``: API keys, by id."""

    password: str = ""
    role: str = ""
    on_element: bool = True
    keys: dict[str, str] = {}
    kind: str = "LOCAL"


class Role(Entity, kw_only=True):
    """A role; ``operations`` are names of permissions, such as View_Cluster; ``*`` is all of them."""

    operations: list[str] = []
    system: bool = True


class Category(Entity, kw_only=True):
    """A category: ``name`` is its key. VMs name theirs by key and value."""

    value: str


class TaskError(msgspec.Struct, kw_only=True):
    """Why a task failed."""

    code: str
    group: str
    message: str


class AffectedEntity(msgspec.Struct, kw_only=True):
    """What a task works on. ``kind`` is ours: vm, disk, nic, snapshot, snapshot_vm, volume_group, group_disk, iscsi_client,
    image, subnet, container.
    """

    kind: str
    uuid: str
    name: str = ""


class Task(Entity, kw_only=True):
    """A task; ``name`` is the operation. ``details``: v4's completionDetails. Of those that have ended the newest are kept."""

    status: TaskStatus = "QUEUED"
    progress: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    entities: list[AffectedEntity] = []
    details: dict[str, Any] = {}
    error: TaskError | None = None
    clusters: list[str] = []
    owner: str = "admin"
    request_id: str = ""


class World(msgspec.Struct, kw_only=True):
    """All of it, by id. ``central`` is the domain manager's (Prism Central's) own id."""

    central: str
    address: str
    clusters: dict[str, Cluster] = {}
    containers: dict[str, Container] = {}
    subnets: dict[str, Subnet] = {}
    vms: dict[str, Vm] = {}
    snapshots: dict[str, Snapshot] = {}
    volume_groups: dict[str, VolumeGroup] = {}
    images: dict[str, Image] = {}
    users: dict[str, User] = {}
    roles: dict[str, Role] = {}
    tasks: dict[str, Task] = {}
    categories: dict[str, Category] = {}
    snapshot_number: int = 1000
