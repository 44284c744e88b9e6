# SPDX-License-Identifier: AGPL-3.0-or-later
"""What bodies of v3 requests may hold: the published schema's inputs, for the calls served here."""

from __future__ import annotations

from replicator.simulator.v3.checks import (
    Shape,
    anything,
    boolean,
    ipv4,
    mac,
    many,
    mapping,
    moment,
    record,
    text,
    uuid,
    whole,
)

MIB_MAX = 1 << 30


def reference(*kinds: str) -> Shape:
    """A reference to an entity by id. The name is for people."""
    return record(kind_=text(64, one_of=kinds), uuid_=uuid, name=text(1024))


_any_reference = record(
    kind=text(64), uuid=uuid, name=text(1024), url=text(2048), is_direct_attach=boolean
)
cluster_reference = reference("cluster")


def metadata(kind: str) -> Shape:
    """Metadata of an entity; what a GET gave comes back in a PUT."""
    return record(
        kind_=text(64, one_of=(kind,)),
        uuid=uuid,
        name=text(80),
        spec_version=whole(0),
        spec_hash=text(64),
        entity_version=text(64),
        categories=mapping(text(64)),
        categories_mapping=mapping(many(text(64))),
        use_categories_mapping=boolean,
        should_force_translate=boolean,
        owner_reference=reference("user"),
        project_reference=reference("project"),
        creation_time=moment,
        last_update_time=moment,
    )


def intent(kind: str, spec: Shape) -> Shape:
    """The body of a POST or PUT of an entity."""
    return record(api_version=text(16), metadata_=metadata(kind), spec_=spec)


def list_body(kind: str) -> Shape:
    """The body of a list."""
    return record(
        kind=text(64, one_of=(kind,)),
        offset=whole(0, (1 << 31) - 1),
        length=whole(1, (1 << 31) - 1),
        filter=text(4096),
        sort_attribute=text(64),
        sort_order=text(one_of=("ASCENDING", "DESCENDING")),
    )


_disk_address = record(
    adapter_type_=text(one_of=("SCSI", "IDE", "PCI", "SATA", "SPAPR")), device_index_=whole(0, 255)
)
_storage_config = record(
    flash_mode=text(one_of=("ENABLED", "DISABLED")),
    storage_container_reference=record(kind=text(64), uuid=uuid, name=text(1024)),
)
vm_disk = record(
    uuid=uuid,
    device_properties=record(
        device_type=text(one_of=("DISK", "CDROM", "VOLUME_GROUP")), disk_address=_disk_address
    ),
    disk_size_bytes=whole(1, 1 << 50),
    disk_size_mib=whole(1, MIB_MAX),
    storage_config=_storage_config,
    data_source_reference=_any_reference,
    volume_group_reference=_any_reference,
)
vm_nic = record(
    uuid=uuid,
    nic_type=text(
        one_of=("NORMAL_NIC", "DIRECT_NIC", "NETWORK_FUNCTION_NIC", "SPAN_DESTINATION_NIC")
    ),
    vlan_mode=text(one_of=("ACCESS", "TRUNKED")),
    trunked_vlan_list=many(whole(0, 4095)),
    mac_address=mac,
    model=text(one_of=("VIRTIO", "E1000")),
    num_queues=whole(1, 256),
    is_connected=boolean,
    subnet_reference=reference("subnet"),
    ip_endpoint_list=many(
        record(
            ip=ipv4,
            type=text(one_of=("ASSIGNED", "LEARNED")),
            ip_type=text(one_of=("DHCP", "STATIC")),
            prefix_length=whole(0, 32),
            gateway_address_list=many(ipv4),
        )
    ),
    secondary_ip_address_list=many(ipv4),
    network_function_nic_type=text(one_of=("INGRESS", "EGRESS", "TAP")),
    network_function_chain_reference=_any_reference,
)
boot_config = record(
    boot_type=text(one_of=("UEFI", "LEGACY", "SECURE_BOOT")),
    boot_device_order_list=many(text(one_of=("CDROM", "DISK", "NETWORK")), 3),
    boot_device=record(disk_address=_disk_address, mac_address=mac),
    data_source_reference=_any_reference,
)
_guest_tools = record(
    nutanix_guest_tools=record(
        state=text(one_of=("ENABLED", "DISABLED")),
        ngt_state=text(one_of=("INSTALLED", "UNINSTALLED")),
        iso_mount_state=text(one_of=("MOUNTED", "UNMOUNTED")),
        version=text(64),
        enabled_capability_list=many(text(one_of=("SELF_SERVICE_RESTORE", "VSS_SNAPSHOT")), 2),
        credentials=anything,
    )
)
_vm_resources = record(
    num_sockets=whole(1, 1024),
    num_vcpus_per_socket=whole(1, 1024),
    num_threads_per_core=whole(1, 8),
    memory_size_mib=whole(1, MIB_MAX),
    machine_type=text(one_of=("PC", "PSERIES", "Q35")),
    power_state=text(one_of=("ON", "OFF")),
    power_state_mechanism=record(
        mechanism=text(one_of=("ACPI", "GUEST", "HARD")),
        guest_transition_config=record(
            enable_script_exec=boolean, should_fail_on_script_failure=boolean
        ),
    ),
    boot_config=boot_config,
    disk_list=many(vm_disk, 256),
    nic_list=many(vm_nic, 64),
    guest_tools=_guest_tools,
    hardware_clock_timezone=text(64),
    guest_os_id=text(64),
    bios_uuid=uuid,
    generation_uuid=uuid,
    apc_config=record(enabled=boolean, cpu_model_reference=_any_reference),
    vnuma_config=record(num_vnuma_nodes=whole(0, 64)),
    vtpm_config=record(
        vtpm_enabled=boolean, vtpm_secret=text(4096), data_source_reference=_any_reference
    ),
    gpu_list=many(anything, 16),
    serial_port_list=many(anything, 16),
    storage_config=anything,
    guest_customization=anything,
    parent_reference=_any_reference,
    disable_branding=boolean,
    enable_cpu_passthrough=boolean,
    gpu_console_enabled=boolean,
    hardware_virtualization_enabled=boolean,
    is_agent_vm=boolean,
    is_vcpu_hard_pinned=boolean,
    memory_overcommit_enabled=boolean,
    vga_console_enabled=boolean,
    # Not in the published schema, but what a GET gives, so that it comes back in a PUT.
    cpu_hotplug_enabled=boolean,
    scsi_controller_enabled=boolean,
)
vm = record(
    name_=text(256, shortest=1),
    description=text(1000),
    cluster_reference=cluster_reference,
    availability_zone_reference=_any_reference,
    resources_=_vm_resources,
)
vm_clone = record(
    metadata=record(uuid=uuid, entity_version=text(64)),
    override_spec=record(
        name=text(80, shortest=1),
        num_sockets=whole(1, 1024),
        num_vcpus_per_socket=whole(1, 1024),
        num_threads_per_core=whole(1, 8),
        memory_size_mib=whole(1, MIB_MAX),
        nic_list=many(vm_nic, 64),
        boot_config=boot_config,
        guest_customization=anything,
    ),
)
power = record(task_uuid=uuid)
vm_snapshot = record(
    name_=text(64, shortest=1),
    snapshot_type=text(one_of=("CRASH_CONSISTENT", "APPLICATION_CONSISTENT")),
    expiration_time_msecs=whole(0),
    resources_=record(entity_uuid_=uuid),
)
recovery_point = record(
    name=text(64, shortest=1),
    recovery_point_type=text(one_of=("CRASH_CONSISTENT", "APPLICATION_CONSISTENT")),
    expiration_time=moment,
    creation_time=moment,
    vm_recovery_point_uuid=uuid,
)
recovery_point_restore = record(
    metadata=record(uuid=uuid, categories_mapping=mapping(many(text(64)))),
    vm_override_spec=record(name=text(80, shortest=1), resources=record(nic_list=many(vm_nic, 64))),
)
changed_regions = record(
    snapshot_file_path_=text(1024, shortest=1),
    reference_snapshot_file_path=text(1024),
    start_offset=whole(0),
    end_offset=whole(0),
)
idempotence = record(
    client_identifier=text(256), count_=whole(1, 4096), valid_duration_in_minutes=whole(1, 527_040)
)
volume_group = record(
    name_=text(256, shortest=1),
    description=text(1000),
    cluster_reference=cluster_reference,
    resources_=record(
        sharing_status=text(one_of=("SHARED", "NOT_SHARED")),
        usage_type=text(one_of=("USER", "INTERNAL", "TEMPORARY", "BACKUP_TARGET", "UNKNOWN")),
        flash_mode=text(one_of=("ENABLED", "DISABLED")),
        is_hidden=boolean,
        created_by=text(256),
        iscsi_target_prefix=text(512, shortest=1),
        load_balance_vm_attachments=boolean,
        target_secret=text(16, shortest=12),
        parent_reference=_any_reference,
        disk_list=many(
            record(
                index=whole(0, 16383),
                disk_size_bytes=whole(1, 1 << 50),
                disk_size_mib=whole(1, MIB_MAX),
                storage_container_uuid=uuid,
                data_source_reference=_any_reference,
            ),
            256,
        ),
        attachment_list=many(
            record(
                iscsi_initiator_name=text(64, shortest=1),
                iscsi_initiator_network_id=text(255, shortest=1),
                vm_reference=reference("vm"),
                client_secret=text(16, shortest=12),
            ),
            32,
        ),
    ),
)
image = record(
    name_=text(256, shortest=1),
    description=text(1000),
    resources_=record(
        image_type=text(one_of=("DISK_IMAGE", "ISO_IMAGE")),
        architecture=text(one_of=("X86_64", "PPC64", "PPC64LE")),
        source_uri=text(2048, shortest=1),
        data_source_reference=_any_reference,
        checksum=record(
            checksum_algorithm_=text(one_of=("SHA_1", "SHA_256")),
            checksum_value_=text(64, shortest=40),
        ),
        initial_placement_ref_list=many(cluster_reference, 64),
        source_options=record(allow_insecure_connection=boolean, basic_auth=anything),
        version=anything,
    ),
)
tasks_poll = record(poll_timeout_seconds_=whole(0, 30), task_uuid_list_=many(uuid, 1000))
groups = record(
    entity_type_=text(64, shortest=1),
    entity_ids=many(text(64)),
    filter_criteria=text(4096),
    group_member_attributes=many(
        record(attribute_=text(256), ancestor_entity_type=text(64), operation=text(16)), 256
    ),
    group_member_count=whole(0, 1 << 31),
    group_member_offset=whole(0, 1 << 31),
    group_member_sort_attribute=text(256),
    group_member_sort_order=text(one_of=("ASCENDING", "DESCENDING")),
    group_count=whole(0, 1 << 31),
    group_offset=whole(0, 1 << 31),
    group_attributes=many(anything, 64),
    group_sort_attribute=text(256),
    group_sort_order=text(one_of=("ASCENDING", "DESCENDING")),
    grouping_attribute=text(256),
    grouping_attribute_type=text(one_of=("CONTINUOUS", "DISCRETE")),
    query_name=text(256),
    availability_zone_scope=text(one_of=("LOCAL", "GLOBAL")),
    interval_start_ms=whole(0),
    interval_end_ms=whole(0),
)
