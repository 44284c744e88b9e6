# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pieces of answers that several namespaces show."""

from __future__ import annotations

from typing import Any
from uuid import NAMESPACE_URL, uuid5

from replicator.simulator.model import Category, Cluster, Snapshot, SnapshotVm, World
from replicator.simulator.v4.envelope import when
from replicator.simulator.web import HttpError

_BUILT_IN = (("AppType", "Default"), ("Environment", "Production"), ("Environment", "Testing"))


def ipv4(address: str) -> dict[str, Any]:
    """An address."""
    return {"ipv4": {"value": address, "prefixLength": 32}}


def check_cluster(world: World, uuid: str) -> Cluster:
    """Raises HttpError 404 for a cluster that is not there."""
    found = world.clusters.get(uuid)
    if found is None:
        raise HttpError(404, f"no cluster with the id {uuid}", "not_found")
    return found


def category_id(key: str, value: str) -> str:
    """The id of a category: always the same."""
    return str(uuid5(NAMESPACE_URL, f"replctl:category:{key}={value}"))


def categories(world: World) -> dict[str, Category]:
    """All categories by id: made by clients, built in, or used by a VM."""
    pairs = {*_BUILT_IN, *(pair for vm in world.vms.values() for pair in vm.categories.items())}
    found = {
        category_id(key, value): Category(uuid=category_id(key, value), name=key, value=value)
        for key, value in sorted(pairs)
    }
    return found | world.categories


def snapshot_vm_body(snapshot: Snapshot, part: SnapshotVm) -> dict[str, Any]:
    """A VM recovery point without what only one namespace shows. CD-ROMs are among its disks; none of them has a size."""
    kind = "APPLICATION_CONSISTENT" if snapshot.application_consistent else "CRASH_CONSISTENT"
    return {
        "extId": part.uuid,
        "name": snapshot.name,
        "vmExtId": part.vm,
        "vmCategories": [category_id(*pair) for pair in part.config.categories.items()],
        "locationAgnosticId": part.uuid,
        "creationTime": when(snapshot.created_at),
        "expirationTime": when(snapshot.expires_at),
        "status": "COMPLETE",
        "recoveryPointType": kind,
        "diskRecoveryPoints": [
            {"diskRecoveryPointExtId": disk.uuid, "diskExtId": disk.disk} for disk in part.disks
        ],
    }
