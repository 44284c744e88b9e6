# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a new simulator begins with: clusters, networks, accounts with their roles, VMs with data. A file of JSON may say so."""

from __future__ import annotations

import os
import random
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from replicator.errors import UsageError
from replicator.simulator import storage as files
from replicator.simulator.faults import Fault
from replicator.simulator.model import (
    Cluster,
    Container,
    Disk,
    Nic,
    PowerState,
    Role,
    Subnet,
    User,
    Vm,
    World,
)
from replicator.simulator.storage import Storage

MIB = 1 << 20
GIB = 1 << 30
_PIECE = MIB
_FILE_MAX = 4 << 20
_CLUSTERS_MAX, _CVMS_MAX, _VMS_MAX, _DISKS_MAX = 10, 8, 5000, 64
#: The last numbers of addresses: Prism Central, the first Element, and from one cluster to the next.
_CENTRAL, _ELEMENT, _STEP = 1, 20, 20
#: Operations that the backup role of the default scenario is made of, besides everything that only looks.
_BACKUP = """
Create_Recovery_Point Delete_Recovery_Point Set_Expiration_Time_Recovery_Point Restore_VM_Recovery_Point Create_Vm_Snapshot
Create_Volume_Group Delete_Volume_Group Update_Volume_Group_Details_Internal Create_Volume_Group_Disk Delete_Volume_Group_Disk
Update_Volume_Group_Disk_Internal Attach_Volume_Group_To_External_iSCSI_Client
Detach_Volume_Group_From_External_iSCSI_Client Update_External_iSCSI_Client_Internal
Create_Virtual_Machine Update_Virtual_Machine Delete_Virtual_Machine Create_Image Update_Image Delete_Image
"""


class DiskSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A disk: ``size`` in bytes, of which ``data`` are no zeros, spread in pieces of a MiB; or what an ``image`` (raw) holds."""

    size: int = GIB
    data: int = 16 * MIB
    image: str | None = None


class VmSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A VM; ``cluster`` and ``subnet`` by name."""

    name: str
    cluster: str = "cluster-a"
    disks: list[DiskSpec] = msgspec.field(default_factory=lambda: [DiskSpec()])
    subnet: str = "vlan10"
    cdrom: bool = False
    power: PowerState = "ON"
    tools: bool = True
    acpi: bool = True
    memory: int = 4 * GIB
    uuid: str | None = None
    qmp: str = ""


class ClusterSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A cluster. ``data_services`` False: no address for data services is set, so nothing can be reached over iSCSI."""

    name: str
    cvms: int = 2
    data_services: bool = True
    containers: list[str] = msgspec.field(default_factory=lambda: ["default-container", "archive"])


class UserSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An account. ``password`` None: one is made up and written to the file ``credentials``."""

    name: str
    role: str
    password: str | None = None
    on_element: bool = True


class RoleSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A role of one's own: operations by name, such as View_Cluster."""

    name: str
    operations: list[str]


_USERS = (
    UserSpec(name="admin", role="Super Admin"),
    UserSpec(name="prism-admin", role="Prism Admin"),
    UserSpec(name="viewer", role="Prism Viewer"),
    UserSpec(name="backup", role="Backup Admin"),
    UserSpec(name="central-only", role="Super Admin", on_element=False),
)


class Scenario(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    clusters: list[ClusterSpec] = msgspec.field(
        default_factory=lambda: [ClusterSpec(name="cluster-a"), ClusterSpec(name="cluster-b")]
    )
    users: list[UserSpec] = msgspec.field(default_factory=lambda: list(_USERS))
    roles: list[RoleSpec] = []
    vms: list[VmSpec] = msgspec.field(
        default_factory=lambda: [VmSpec(name="app01", disks=[DiskSpec(), DiskSpec()], cdrom=True)]
    )
    knobs: dict[str, Any] = {}
    faults: list[Fault] = []

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        names = [cluster.name for cluster in self.clusters]
        for what, count, most in (
            ("clusters", len(names), _CLUSTERS_MAX),
            ("vms", len(self.vms), _VMS_MAX),
        ):
            if count > most:
                raise ValueError(f"at most {most} {what}")
        if not names or len(set(names)) != len(names):
            raise ValueError("clusters have names of their own, and there is at least one")
        if not all(
            0 <= cluster.cvms <= _CVMS_MAX and cluster.containers for cluster in self.clusters
        ):
            raise ValueError(f"a cluster has 0 to {_CVMS_MAX} CVMs, and a container")
        for user in self.users:
            if not _ACCOUNT.fullmatch(user.name):
                raise ValueError(f"{user.name!r} is no name of an account")
        for vm in self.vms:
            if vm.cluster not in names:
                raise ValueError(f"VM {vm.name}: no cluster {vm.cluster}")
            if vm.subnet not in _SUBNETS:
                raise ValueError(f"VM {vm.name}: subnet is one of {', '.join(_SUBNETS)}")
            if len(vm.disks) > _DISKS_MAX:
                raise ValueError(f"VM {vm.name}: at most {_DISKS_MAX} disks")
            if any(disk.size < 512 or disk.size % 512 or disk.data < 0 for disk in vm.disks):
                raise ValueError(f"VM {vm.name}: a disk's size is a multiple of 512 bytes")


_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SUBNETS = {"vlan10": (10, True), "isolated": (0, False)}


def many_vms(count: int, clusters: list[str]) -> Iterator[VmSpec]:
    """VMs for tests of scale: a small disk each, spread over the clusters."""
    for number in range(1, count + 1):
        yield VmSpec(
            name=f"vm{number:04d}",
            cluster=clusters[number % len(clusters)],
            disks=[DiskSpec(size=GIB, data=MIB)],
        )


def read_scenario(path: Path) -> Scenario:
    """A scenario from a file of JSON; what it leaves out is as by default. Raises UsageError. Blocks."""
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_MAX + 1)
        if len(data) > _FILE_MAX:
            raise UsageError(f"{path}: larger than {_FILE_MAX} bytes")
        return msgspec.json.decode(data, type=Scenario)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error


class Setup:
    """Makes the world of a scenario, and gives its disks their bytes. ``net``: three numbers of addresses, as "127.1.2"."""

    def __init__(self, scenario: Scenario, net: str, passwords: dict[str, str]) -> None:
        self._scenario = scenario
        self._net = net
        self._passwords = passwords
        self._disks: list[tuple[str, str, DiskSpec]] = []
        self.world = World(central=str(uuid4()), address=f"{net}.{_CENTRAL}")
        self._add_clusters()
        self._add_accounts()
        for spec in scenario.vms:
            self._add_vm(spec)

    def _add_clusters(self) -> None:
        for number, spec in enumerate(self._scenario.clusters):
            first = _ELEMENT + _STEP * number
            cluster = Cluster(
                uuid=str(uuid4()),
                name=spec.name,
                version=1,
                address=f"{self._net}.{first}",
                data_services=f"{self._net}.{first + 1}" if spec.data_services else None,
                cvms=[f"{self._net}.{first + 2 + each}" for each in range(spec.cvms)],
            )
            self.world.clusters[cluster.uuid] = cluster
            for name in spec.containers:
                container = Container(uuid=str(uuid4()), name=name, version=1, cluster=cluster.uuid)
                self.world.containers[container.uuid] = container
            for name, (vlan, uplink) in _SUBNETS.items():
                subnet = Subnet(
                    uuid=str(uuid4()),
                    name=name,
                    version=1,
                    cluster=cluster.uuid,
                    vlan=vlan,
                    uplink=uplink,
                )
                self.world.subnets[subnet.uuid] = subnet

    def _add_accounts(self) -> None:
        from replicator.simulator.v4.permissions import OPERATIONS  # noqa: PLC0415 - v4 imports the core

        looks = [name for name in OPERATIONS if name.startswith("View_")]
        accounts = (
            "Create_User",
            "Create_User_Key",
            "Delete_User_Key",
            "Create_Role",
            "Delete_Role",
        )
        system = {
            "Super Admin": ["*"],
            "Prism Admin": [name for name in OPERATIONS if name not in accounts],
            "Prism Viewer": looks,
        }
        own = {"Backup Admin": [*looks, *_BACKUP.split()]}
        own |= {role.name: role.operations for role in self._scenario.roles}
        for name, operations in {**system, **own}.items():
            role = Role(
                uuid=str(uuid4()),
                name=name,
                version=1,
                operations=operations,
                system=name in system,
            )
            self.world.roles[role.uuid] = role
        by_name = {role.name: role.uuid for role in self.world.roles.values()}
        for spec in self._scenario.users:
            if spec.role not in by_name:
                raise UsageError(f"user {spec.name}: no role {spec.role}")
            user = User(
                uuid=str(uuid4()),
                name=spec.name,
                version=1,
                role=by_name[spec.role],
                on_element=spec.on_element,
                password=self._passwords.get(spec.name)
                or spec.password
                or secrets.token_urlsafe(12),
            )
            self.world.users[user.uuid] = user

    def _add_vm(self, spec: VmSpec) -> None:
        world = self.world
        cluster = next(each for each in world.clusters.values() if each.name == spec.cluster)
        container = next(each for each in world.containers.values() if each.cluster == cluster.uuid)
        subnet = next(
            each
            for each in world.subnets.values()
            if each.cluster == cluster.uuid and each.name == spec.subnet
        )
        number = len(world.vms) + 1
        vm = Vm(
            uuid=spec.uuid or str(uuid4()),
            name=spec.name,
            version=1,
            cluster=cluster.uuid,
            power=spec.power,
            sockets=2,
            memory=spec.memory,
            tools=spec.tools,
            acpi=spec.acpi,
            qmp=spec.qmp,
        )
        mac = f"50:6b:8d:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        vm.nics = [Nic(uuid=str(uuid4()), subnet=subnet.uuid, mac=mac)]
        for index, disk in enumerate(spec.disks):
            size = max(disk.size, os.path.getsize(disk.image) if disk.image else 0)
            backing = str(uuid4())
            vm.disks.append(
                Disk(
                    uuid=str(uuid4()),
                    backing=backing,
                    index=index,
                    size=size,
                    container=container.uuid,
                )
            )
            self._disks.append((backing, f"{spec.name} {index}", disk))
        if spec.cdrom:
            vm.disks.append(Disk(uuid=str(uuid4()), backing=None, bus="SATA", cdrom=True))
        world.vms[vm.uuid] = vm

    def fill(self, storage: Storage) -> None:
        """Give every disk its bytes: the same ones for the same name, so that runs can be compared. Blocks."""
        for backing, name, spec in self._disks:
            path = storage.disk(backing)
            if spec.image is not None:
                files.copy(Path(spec.image), path, spec.size)
                continue
            files.make_blank(path, spec.size)
            source = random.Random(name)
            pieces = -(-min(spec.data, spec.size) // _PIECE)
            gap = spec.size // max(pieces, 1)
            with path.open("r+b") as file:
                for piece in range(pieces):
                    at = piece * gap // 4096 * 4096
                    file.seek(at)
                    file.write(source.randbytes(min(_PIECE, spec.size - at)))


__all__ = [
    "ClusterSpec",
    "DiskSpec",
    "RoleSpec",
    "Scenario",
    "Setup",
    "UserSpec",
    "VmSpec",
    "many_vms",
    "read_scenario",
]
