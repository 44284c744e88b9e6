# SPDX-License-Identifier: AGPL-3.0-or-later
"""The whole data path of a Full and an Incremental through the newest of Nutanix's SDKs, then restore, images, lists."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from driving import (  # type: ignore[import-not-found]
    INITIATOR,
    TARGET_SECRET,
    Setting,
    Tasks,
    ask,
    done,
    luns,
    read_disk,
    refused,
    sdk,
)

BLOCK = 65536


class Judge:
    """The SDKs of all namespaces, pointed at one Prism Central."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tasks = Tasks(setting)
        self.vmm, self.volumes = sdk("vmm"), sdk("volumes")
        self.protection, self.clustermgmt = sdk("dataprotection"), sdk("clustermgmt")
        self.networking, self.iam = sdk("networking"), sdk("iam")
        client = setting.client("vmm")
        self.vms, self.images = self.vmm.VmApi(client), self.vmm.ImagesApi(client)
        self.vm_points = self.vmm.VmRecoveryPointsApi(client)
        self.groups_client = setting.client("volumes")
        self.groups = self.volumes.VolumeGroupsApi(self.groups_client)
        self.initiators = self.volumes.IscsiClientsApi(self.groups_client)
        self.points = self.protection.RecoveryPointsApi(setting.client("dataprotection"))
        clusters = setting.client("clustermgmt")
        self.clusters = self.clustermgmt.ClustersApi(clusters)
        self.containers = self.clustermgmt.StorageContainersApi(clusters)
        self.subnets = self.networking.SubnetsApi(setting.client("networking"))

    # Before a backup

    def cluster_of_vm(self) -> Any:
        """The VM's cluster; the VM and all in it come as objects."""
        vm = self.vms.get_vm_by_id(self.setting.vm).data
        assert type(vm) is self.vmm.AhvConfigVm
        assert type(vm.boot_config).__name__ in {"UefiBoot", "LegacyBoot"}
        for disk in vm.disks:
            assert type(disk.backing_info) is self.vmm.AhvConfigVmDisk
            assert disk.backing_info.disk_size_bytes > 0
        assert type(vm.nics[0].nic_network_info).__name__ == "VirtualEthernetNicNetworkInfo"
        cluster = self.clusters.get_cluster_by_id(vm.cluster.ext_id).data
        assert type(cluster) is self.clustermgmt.Cluster
        assert cluster.config.is_available is True
        assert cluster.network.external_data_service_ip.ipv4.value
        function = "config/clusterFunction/any(t:t eq Clustermgmt.Config.ClusterFunctionRef'AOS')"
        assert len(self.clusters.list_clusters(_filter=function).data) == 2
        return cluster

    def lists(self) -> None:
        """Two pages of VMs make the whole list."""
        total = self.vms.list_vms(_limit=100).metadata.total_available_results
        assert total > 2
        half = (total + 1) // 2
        names = [
            vm.name for page in (0, 1) for vm in self.vms.list_vms(_page=page, _limit=half).data
        ]
        assert len(names) == len(set(names)) == total
        one = self.vms.list_vms(_filter="name eq 'app01'").data
        assert [vm.ext_id for vm in one] == [self.setting.vm]
        refused(400, self.vms.list_vms, _limit=101)
        refused(400, self.vms.list_vms, _filter="colour eq 'red'")

    def tags(self) -> None:
        """Power off and on; stale, missing and unknown."""
        answer = self.vms.get_vm_by_id(self.setting.vm)
        tag = self.vmm.ApiClient.get_etag(answer)
        assert tag
        error = refused(412, self.vms.power_off_vm, self.setting.vm, if_match="AQ==")
        assert error["data"]["error"][0]["code"] == "PLAT-10005"
        error = refused(428, self.vms.power_off_vm, self.setting.vm)
        assert error["data"]["error"][0]["code"] == "PLAT-10004"
        refused(404, self.vms.get_vm_by_id, str(uuid4()))
        self.tasks.wait(self.vms.power_off_vm(self.setting.vm, if_match=tag))
        off = self.vms.get_vm_by_id(self.setting.vm)
        assert off.data.power_state == "OFF"
        again = self.vmm.ApiClient.get_etag(off)
        assert again != tag
        self.tasks.wait(self.vms.power_on_vm(self.setting.vm, if_match=again))
        # An object that was read carries its tag back by itself.
        changed = self.vms.get_vm_by_id(self.setting.vm).data
        changed.description = "seen by the SDK"
        self.tasks.wait(self.vms.update_vm_by_id(self.setting.vm, changed))
        assert self.vms.get_vm_by_id(self.setting.vm).data.description == "seen by the SDK"

    # A backup

    def snapshot(self, name: str) -> Any:
        """A recovery point of the VM."""
        model = self.protection
        expires = datetime.now(UTC) + timedelta(days=7)
        body = model.RecoveryPoint(
            name=name,
            recovery_point_type=model.RecoveryPointType.CRASH_CONSISTENT,
            expiration_time=expires,
            vm_recovery_points=[model.VmRecoveryPoint(vm_ext_id=self.setting.vm)],
        )
        task = self.tasks.wait(self.points.create_recovery_point(body))
        uuid = next(
            pair.value for pair in task.completion_details if pair.name == "recoveryPointExtId"
        )
        point = self.points.get_recovery_point_by_id(uuid).data
        assert type(point) is model.RecoveryPoint
        assert point.status == "COMPLETE"
        part = point.vm_recovery_points[0]
        assert type(part) is model.VmRecoveryPoint
        one = self.points.get_vm_recovery_point_by_id(point.ext_id, part.ext_id).data
        assert one.ext_id == part.ext_id
        # The configuration is in vmm's view of the same thing.
        kept = self.vm_points.get_vm_recovery_point_by_ext_id(part.ext_id).data
        assert type(kept.vm) is self.vmm.AhvConfigVm
        assert kept.vm.ext_id == self.setting.vm
        return point

    def data_disks(self, point: Any) -> dict[str, str]:
        """Disk recovery points by disk, without CD-ROMs, in the VM's order."""
        vm = self.vms.get_vm_by_id(self.setting.vm).data
        known = {
            disk.disk_ext_id: disk.disk_recovery_point_ext_id
            for disk in point.vm_recovery_points[0].disk_recovery_points
        }
        assert len(known) > len(vm.disks)  # CD-ROMs are among them
        return {disk.ext_id: known[disk.ext_id] for disk in vm.disks}

    def _reference(self, point: Any, disk: str) -> Any:
        return self.protection.VmDiskRecoveryPointReference(
            recovery_point_ext_id=point.ext_id,
            vm_recovery_point_ext_id=point.vm_recovery_points[0].ext_id,
            disk_recovery_point_ext_id=disk,
        )

    def regions(
        self, point: Any, disk: str, older: Any = None, older_disk: str = ""
    ) -> tuple[list[tuple[int, int, str]], int, int]:
        """Changed regions, the disk's size, and how many pages it took."""
        model = self.protection
        spec = model.ComputeChangedRegionsClusterDiscoverSpec(
            disk_recovery_point=self._reference(point, disk)
        )
        if older is not None:
            spec.reference_disk_recovery_point = self._reference(older, older_disk)
        body = model.ClusterDiscoverSpec(
            operation=model.ClusterDiscoverOperation.COMPUTE_CHANGED_REGIONS, spec=spec
        )
        info = self.points.discover_cluster_for_recovery_point_id(point.ext_id, body).data
        assert type(info) is model.ClusterInfo
        client = self.setting.client("dataprotection", info.cluster_ip.ipv4.value)
        client.add_default_header("Cookie", "NTNX_IGW_SESSION=" + info.jwt_token)
        element = model.RecoveryPointsApi(client)
        part = point.vm_recovery_points[0].ext_id
        found: list[tuple[int, int, str]] = []
        offset, pages, size = 0, 0, 0
        while True:
            ask_for = model.VmRecoveryPointChangedRegionsComputeSpec(
                offset=offset, block_size_byte=BLOCK
            )
            if older is not None:
                ask_for.reference_recovery_point_ext_id = older.ext_id
                ask_for.reference_vm_recovery_point_ext_id = older.vm_recovery_points[0].ext_id
                ask_for.reference_disk_recovery_point_ext_id = older_disk
            answer = element.vm_recovery_point_compute_changed_regions(
                point.ext_id, part, disk, ask_for
            )
            pages += 1
            for region in answer.data or []:
                assert type(region) is model.ChangedRegion
                found.append((region.offset, region.length, region.region_type))
            extra = {pair.name: pair.value for pair in answer.metadata.extra_info}
            size = extra["fileSize"]
            if not extra.get("nextOffset") or extra["nextOffset"] >= size:
                return found, size, pages
            assert extra["nextOffset"] > offset
            offset = extra["nextOffset"]

    def expose(self, cluster: Any, disk: str, size: int, file: Path) -> None:
        """Clone a disk's recovery point into a volume group, read it over iSCSI, take all away again."""
        model = self.volumes
        secret = model.IscsiFeatures(
            target_secret=TARGET_SECRET, enabled_authentications=model.AuthenticationType.CHAP
        )
        group = model.VolumeGroup(
            name=f"drx-{uuid4().hex[:8]}",
            created_by="drx-1a2b3c4d",
            cluster_reference=cluster.ext_id,
            sharing_status=model.SharingStatus.NOT_SHARED,
            usage_type=model.UsageType.TEMPORARY,
            target_prefix="drx-1a2b3c4d-7",
            iscsi_features=secret,
            should_load_balance_vm_attachments=False,
        )
        answer = self.groups.create_volume_group(group)
        uuid = self.tasks.entity(answer, "volumes:config:volume-group")
        reference = model.EntityReference(
            ext_id=disk, entity_type=model.EntityType.DISK_RECOVERY_POINT
        )
        body = model.VolumeDisk(index=0, disk_data_source_reference=reference)
        self.tasks.wait(self.groups.create_volume_disk(uuid, body))
        disks = self.groups.list_volume_disks_by_volume_group_id(uuid).data
        assert type(disks[0]) is model.VolumeDisk
        assert disks[0].disk_size_bytes == size
        shown = self.groups.get_volume_group_by_id(uuid)
        assert type(shown.data) is model.VolumeGroup
        assert shown.data.iscsi_features.target_secret is None
        client = model.IscsiClient(
            iscsi_initiator_name=INITIATOR,
            enabled_authentications=model.AuthenticationType.CHAP,
        )
        tag = model.ApiClient.get_etag(shown)
        self.tasks.wait(self.groups.attach_iscsi_client(uuid, client, if_match=tag))
        attached = self.groups.list_external_iscsi_attachments_by_volume_group_id(uuid).data
        assert type(attached[0]) is model.IscsiClientAttachment
        targets = self.initiators.get_iscsi_client_by_id(attached[0].ext_id).data.attached_targets
        assert [each.iscsi_target_name for each in targets] == [shown.data.target_name]
        portal = cluster.network.external_data_service_ip.ipv4.value
        ((target, lun),) = luns(self.setting, portal, shown.data.target_name)
        read_disk(self.setting, portal, target, lun, file)
        tag = model.ApiClient.get_etag(self.groups.get_volume_group_by_id(uuid))
        leaving = model.IscsiClientAttachment(ext_id=attached[0].ext_id)
        self.tasks.wait(self.groups.detach_iscsi_client(uuid, leaving, if_match=tag))
        assert luns(self.setting, portal, shown.data.target_name) == []
        tag = model.ApiClient.get_etag(self.groups.get_volume_group_by_id(uuid))
        self.tasks.wait(self.groups.delete_volume_group_by_id(uuid, if_match=tag))
        refused(404, self.groups.get_volume_group_by_id, uuid)

    def full(self, cluster: Any, point: Any) -> None:
        """Every disk, compared with what the snapshot holds."""
        for number, disk in enumerate(self.data_disks(point).values()):
            regions, size, _ = self.regions(point, disk)
            assert sum(length for _, length, _ in regions) <= size
            file = self.setting.folder / f"full{number}.raw"
            self.expose(cluster, disk, size, file)
            assert ask("compare", disk=disk, file=str(file))["same"]

    def incremental(self, cluster: Any, first: Any, second: Any) -> tuple[int, int]:
        """The changed regions of every disk, laid over the Full; bytes that were taken and pages that it took."""
        older = self.data_disks(first)
        taken, pages = 0, 0
        for number, (device, disk) in enumerate(self.data_disks(second).items()):
            regions, size, count = self.regions(second, disk, first, older[device])
            pages = max(pages, count)
            fresh = self.setting.folder / f"fresh{number}.raw"
            self.expose(cluster, disk, size, fresh)
            merged = self.setting.folder / f"full{number}.raw"
            with fresh.open("rb") as new, merged.open("r+b") as old:
                for offset, length, kind in regions:
                    assert offset % BLOCK == 0
                    new.seek(offset)
                    old.seek(offset)
                    data = new.read(length)
                    old.write(data if kind == "REGULAR" else bytes(len(data)))
                    taken += length if kind == "REGULAR" else 0
            assert ask("compare", disk=disk, file=str(merged))["same"]
        return taken, pages

    def delete_point(self, point: Any) -> None:
        """Move its expiry, then delete it."""
        model = self.protection
        later = datetime.now(UTC) + timedelta(days=30)
        tag = model.ApiClient.get_etag(self.points.get_recovery_point_by_id(point.ext_id))
        body = model.ExpirationTimeSpec(expiration_time=later)
        self.tasks.wait(
            self.points.set_recovery_point_expiration_time(point.ext_id, body, if_match=tag)
        )
        tag = model.ApiClient.get_etag(self.points.get_recovery_point_by_id(point.ext_id))
        self.tasks.wait(self.points.delete_recovery_point_by_id(point.ext_id, if_match=tag))
        refused(404, self.points.get_recovery_point_by_id, point.ext_id)

    # Restore

    def image_from_url(self, cluster: Any) -> str:
        """An image that the simulator pulls."""
        model = self.vmm
        account = model.UrlBasicAuth(username="export", password="one-time")
        source = model.UrlSource(url=self.setting.image_url, basic_auth=account)
        image = model.Image(
            name="drx-image",
            type=model.ImageType.DISK_IMAGE,
            source=source,
            cluster_location_ext_ids=[cluster.ext_id],
        )
        uuid = self.tasks.entity(self.images.create_image(image), "vmm:content:image")
        found = self.images.get_image_by_id(uuid).data
        assert type(found) is model.Image
        assert type(found.source) is model.UrlSource
        assert found.size_bytes > 0
        assert [
            each.ext_id for each in self.images.list_images(_filter="name eq 'drx-image'").data
        ] == [uuid]
        return str(uuid)

    def create_vm(self, cluster: Any, name: str, reference: Any) -> Any:
        """A VM with one disk of that source."""
        model = self.vmm
        disk = model.AhvConfigDisk(
            disk_address=model.AhvConfigDiskAddress(
                bus_type=model.AhvConfigDiskBusType.SCSI, index=0
            ),
            backing_info=model.AhvConfigVmDisk(data_source=model.DataSource(reference=reference)),
        )
        subnet = self.subnets.list_subnets(_filter="name eq 'vlan10'").data[0]
        assert type(subnet) is self.networking.Subnet
        nic = model.AhvConfigNic(
            nic_backing_info=model.VirtualEthernetNic(is_connected=False),
            nic_network_info=model.VirtualEthernetNicNetworkInfo(
                subnet=model.SubnetReference(ext_id=subnet.ext_id)
            ),
        )
        body = model.AhvConfigVm(
            name=name,
            cluster=model.AhvConfigClusterReference(ext_id=cluster.ext_id),
            num_sockets=1,
            memory_size_bytes=1 << 30,
            machine_type=model.MachineType.Q35,
            boot_config=model.UefiBoot(is_secure_boot_enabled=False),
            disks=[disk],
            nics=[nic],
        )
        uuid = self.tasks.entity(self.vms.create_vm(body), "vmm:ahv:config:vm")
        vm = self.vms.get_vm_by_id(uuid)
        source = vm.data.disks[0].backing_info.data_source.reference
        assert type(source) is type(reference)
        return vm

    def delete_vm(self, vm: Any) -> None:
        """Away with it."""
        tag = self.vmm.ApiClient.get_etag(vm)
        self.tasks.wait(self.vms.delete_vm_by_id(vm.data.ext_id, if_match=tag))

    def restores(self, cluster: Any, point: Any) -> None:
        """A VM from an image, from a volume group's disk, from a recovery point; the bytes compared."""
        image = self.image_from_url(cluster)
        vm = self.create_vm(cluster, "from-image", self.vmm.ImageReference(image_ext_id=image))
        backing = vm.data.disks[0].backing_info.disk_ext_id
        assert ask("compare-disk", backing=backing, image=image)["same"]
        self.delete_vm(vm)
        tag = self.vmm.ApiClient.get_etag(self.images.get_image_by_id(image))
        self.tasks.wait(self.images.delete_image_by_id(image, if_match=tag))

        disk = next(iter(self.data_disks(point).values()))
        model = self.volumes
        reference = model.EntityReference(
            ext_id=disk, entity_type=model.EntityType.DISK_RECOVERY_POINT
        )
        group = model.VolumeGroup(
            name="drx-restore",
            cluster_reference=cluster.ext_id,
            disks=[model.VolumeDisk(index=0, disk_data_source_reference=reference)],
        )
        answer = self.groups.create_volume_group(group)
        uuid = self.tasks.entity(answer, "volumes:config:volume-group")
        volume_disk = self.groups.list_volume_disks_by_volume_group_id(uuid).data[0].ext_id
        source = self.vmm.VolumeDiskReference(disk_ext_id=volume_disk, volume_group_ext_id=uuid)
        vm = self.create_vm(cluster, "from-volume", source)
        tag = model.ApiClient.get_etag(self.groups.get_volume_group_by_id(uuid))
        self.tasks.wait(self.groups.delete_volume_group_by_id(uuid, if_match=tag))
        backing = vm.data.disks[0].backing_info.disk_ext_id
        assert ask("compare-disk", backing=backing, snapshot=disk)["same"]
        self.delete_vm(vm)
        self.native_restore(point)

    def native_restore(self, point: Any) -> None:
        """Prism's own restore, under another name."""
        model = self.protection
        override = model.VmRecoveryPointRestoreOverride(
            vm_recovery_point_ext_id=point.vm_recovery_points[0].ext_id,
            vm_override_spec=model.AhvVmOverrideSpec(name="app01-restored"),
        )
        body = model.RecoveryPointRestorationSpec(vm_recovery_point_restore_overrides=[override])
        tag = model.ApiClient.get_etag(self.points.get_recovery_point_by_id(point.ext_id))
        task = self.tasks.wait(self.points.restore_recovery_point(point.ext_id, body, if_match=tag))
        (made,) = next(each.value for each in task.completion_details if each.name == "vmExtIds")
        vm = self.vms.get_vm_by_id(made)
        assert (vm.data.name, vm.data.power_state) == ("app01-restored", "OFF")
        self.delete_vm(vm)

    # Who may what

    def identity(self) -> None:
        """Users, policies, roles and operations, as the check of the own account goes through them."""
        client = self.setting.client("iam")
        users = (
            self.iam.UsersApi(client).list_users(_filter=f"username eq '{self.setting.user}'").data
        )
        assert type(users[0]) is self.iam.User
        policies = self.iam.AuthorizationPoliciesApi(client).list_authorization_policies().data
        mine = next(
            each
            for each in policies
            if users[0].ext_id in each.identities[0].identity_filter["user"]["uuid"]["anyof"]
        )
        role = self.iam.RolesApi(client).get_role_by_id(mine.role).data
        assert type(role) is self.iam.Role
        found = self.iam.OperationsApi(client).list_operations(
            _filter="startswith(displayName, 'Create_')", _limit=100
        )
        assert {each.ext_id for each in found.data} <= set(role.operations)
        containers = self.containers.list_storage_containers(
            _filter="startswith(name,'default')"
        ).data
        assert all(type(each) is self.clustermgmt.StorageContainer for each in containers)
        managers = sdk("prism").DomainManagerApi(self.setting.client("prism"))
        assert len(managers.list_domain_managers().data) == 1


def main() -> None:
    """The whole of it."""
    judge = Judge(Setting())
    cluster = judge.cluster_of_vm()
    judge.lists()
    judge.tags()
    judge.identity()
    first = judge.snapshot("drx-first")
    judge.full(cluster, first)
    ask("change")
    second = judge.snapshot("drx-second")
    taken, pages = judge.incremental(cluster, first, second)
    judge.delete_point(first)
    judge.restores(cluster, second)
    judge.delete_point(second)
    done(taken=taken, pages=pages)


if __name__ == "__main__":
    main()
