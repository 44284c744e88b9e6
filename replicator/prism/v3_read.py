# SPDX-License-Identifier: AGPL-3.0-or-later
"""v3's objects, and v2.0's of an Element, read into the types of this project. No I/O; what does not fit is PrismAnswerError."""

from __future__ import annotations

from typing import Any, Final

from replicator.prism.answers import Node
from replicator.prism.errors import PrismAnswerError, PrismTaskError
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
    VolumeGroup,
)

_MIB: Final = 1 << 20
_FAILED: Final = frozenset({"FAILED", "ABORTED"})
#: States in which an object will not become complete any more.
_BROKEN: Final = frozenset({"ERROR", "FAILED", "KERROR"})
#: What a UUID of one kind or the other is called in the tasks of v3 and v2.0, in lower case and without marks.
_GROUP_KINDS: Final = frozenset({"volumegroup", "volumegroupref"})


def read_cluster(node: Node) -> Cluster | None:
    """A cluster; None for Prism Central itself, and for what runs no AHV."""
    status = node.node("status")
    resources = status.node("resources")
    config = resources.maybe("config")
    services = config.texts("service_list") if config is not None else []
    if "PRISM_CENTRAL" in services or not _runs_ahv(resources):
        return None
    network = resources.maybe("network")
    build = config.maybe("build") if config is not None else None
    return Cluster(
        uuid=node.node("metadata").uuid("uuid"),
        name=status.text("name", ""),
        address=None if network is None else network.text("external_ip", "") or None,
        data_services=(
            None if network is None else network.text("external_data_services_ip", "") or None
        ),
        version="" if build is None else build.text("version", ""),
        available=config is None
        or (
            config.flag("is_available", default=True)
            and config.text("operation_mode", "NORMAL").upper() == "NORMAL"
        ),
    )


def read_cluster_v2(node: Node) -> Cluster:
    """The cluster of an Element, as that describes itself."""
    return Cluster(
        uuid=node.uuid("uuid"),
        name=node.text("name", ""),
        address=node.text("cluster_external_ipaddress", "") or None,
        data_services=node.text("cluster_external_data_services_ipaddress", "") or None,
        version=node.text("version", ""),
        available=node.flag("is_available", default=True)
        and node.text("operation_mode", "NORMAL").upper() == "NORMAL",
    )


def _runs_ahv(resources: Node) -> bool:
    nodes = resources.maybe("nodes")
    servers = nodes.nodes("hypervisor_server_list") if nodes is not None else []
    kinds = {server.text("type", "") for server in servers} - {""}
    return not kinds or "AHV" in kinds


def read_vm_summary(node: Node) -> VmSummary:
    """A VM of a list."""
    status = node.node("status")
    return VmSummary(
        uuid=node.node("metadata").uuid("uuid"),
        name=status.text("name", ""),
        cluster=reference_uuid(status, "cluster_reference"),
        power=status.node("resources").text("power_state", "UNKNOWN"),
    )


def reference_uuid(node: Node, name: str) -> str:
    """The id that a reference holds; empty without one."""
    reference = node.maybe(name)
    return "" if reference is None else reference.text("uuid", "")


def read_vm(node: Node, element: Node) -> Vm:
    """A VM from what Prism Central says and what its Element does (v2.0), which alone knows what holds a disk's bytes.

    Raises PrismAnswerError where the two do not speak of the same disks.
    """
    status = node.node("status")
    resources = status.node("resources")
    backings = [_Backing(item) for item in element.nodes("vm_disk_info")]
    left = [item for item in backings if item.is_disk]
    disks: list[VmDisk] = []
    for item in resources.nodes("disk_list"):
        properties = item.node("device_properties")
        kind = properties.text("device_type", "DISK")
        if kind == "VOLUME_GROUP":
            disks.append(_group_disk(item, properties))
        elif kind == "DISK":
            found = _match(item, properties, left)
            left.remove(found)
            disks.append(_disk(item, properties, found))
    if left:
        raise PrismAnswerError(
            f"{element.where}: the Element has a disk {left[0].place} of this VM that Prism Central does not know (yet)"
        )
    tools = resources.maybe("guest_tools")
    return Vm(
        uuid=node.node("metadata").uuid("uuid"),
        name=status.text("name", ""),
        cluster=status.node("cluster_reference").uuid("uuid"),
        power=resources.text("power_state", "UNKNOWN"),
        disks=tuple(sorted(disks, key=lambda disk: (disk.bus, disk.index))),
        quiesce=tools is not None and _can_quiesce(tools),
        migrating=any(
            item.flag("is_migration_in_progress", default=False)
            for item in resources.nodes("disk_list")
        ),
        config={
            name: node.raw[name] for name in ("spec", "metadata", "status") if name in node.raw
        },
    )


class _Backing:
    """A disk of a VM as its Element describes it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        address = node.node("disk_address")
        self.bus = address.text("device_bus", "").upper()
        self.index = address.number("device_index", 0, high=1 << 20)
        self.place = f"{self.bus.lower()}.{self.index}"
        self.device = address.text("device_uuid", "").lower()
        self.vmdisk = address.text("vmdisk_uuid", "").lower()
        in_group = address.has("volume_group_uuid")
        self.is_disk = (
            not node.flag("is_cdrom", default=False)
            and not node.flag("is_empty", default=False)
            and not in_group
        )


def _match(item: Node, properties: Node, backings: list[_Backing]) -> _Backing:
    """The same disk at the Element: of that device id, else at that place."""
    device = item.text("uuid", "").lower()
    bus, index = _address(properties)
    by_device = [each for each in backings if device and each.device == device]
    by_place = [each for each in backings if (each.bus, each.index) == (bus, index)]
    found = by_device or [each for each in by_place if not each.device or not device]
    if len(found) != 1:
        raise PrismAnswerError(
            f"{item.where}: the Element has {len(found) or 'no'} disks that could be {bus.lower()}.{index} of this VM"
        )
    return found[0]


def _address(properties: Node) -> tuple[str, int]:
    address = properties.node("disk_address")
    return address.text("adapter_type").upper(), address.number("device_index", high=1 << 20)


def _disk(item: Node, properties: Node, backing: _Backing) -> VmDisk:
    bus, index = _address(properties)
    if not backing.vmdisk:
        raise backing.node.error("disk_address.vmdisk_uuid", "a UUID")
    size = backing.node.number("size", 0) or _size(item)
    if size < 1:
        raise backing.node.error("size", "a size in bytes")
    return VmDisk(
        identity=item.text("uuid", "") or backing.device or backing.vmdisk,
        backing=backing.vmdisk,
        bus=bus,
        index=index,
        size=size,
        container=backing.node.text("storage_container_uuid", "") or None,
    )


def _size(item: Node) -> int:
    return item.number("disk_size_bytes", 0) or item.number("disk_size_mib", 0) * _MIB


def _group_disk(item: Node, properties: Node) -> VmDisk:
    group = reference_uuid(item, "volume_group_reference")
    place = properties.maybe("disk_address")
    bus, index = ("SCSI", 0) if place is None else _address(properties)
    identity = item.text("uuid", "") or group
    return VmDisk(identity, identity, bus, index, 0, None, volume_group=group or identity)


def _can_quiesce(tools: Node) -> bool:
    ngt = tools.maybe("nutanix_guest_tools")
    if ngt is None:
        return False
    ready = (
        ngt.text("ngt_state", "") == "INSTALLED"
        and ngt.text("state", "") == "ENABLED"
        and ngt.flag("is_reachable", default=False)
    )
    capable = ngt.flag("vss_snapshot_capable", default=False)
    return ready and (capable or "VSS_SNAPSHOT" in ngt.texts("enabled_capability_list"))


def is_complete(node: Node) -> bool:
    """Whether a snapshot is there with its files. Raises PrismTaskError where it never will be."""
    status = node.node("status")
    state = status.text("state", "")
    if state.upper() in _BROKEN:
        raise PrismTaskError(f"{node.where}: the snapshot failed: {read_messages(status)}")
    return state == "COMPLETE" and bool(status.nodes("snapshot_file_list"))


def read_messages(status: Node) -> str:
    """What a status says of what went wrong, in one short text."""
    texts = [item.text("message", "") for item in status.nodes("message_list")[:3]]
    return "; ".join(text for text in texts if text)[:300] or "no reason given"


def vmdisk_of(path: str) -> str:
    """The vmdisk's id in the path of its file, live or in a snapshot."""
    return path.rpartition("/")[2].lower()


def read_snapshot(node: Node, vm: Vm, *, complete: bool) -> VmSnapshot:
    """A snapshot as one of ``vm``, whose disks give identities and sizes: v3 tells neither.

    ``complete``: a disk of the VM that is not in it is an error. Files that fit no disk (CD-ROMs) are dropped.
    """
    metadata, status = node.node("metadata"), node.node("status")
    uuid = metadata.uuid("uuid")
    if snapshot_vm(node) != vm.uuid:
        raise PrismAnswerError(f"{node.where}: snapshot {uuid} is not of VM {vm.name} ({vm.uuid})")
    paths: dict[str, str] = {}
    for entry in status.nodes("snapshot_file_list"):
        path = entry.text("snapshot_file_path")
        backing = vmdisk_of(entry.text("file_path", "") or path)
        if paths.setdefault(backing, path) != path:
            raise PrismAnswerError(f"{entry.where}: two files of vmdisk {backing}")
    disks = []
    for disk in vm.disks:
        if disk.volume_group is not None:
            continue
        path = paths.get(disk.backing.lower(), "")
        if path:
            disks.append(DiskSnapshot(disk.identity, disk.backing, path, "", disk.size))
        elif complete:
            raise PrismAnswerError(
                f"{node.where}: disk {disk.bus.lower()}.{disk.index} of VM {vm.name} is not in its snapshot {uuid}"
            )
    return VmSnapshot(
        uuid=uuid,
        name=name_of(node),
        vm=vm.uuid,
        cluster=vm.cluster,
        taken_at_us=metadata.time_us("creation_time"),
        consistency=(
            Consistency.APPLICATION
            if status.text("snapshot_type", "") == "APPLICATION_CONSISTENT"
            else Consistency.CRASH
        ),
        disks=tuple(disks),
    )


def snapshot_vm(node: Node) -> str:
    """The VM that a snapshot is of."""
    for name in ("status", "spec"):
        part = node.maybe(name)
        resources = part.maybe("resources") if part is not None else None
        if resources is not None and resources.has("entity_uuid"):
            return resources.text("entity_uuid")
    return ""


def name_of(node: Node) -> str:
    """An object's name; empty without one."""
    for part in ("status", "spec"):
        holder = node.maybe(part)
        if holder is not None and holder.has("name"):
            return holder.text("name", "")
    return ""


def read_group(node: Node) -> VolumeGroup:
    """A volume group of v3."""
    status = node.node("status")
    resources = status.node("resources")
    return VolumeGroup(
        uuid=node.node("metadata").uuid("uuid"),
        name=name_of(node),
        target=resources.text("iscsi_target_name"),
        disk_sizes={
            item.number("index", high=16383): _size(item) for item in resources.nodes("disk_list")
        },
    )


def read_group_v2(node: Node) -> VolumeGroup:
    """A volume group of v2.0."""
    sizes: dict[int, int] = {}
    for item in node.nodes("disk_list"):
        size = item.number("vmdisk_size_bytes", 0) or item.number("vmdisk_size_mb", 0) * _MIB
        sizes[item.number("index", high=16383)] = size
    target = node.text("iscsi_target_name", "") or node.text("iscsi_target")
    return VolumeGroup(node.uuid("uuid"), node.text("name", ""), target, sizes)


def read_task(node: Node) -> TaskState:
    """A task of v3."""
    status = node.text("status", "")
    code = node.text("error_code", "") or None
    return TaskState(
        uuid=node.text("uuid"),
        status=_task_status(status),
        entities=tuple(
            (entity.text("kind", ""), entity.text("uuid", ""))
            for entity in node.nodes("entity_reference_list")
        ),
        code=code,
        words=frozenset(filter(None, (code,))),
        message=_task_message(
            status, node.text("error_detail", "") or node.text("progress_message", "")
        ),
    )


def read_task_v2(node: Node) -> TaskState:
    """A task of v2.0."""
    status = node.text("progress_status", "").upper()
    meta = node.maybe("meta_response")
    code, detail = "", ""
    if meta is not None:
        detail = meta.text("error_detail", "")
        held = meta.raw.get("error_code")  # a number in some versions, a name in others
        code = str(held)[:100] if isinstance(held, (int, str)) and held else ""
    return TaskState(
        uuid=node.text("uuid"),
        status=_task_status(status),
        entities=tuple(
            (entity.text("entity_type", ""), entity.text("entity_id", ""))
            for entity in node.nodes("entity_list")
        ),
        code=code or None,
        words=frozenset(filter(None, (code,))),
        message=_task_message(status, detail),
    )


def _task_status(status: str) -> Any:
    return "done" if status == "SUCCEEDED" else "failed" if status in _FAILED else "waiting"


def _task_message(status: str, detail: str) -> str:
    return detail[:300] or ("it was aborted" if status == "ABORTED" else "")


def group_of(state: TaskState) -> str | None:
    """The volume group that a task was about, None where it does not say."""
    found = {
        uuid
        for kind, uuid in state.entities
        if kind.lower().replace("_", "").replace(" ", "") in _GROUP_KINDS
    }
    return found.pop() if len(found) == 1 else None


def task_of(node: Node) -> str | None:
    """The task that an answer started: in the status (a text, or the only one of a list), or all that there is (v2.0)."""
    if node.has("task_uuid"):
        return node.text("task_uuid")
    status = node.maybe("status")
    context = status.maybe("execution_context") if status is not None else None
    if context is None or not context.has("task_uuid"):
        return None
    held = context.raw["task_uuid"]
    if isinstance(held, list):
        return context.texts("task_uuid")[-1] if held else None
    return context.text("task_uuid")


def read_found(kind: Kind, node: Node, cluster: str | None = None) -> Found:
    """An object of ours in a list. ``cluster``: whose Element listed it."""
    metadata = node.node("metadata")
    uuid = metadata.uuid("uuid")
    if cluster is None:
        status = node.maybe("status")
        cluster = None if status is None else reference_uuid(status, "cluster_reference") or None
    vm = {Kind.VM: uuid, Kind.SNAPSHOT: snapshot_vm(node)}.get(kind, "")
    return Found(
        kind=kind,
        uuid=uuid,
        name=name_of(node),
        cluster=cluster,
        vm=vm or None,
        created_at_us=metadata.time_us("creation_time") if metadata.has("creation_time") else None,
    )


def milliseconds(time_us: int) -> int:
    """A time as v3's snapshots take it. Rounded up: not a moment too early."""
    return -(-time_us // 1000)
