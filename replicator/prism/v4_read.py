# SPDX-License-Identifier: AGPL-3.0-or-later
"""v4's objects read into the types of this project. No I/O; what does not fit raises PrismAnswerError."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from replicator.prism.answers import Node
from replicator.prism.errors import PrismAnswerError
from replicator.prism.tasks import TaskState
from replicator.prism.types import (
    Cluster,
    Consistency,
    DiskSnapshot,
    Found,
    Kind,
    Vm,
    VmDisk,
    VmSnapshot,
    VmSummary,
)

_DONE = frozenset({"SUCCEEDED"})
_FAILED = frozenset({"FAILED", "CANCELED"})


def rfc3339(time_us: int) -> str:
    """A time as v4 takes it."""
    moment = datetime.fromtimestamp(time_us // 1_000_000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def read_address(node: Node | None) -> str | None:
    """An IPAddress, or IPAddressOrFQDN."""
    if node is None:
        return None
    for kind in ("ipv4", "ipv6", "fqdn"):
        part = node.maybe(kind)
        if part is not None:
            return part.text("value", "") or None
    return None


def read_cluster(node: Node) -> Cluster | None:
    """A cluster; None for Prism Central itself, and for what runs no AHV."""
    config = node.maybe("config")
    functions = config.texts("clusterFunction") if config is not None else []
    hypervisors = config.texts("hypervisorTypes") if config is not None else []
    if "PRISM_CENTRAL" in functions or (hypervisors and "AHV" not in hypervisors):
        return None
    network = node.maybe("network")
    build = config.maybe("buildInfo") if config is not None else None
    nodes = node.maybe("nodes")
    cvms = (
        read_address(item.maybe("controllerVmIp"))
        for item in (nodes.nodes("nodeList") if nodes is not None else [])
    )
    return Cluster(
        uuid=node.uuid("extId"),
        name=node.text("name", ""),
        address=None if network is None else read_address(network.maybe("externalAddress")),
        data_services=(
            None if network is None else read_address(network.maybe("externalDataServiceIp"))
        ),
        version="" if build is None else build.text("version", ""),
        available=config is None
        or (
            config.flag("isAvailable", default=True)
            and config.text("operationMode", "NORMAL") == "NORMAL"
        ),
        cvms=tuple(cvm for cvm in cvms if cvm is not None),
    )


def read_vm_summary(node: Node) -> VmSummary:
    """A VM of a list."""
    cluster = node.maybe("cluster")
    return VmSummary(
        uuid=node.uuid("extId"),
        name=node.text("name", ""),
        cluster="" if cluster is None else cluster.text("extId", ""),
        power=node.text("powerState", "UNDETERMINED"),
    )


def read_vm(node: Node) -> Vm:
    """A VM with its disks, in the order of bus and index; CD-ROMs have a list of their own in v4."""
    tools = node.maybe("guestTools")
    disks = sorted(
        (_read_disk(disk) for disk in node.nodes("disks")), key=lambda d: (d.bus, d.index)
    )
    return Vm(
        uuid=node.uuid("extId"),
        name=node.text("name", ""),
        cluster=node.node("cluster").uuid("extId"),
        power=node.text("powerState", "UNDETERMINED"),
        disks=tuple(disks),
        quiesce=tools is not None and _can_quiesce(tools),
        migrating=node.flag("isCrossClusterMigrationInProgress", default=False),
        config=node.raw,
    )


def _read_disk(node: Node) -> VmDisk:
    address = node.node("diskAddress")
    backing = node.node("backingInfo")
    identity = node.uuid("extId")
    group = backing.text("volumeGroupExtId", "") or None
    container = backing.maybe("storageContainer")
    return VmDisk(
        identity=identity,
        backing=backing.text("diskExtId", "") or identity,
        bus=address.text("busType"),
        index=address.number("index", high=1 << 20),
        size=0 if group is not None else backing.number("diskSizeBytes", low=1),
        container=None if container is None else container.text("extId", "") or None,
        volume_group=group,
    )


def _can_quiesce(tools: Node) -> bool:
    ready = all(
        tools.flag(name, default=False) for name in ("isInstalled", "isEnabled", "isReachable")
    )
    capable = tools.flag("isVssSnapshotCapable", default=False)
    return ready and (capable or "VSS_SNAPSHOT" in tools.texts("capabilities"))


def read_snapshot(node: Node, vm: Vm, *, complete: bool) -> VmSnapshot:
    """A recovery point as one of ``vm``, whose disks give identities and sizes: v4 tells neither.

    ``complete``: a disk of the VM that is not in it is an error. Entries that fit no disk (CD-ROMs) are dropped.
    """
    uuid = node.uuid("extId")
    part = _part_of(node, vm)
    if part is None:
        raise PrismAnswerError(
            f"{node.where}: recovery point {uuid} does not hold VM {vm.name} ({vm.uuid})"
        )
    handles: dict[str, str] = {}
    for entry in part.nodes("diskRecoveryPoints"):
        handle = entry.text("diskRecoveryPointExtId", "")
        source = entry.text("diskExtId", "")
        if handle and source and handles.setdefault(source, handle) != handle:
            raise PrismAnswerError(f"{entry.where}: two recovery points of disk {source}")
    disks = []
    for disk in vm.disks:
        if disk.volume_group is not None:
            continue
        handle = handles.get(disk.identity) or handles.get(disk.backing, "")
        if handle:
            disks.append(
                DiskSnapshot(disk.identity, disk.backing, handle, part.uuid("extId"), disk.size)
            )
        elif complete:
            raise PrismAnswerError(
                f"{node.where}: disk {disk.bus.lower()}.{disk.index} of VM {vm.name} is not in its recovery point {uuid}"
            )
    places = node.nodes("locationReferences")
    here = [place.text("locationExtId", "") for place in places]
    kinds = {node.text("recoveryPointType", ""), part.text("recoveryPointType", "")} - {""}
    consistent = kinds == {"APPLICATION_CONSISTENT"}
    return VmSnapshot(
        uuid=uuid,
        name=node.text("name", ""),
        vm=vm.uuid,
        cluster=vm.cluster if vm.cluster in here or not here else here[0],
        taken_at_us=node.time_us("creationTime"),
        consistency=Consistency.APPLICATION if consistent else Consistency.CRASH,
        disks=tuple(disks),
    )


def part_uuid(node: Node, vm: Vm) -> str | None:
    """The id of the VM's part of a recovery point, None where it is not in it."""
    part = _part_of(node, vm)
    return None if part is None else part.uuid("extId")


def _part_of(node: Node, vm: Vm) -> Node | None:
    for part in node.nodes("vmRecoveryPoints"):
        if part.text("vmExtId", "") == vm.uuid:
            return part
    return None


def read_task(node: Node) -> TaskState:
    """A task."""
    status = node.text("status", "")
    errors = node.nodes("errorMessages")
    first = errors[0] if errors else None
    words = {error.text(name, "") for error in errors for name in ("code", "errorGroup")} - {""}
    texts = [error.text("message", "") for error in errors[:3]]
    legacy = node.text("legacyErrorMessage", "")
    return TaskState(
        uuid=node.text("extId"),
        status="done" if status in _DONE else "failed" if status in _FAILED else "waiting",
        entities=tuple(
            (entity.text("rel", ""), entity.text("extId", ""))
            for entity in node.nodes("entitiesAffected")
        ),
        details={
            detail.text("name", ""): detail.raw.get("value")
            for detail in node.nodes("completionDetails")
        },
        code=None if first is None else first.text("code", "") or None,
        words=frozenset(words),
        message="; ".join(text for text in (*texts, legacy, *_status(status)) if text)[:300],
    )


def _status(status: str) -> tuple[str, ...]:
    return ("it was cancelled",) if status == "CANCELED" else ()


def read_found(kind: Kind, node: Node) -> Found:
    """An object of ours in a list."""
    places = node.nodes("locationReferences") if kind is Kind.SNAPSHOT else []
    parts = node.nodes("vmRecoveryPoints") if kind is Kind.SNAPSHOT else []
    cluster: str | None = None
    if kind is Kind.SNAPSHOT and places:
        cluster = places[0].text("locationExtId", "")
    elif kind is Kind.VOLUME_GROUP:
        cluster = node.text("clusterReference", "")
    elif kind is Kind.VM:
        reference = node.maybe("cluster")
        cluster = None if reference is None else reference.text("extId", "")
    times = [name for name in ("creationTime", "createTime") if node.has(name)]
    uuid = node.uuid("extId")
    own = uuid if kind is Kind.VM else None
    return Found(
        kind=kind,
        uuid=uuid,
        name=node.text("name", ""),
        cluster=cluster or None,
        vm=(parts[0].text("vmExtId", "") or None) if parts else own,
        created_at_us=node.time_us(times[0]) if times else None,
    )


def typed(kind: str, **fields: Any) -> dict[str, Any]:
    """An object of a request, with its ``$objectType``."""
    return {"$objectType": kind, **fields}
