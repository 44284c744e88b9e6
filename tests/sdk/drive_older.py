# SPDX-License-Identifier: AGPL-3.0-or-later
"""The SDKs of 4.0 and 4.1, which negotiate no version, against a Prism Central of the family 7.3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from driving import Setting, Tasks, ask, done, refused, sdk  # type: ignore[import-not-found]


def tags(setting: Setting, tasks: Tasks) -> None:
    """Lists, power, and tags that are stale."""
    vmm = sdk("vmm")
    vms = vmm.VmApi(setting.client("vmm"))
    names = [vm.name for page in (0, 1) for vm in vms.list_vms(_page=page, _limit=3).data]
    assert len(set(names)) == len(names) > 3
    answer = vms.get_vm_by_id(setting.vm)
    assert type(answer.data).__name__ == "Vm"
    assert type(answer.data.disks[0].backing_info).__name__ == "VmDisk"
    refused(412, vms.power_off_vm, setting.vm, if_match="AQ==")
    refused(404, vms.get_vm_by_id, str(uuid4()))
    tag = vmm.ApiClient.get_etag(answer)
    tasks.wait(vms.power_off_vm(setting.vm, if_match=tag))
    answer = vms.get_vm_by_id(setting.vm)
    assert answer.data.power_state == "OFF"
    tag = vmm.ApiClient.get_etag(answer)
    tasks.wait(vms.power_on_vm(setting.vm, if_match=tag))


def regions(setting: Setting, tasks: Tasks) -> None:
    """Changed regions in the version that the token names, which is this SDK's own."""
    model = sdk("dataprotection")
    points = model.RecoveryPointsApi(setting.client("dataprotection"))
    body = model.RecoveryPoint(
        name="older",
        vm_recovery_points=[model.VmRecoveryPoint(vm_ext_id=setting.vm)],
    )
    uuid = tasks.entity(points.create_recovery_point(body), "dataprotection:config:recovery-point")
    answer = points.get_recovery_point_by_id(uuid)
    part = answer.data.vm_recovery_points[0]
    vms = sdk("vmm").VmApi(setting.client("vmm"))
    device = vms.get_vm_by_id(setting.vm).data.disks[0].ext_id
    disk = next(
        each.disk_recovery_point_ext_id
        for each in part.disk_recovery_points
        if each.disk_ext_id == device
    )
    reference = model.VmDiskRecoveryPointReference(
        recovery_point_ext_id=uuid,
        vm_recovery_point_ext_id=part.ext_id,
        disk_recovery_point_ext_id=disk,
    )
    spec = model.ComputeChangedRegionsClusterDiscoverSpec(disk_recovery_point=reference)
    operation = model.ClusterDiscoverOperation.COMPUTE_CHANGED_REGIONS
    ask_for = model.ClusterDiscoverSpec(operation=operation, spec=spec)
    info = points.discover_cluster_for_recovery_point_id(uuid, ask_for).data
    client = setting.client("dataprotection", info.cluster_ip.ipv4.value)
    client.add_default_header("Cookie", "NTNX_IGW_SESSION=" + info.jwt_token)
    found = model.RecoveryPointsApi(client).vm_recovery_point_compute_changed_regions(
        uuid, part.ext_id, disk, model.VmRecoveryPointChangedRegionsComputeSpec()
    )
    assert type(found.data[0]).__name__ == "ChangedRegion"
    tag = model.ApiClient.get_etag(answer)
    tasks.wait(points.delete_recovery_point_by_id(uuid, if_match=tag))


def new_in_4_1(setting: Setting, tasks: Tasks) -> None:
    """A VM recovery point with its configuration, and a VM whose disk comes from it."""
    vmm = sdk("vmm")
    client = setting.client("vmm")
    points, vms = vmm.VmRecoveryPointsApi(client), vmm.VmApi(client)
    body = vmm.VmRecoveryPoint(name="newer", vm_ext_id=setting.vm)
    answer = points.create_vm_recovery_point(body)
    uuid = tasks.entity(answer, "dataprotection:config:vm-recovery-point")
    point: Any = points.get_vm_recovery_point_by_ext_id(uuid)
    assert type(point.data.vm).__name__ == "Vm"
    disk = point.data.disk_recovery_points[0].disk_recovery_point_ext_id
    source = vmm.VmDiskRecoveryPointReference(
        disk_recovery_point_ext_id=disk, vm_recovery_point_ext_id=uuid
    )
    backing = vmm.AhvConfigVmDisk(data_source=vmm.DataSource(reference=source))
    new = vmm.AhvConfigVm(
        name="from-point",
        cluster=vmm.AhvConfigClusterReference(ext_id=point.data.vm.cluster.ext_id),
        memory_size_bytes=1 << 30,
        disks=[vmm.AhvConfigDisk(backing_info=backing)],
    )
    made = vms.get_vm_by_id(tasks.entity(vms.create_vm(new), "vmm:ahv:config:vm"))
    found = made.data.disks[0].backing_info
    assert type(found.data_source.reference) is vmm.VmDiskRecoveryPointReference
    assert ask("compare-disk", backing=found.disk_ext_id, snapshot=disk)["same"]
    tasks.wait(vms.delete_vm_by_id(made.data.ext_id, if_match=vmm.ApiClient.get_etag(made)))
    tag = vmm.ApiClient.get_etag(points.get_vm_recovery_point_by_ext_id(uuid))
    tasks.wait(points.delete_vm_recovery_point_by_ext_id(uuid, if_match=tag))


def main() -> None:
    """What the SDKs of this environment can."""
    setting = Setting()
    tasks = Tasks(setting)
    tags(setting, tasks)
    if Path(sys.prefix).name == "v40":
        regions(setting, tasks)
    else:
        new_in_4_1(setting, tasks)
    done()


if __name__ == "__main__":
    main()
