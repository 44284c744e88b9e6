# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a restored VM goes on a Nutanix cluster and what it is made of: decided from what is there, before anything is made. Pure.

Whatever cannot be decided is refused in one line that lists what there is (F5; nutanix-data-path.md, A4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec

from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator.config import Config
from replicator.errors import RefusedError, UsageError
from replicator.hardware import DiskSlot, Hardware, Nic
from replicator.prism.devices import Q35, machine_of
from replicator.prism.types import Cluster, Container, Subnet, VmSummary

#: Prism's limits (nutanix-v4.md, appendix B).
NAME_MAX: Final = 80
_SUFFIX: Final = "-restored"
_DESCRIPTION_MAX: Final = 500
_MAC: Final = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
#: Platforms' buses by AHV's names; PCI is virtio's own. What AHV has not becomes SCSI.
_BUSES: Final = {"scsi": "SCSI", "sata": "SATA", "ide": "IDE", "pci": "PCI", "virtio": "PCI"}
_ROOM: Final = {"SCSI": 256, "SATA": 6, "IDE": 4, "PCI": 7}
#: The one that every cluster is made with is called so, with a number behind it.
_DEFAULT_CONTAINER: Final = "default-container"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDisk:
    """A disk and the place that it gets. ``container``: its id."""

    image: RestoredDisk
    bus: str
    index: int
    container: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedVm:
    """A VM as it is going to be made. ``notes``: what an operator should know of it, a sentence each."""

    vm: RestoredVm
    name: str
    cluster: Cluster
    hardware: Hardware
    disks: tuple[PlannedDisk, ...]
    notes: tuple[str, ...]

    @property
    def original(self) -> str:
        """The id of the VM that it was, for the ledger."""
        return self.vm.description.uuid if self.vm.description is not None else "restored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A cluster that VMs can be made on, and what there is."""

    cluster: Cluster
    subnets: Sequence[Subnet]
    containers: Sequence[Container]


class _Named(Protocol):
    @property
    def uuid(self) -> str: ...

    @property
    def name(self) -> str: ...


Thing = TypeVar("Thing", bound=_Named)


def parse_network_map(text: str) -> dict[str, str]:
    """``network_map``: ``src=dst, src=dst``, each a subnet's name or UUID. Raises UsageError."""
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        source, equals, target = (part.strip() for part in pair.partition("="))
        if not equals or not source or not target:
            raise UsageError(
                f"network_map: {pair[:80]!r}: expected source=target, each a subnet's name or UUID"
            )
        if found.setdefault(source, target) != target:
            raise UsageError(f"network_map: {source} is given twice")
    return found


def choose_cluster(
    clusters: Sequence[Cluster], config: Config, hardware: Hardware | None
) -> Cluster:
    """``target_cluster``; else the VM's own, by id, then by name; else ``cluster``; else the only one. Raises RefusedError."""
    found: Cluster | None = None
    if config.target_cluster:
        found = _pick("target_cluster", config.target_cluster, clusters, "cluster")
    if found is None and hardware is not None:
        found = _one(clusters, hardware.cluster) or _one(clusters, hardware.cluster_name)
    if found is None and config.cluster:
        found = _pick("cluster", config.cluster, clusters, "cluster")
    if found is None:
        if len(clusters) != 1:
            raise RefusedError(
                f"which cluster a VM is restored to has to be said: give target_cluster; there are: {_list(clusters)}"
            )
        found = clusters[0]
    if not found.available:
        raise RefusedError(f"cluster {found.name} is not available: nothing is restored to it now")
    return found


def check_place(place: Place, config: Config, networks: dict[str, str]) -> None:
    """What the configuration names must be there, whatever VM is restored. Raises RefusedError."""
    if config.target_container:
        _target_container(place, config)
    for target in networks.values():
        _pick("network_map", target, place.subnets, f"subnet on cluster {place.cluster.name}")


def plan_vm(
    vm: RestoredVm,
    place: Place,
    config: Config,
    networks: dict[str, str],
    *,
    clusters: Sequence[Cluster],
    there: Sequence[VmSummary],
    macs: frozenset[str],
) -> PlannedVm:
    """How a VM is made. ``there``: the VMs that there are; ``macs``: their addresses. Raises RefusedError."""
    told = vm.made_of
    hardware = told or Hardware(platform="", uuid="", name=vm.name)
    nics, notes = _nics(hardware, place, networks, clusters, macs)
    hardware = msgspec.structs.replace(
        hardware,
        nics=nics,
        timezone=hardware.timezone if hardware.platform == "nutanix" else "",
        memory_mib=config.memory_mib or hardware.memory_mib,
    )
    if config.vcpu is not None:
        hardware = msgspec.structs.replace(
            hardware, sockets=config.vcpu, cores_per_socket=1, threads_per_core=1
        )
    if not hardware.platform:
        notes.append(
            f"nothing is known of its hardware: {hardware.sockets} vCPU, {hardware.memory_mib} MiB, no NIC"
        )
    return PlannedVm(
        vm=vm,
        name=_name(vm, config, there),
        cluster=place.cluster,
        hardware=hardware,
        disks=_places(vm, hardware, place, config),
        notes=tuple(notes),
    )


def describe(planned: PlannedVm, tag: str, job: str) -> str:
    """The description of a VM: its own, and where it came from."""
    own = " ".join(planned.hardware.description.split())[:_DESCRIPTION_MAX]
    made = f"Restored by replctl from {planned.vm.name}, job {job} ({tag})"
    return f"{own} - {made}" if own else made


def _name(vm: RestoredVm, config: Config, there: Iterable[VmSummary]) -> str:
    name = config.restore_vm_name or vm.name[: NAME_MAX - len(_SUFFIX)] + _SUFFIX
    if len(name) > NAME_MAX:
        raise RefusedError(f"restore_vm_name: longer than Prism's {NAME_MAX} characters")
    if any(each.name == name for each in there):
        raise RefusedError(
            f"there is a VM {name} already: delete or rename it, or give another restore_vm_name"
        )
    return name


def _nics(
    hardware: Hardware,
    place: Place,
    networks: dict[str, str],
    clusters: Sequence[Cluster],
    macs: frozenset[str],
) -> tuple[tuple[Nic, ...], list[str]]:
    """NICs in subnets of the target. They keep their MACs only if all of them are free, and the original would be seen here."""
    given = [nic.mac.lower() for nic in hardware.nics if nic.mac]
    known = any(cluster.uuid == hardware.cluster for cluster in clusters)
    free = (
        known
        and macs.isdisjoint(given)
        and len(set(given)) == len(given)
        and all(_MAC.fullmatch(mac) for mac in given)
    )
    nics = []
    for number, nic in enumerate(hardware.nics):
        subnet = _subnet(number, nic, place, networks)
        nics.append(
            msgspec.structs.replace(
                nic, subnet=subnet.uuid, subnet_name=subnet.name, mac=nic.mac if free else ""
            )
        )
    if not nics:
        return (), []
    if free and given:
        note = "its NICs keep their MAC addresses: no VM has them"
    elif known and not macs.isdisjoint(given):
        note = "its NICs get new MAC addresses: there is a VM that has the old ones"
    else:
        note = "its NICs get new MAC addresses"
    names = ", ".join(
        f"{old.subnet_name or old.subnet or 'no subnet'} -> {new.subnet_name}"
        for old, new in zip(hardware.nics, nics, strict=True)
    )
    return tuple(nics), [f"NICs: {names}", note]


def _subnet(number: int, nic: Nic, place: Place, networks: dict[str, str]) -> Subnet:
    for key in (nic.subnet, nic.subnet_name):
        if key and key in networks:
            what = f"subnet on cluster {place.cluster.name}"
            return _pick("network_map", networks[key], place.subnets, what)
    found = _one(place.subnets, nic.subnet) or _one(place.subnets, nic.subnet_name)
    if found is None:
        own = nic.subnet_name or nic.subnet or "(none)"
        raise RefusedError(
            f"NIC {number} is in subnet {own}, which is not on cluster {place.cluster.name}: give network_map = {own}=…, with one"
            f" of: {_list(place.subnets)}"
        )
    return found


def _places(
    vm: RestoredVm, hardware: Hardware, place: Place, config: Config
) -> tuple[PlannedDisk, ...]:
    """Disks where they were; those of which nothing is known, or whose place is taken, at the next free one."""
    slots = {slot.identity: slot for slot in hardware.disks}
    taken: set[tuple[str, int]] = set()
    found: dict[str, tuple[str, int]] = {}
    known = [disk for disk in vm.disks if disk.identity in slots]
    for disk in [*known, *(disk for disk in vm.disks if disk.identity not in slots)]:
        slot = slots.get(disk.identity)
        bus = _BUSES.get(slot.bus.lower(), "SCSI") if slot is not None else "SCSI"
        if bus == "IDE" and machine_of(hardware) == Q35:
            bus = "SATA"  # which has no IDE
        at = (bus, slot.index) if slot is not None else (bus, 0)
        if at in taken or at[1] >= _ROOM[bus]:
            at = _free(bus, taken)
        taken.add(at)
        found[disk.disk] = at
    return tuple(
        PlannedDisk(
            image=disk,
            bus=found[disk.disk][0],
            index=found[disk.disk][1],
            container=_container(slots.get(disk.identity), place, config).uuid,
        )
        for disk in vm.disks
    )


def _free(bus: str, taken: set[tuple[str, int]]) -> tuple[str, int]:
    for name in (bus, "SCSI"):
        for index in range(_ROOM[name]):
            if (name, index) not in taken:
                return name, index
    raise RefusedError(f"a VM has at most {_ROOM['SCSI']} disks on its SCSI bus")


def _container(slot: DiskSlot | None, place: Place, config: Config) -> Container:
    usable = [each for each in place.containers if not each.internal]
    if config.target_container:
        return _target_container(place, config)
    if slot is not None:
        found = _one(usable, slot.container) or _one(usable, slot.container_name)
        if found is not None:
            return found
    default = [each for each in usable if each.name.startswith(_DEFAULT_CONTAINER)]
    for choice in (default, usable):
        if len(choice) == 1:
            return choice[0]
    raise RefusedError(
        f"cluster {place.cluster.name}: which storage container disks go to has to be said: give target_container; there are:"
        f" {_list(usable)}"
    )


def _target_container(place: Place, config: Config) -> Container:
    usable = [each for each in place.containers if not each.internal]
    what = f"storage container on cluster {place.cluster.name}"
    return _pick("target_container", config.target_container, usable, what)


def _one(things: Iterable[Thing], key: str) -> Thing | None:
    """The one with this id, else the only one with this name."""
    if not key:
        return None
    things = list(things)
    match: Callable[[Thing], bool]
    for match in (lambda each: each.uuid == key.lower(), lambda each: each.name == key):
        found = [each for each in things if match(each)]
        if len(found) == 1:
            return found[0]
    return None


def _pick(key: str, wanted: str, things: Sequence[Thing], what: str) -> Thing:
    found = _one(things, wanted)
    if found is None:
        several = sum(each.name == wanted for each in things) > 1
        why = "several are called so, give the UUID of one" if several else "there is none"
        raise RefusedError(f"{key}: {what} {wanted}: {why}; there are: {_list(things)}")
    return found


def _list(things: Iterable[_Named]) -> str:
    names = sorted(f"{each.name} ({each.uuid})" for each in things)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more if names else "none"


__all__ = [
    "NAME_MAX",
    "Place",
    "PlannedDisk",
    "PlannedVm",
    "check_place",
    "choose_cluster",
    "describe",
    "parse_network_map",
    "plan_vm",
]
