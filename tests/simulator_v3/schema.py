# SPDX-License-Identifier: AGPL-3.0-or-later
"""What answers of v3 may hold, field by field, after the published schema (version 3.1.0 of Prism Central's); unknown fields
are refused. What is marked ``+`` is not in that schema but was recorded on the wire, or observed on Elements.

``name* type``: required. Types: str int bool uuid time ip any, ``{A|B}``, ``[x]`` a list, ``<x>`` a map, or another table.
"""

from __future__ import annotations

import re
from typing import Any

_TEXT = """
reference: kind str; uuid uuid; name str; url str
cluster_reference: kind* {cluster}; uuid* uuid; name str
vm_reference: kind* {vm}; uuid* uuid; name str
user_reference: kind* {user}; uuid* uuid; name str
role_reference: kind* {role}; uuid* uuid; name str
subnet_reference: kind* {subnet}; uuid* uuid; name str
project_reference: kind* {project}; uuid* uuid; name str
task_reference: kind* {task}; uuid* uuid; name str
permission_reference: kind* {permission}; uuid* uuid; name str
access_control_policy_reference: kind* {access_control_policy}; uuid* uuid; name str
metadata: kind* str; uuid uuid; name str; spec_version int; spec_hash str; entity_version str; categories <str>;
  categories_mapping <[str]>; use_categories_mapping bool; should_force_translate bool; owner_reference user_reference;
  project_reference project_reference; creation_time time; last_update_time time
message_resource: message* str; reason* reason; details any
error: api_version* str; code* int; kind* str; state* str; message_list* [message_resource]
execution_context: task_uuid* [uuid]
pending_context: task_uuid* uuid
pending_status: state* str; execution_context* pending_context
accepted_vm: api_version* str; metadata* metadata; spec* vm; status* pending_status
accepted_volume_group: api_version* str; metadata* metadata; spec* volume_group; status* pending_status
accepted_image: api_version* str; metadata* metadata; spec* image; status* pending_status
accepted_vm_snapshot: api_version* str; metadata* metadata; spec* vm_snapshot; status* pending_status
empty:
deleted: api_version* str; metadata* metadata; spec* empty; status* pending_status
list_metadata: kind str; total_matches int; offset int; length int; filter str; sort_attribute str;
  sort_order {ASCENDING|DESCENDING}

disk_address: adapter_type* {SCSI|IDE|PCI|SATA|SPAPR}; device_index* int
device_properties: device_type {DISK|CDROM|VOLUME_GROUP}; disk_address disk_address
disk_storage_config: flash_mode {ENABLED|DISABLED}; storage_container_reference reference
disk_source: is_direct_attach bool; url str; kind str; uuid uuid; name str
vm_disk: uuid uuid; device_properties device_properties; disk_size_bytes int; disk_size_mib int;
  storage_config disk_storage_config; data_source_reference disk_source; volume_group_reference reference
vm_disk_output_status: uuid uuid; device_properties device_properties; disk_size_bytes int; disk_size_mib int;
  storage_config disk_storage_config; data_source_reference disk_source; volume_group_reference reference;
  is_migration_in_progress bool; is_encryption_in_progress bool
ip_address: ip ip; type {ASSIGNED|LEARNED}; ip_type {DHCP|STATIC}; prefix_length int; gateway_address_list [ip]
vm_nic: ip_endpoint_list [ip_address]; is_connected bool; mac_address str; model {VIRTIO|E1000};
  nic_type {NORMAL_NIC|DIRECT_NIC|NETWORK_FUNCTION_NIC|SPAN_DESTINATION_NIC}; num_queues int; secondary_ip_address_list [ip];
  subnet_reference subnet_reference; trunked_vlan_list [int]; uuid uuid; vlan_mode {ACCESS|TRUNKED}
vm_boot_config: boot_type {UEFI|LEGACY|SECURE_BOOT}; boot_device_order_list [{CDROM|DISK|NETWORK}]; boot_device any
guest_transition: enable_script_exec bool; should_fail_on_script_failure bool
vm_power_state_mechanism: mechanism {ACPI|GUEST|HARD}; guest_transition_config guest_transition
vm_apc_config: enabled bool; cpu_model_reference reference
vm_vnuma_config: num_vnuma_nodes int
vm_vtpm: vtpm_enabled bool; version str; data_source_reference reference
nutanix_guest_tools_status: available_version str; enabled_capability_list [{SELF_SERVICE_RESTORE|VSS_SNAPSHOT}];
  guest_os_version str; is_reachable bool; iso_mount_state {MOUNTED|UNMOUNTED}; ngt_state {INSTALLED|UNINSTALLED};
  state {ENABLED|DISABLED}; version str; vm_mobility_drivers_installed bool; vss_snapshot_capable bool
guest_tools_status: nutanix_guest_tools nutanix_guest_tools_status
vm_resources: apc_config vm_apc_config; bios_uuid uuid; boot_config vm_boot_config; disable_branding bool;
  disk_list [vm_disk]; enable_cpu_passthrough bool; generation_uuid uuid; gpu_console_enabled bool; gpu_list [any];
  guest_os_id str; guest_tools any; hardware_clock_timezone str; hardware_virtualization_enabled bool; is_agent_vm bool;
  is_vcpu_hard_pinned bool; machine_type {PC|PSERIES|Q35}; memory_overcommit_enabled bool; memory_size_mib int;
  nic_list [vm_nic]; num_sockets int; num_threads_per_core int; num_vcpus_per_socket int; parent_reference reference;
  power_state {ON|OFF}; power_state_mechanism vm_power_state_mechanism; serial_port_list [any]; vga_console_enabled bool;
  vnuma_config vm_vnuma_config; vtpm_config vm_vtpm; +cpu_hotplug_enabled bool; +scsi_controller_enabled bool
vm_resources_def_status: apc_config vm_apc_config; bios_uuid uuid; boot_config vm_boot_config; disable_branding bool;
  disk_list [vm_disk_output_status]; enable_cpu_passthrough bool; generation_uuid uuid; gpu_console_enabled bool;
  gpu_list [any]; guest_os_id str; guest_tools guest_tools_status; hardware_clock_timezone str;
  hardware_virtualization_enabled bool; host_reference reference; hypervisor_type {ESX|HyperV|AHV}; is_agent_vm bool;
  is_vcpu_hard_pinned bool; machine_type {PC|PSERIES|Q35}; memory_overcommit_enabled bool; memory_size_mib int;
  nic_list [vm_nic]; num_sockets int; num_threads_per_core int; num_vcpus_per_socket int; parent_reference reference;
  power_state {ON|OFF|PAUSED|UNKNOWN}; power_state_mechanism vm_power_state_mechanism;
  protection_type {UNPROTECTED|PD_PROTECTED|RULE_PROTECTED}; serial_port_list [any]; vga_console_enabled bool;
  vnuma_config vm_vnuma_config; vtpm_config vm_vtpm; +cpu_hotplug_enabled bool; +scsi_controller_enabled bool
vm: name* str; description str; cluster_reference cluster_reference; availability_zone_reference reference;
  resources* vm_resources
vm_def_status: name* str; description str; state str; message_list [message_resource]; cluster_reference cluster_reference;
  availability_zone_reference reference; resources* vm_resources_def_status; +execution_context execution_context
vm_intent_response: api_version* str; metadata* metadata; spec vm; status vm_def_status
vm_intent_resource: metadata* metadata; spec vm; status vm_def_status
vm_list_intent_response: api_version* str; metadata* list_metadata; entities [vm_intent_resource]

vm_snapshot_resources: entity_uuid* uuid
snapshot_file: file_path* str; snapshot_file_path* str
vm_snapshot: name* str; snapshot_type {CRASH_CONSISTENT|APPLICATION_CONSISTENT}; expiration_time_msecs int;
  resources* vm_snapshot_resources
vm_snapshot_status: name* str; state* {PENDING|COMPLETE|ERROR|DELETE_PENDING}; message_list [message_resource];
  snapshot_type {CRASH_CONSISTENT|APPLICATION_CONSISTENT}; expiration_time_msecs int; consistency_group_uuid uuid;
  location_agnostic_uuid uuid; resources vm_snapshot_resources; snapshot_file_list [snapshot_file];
  execution_context execution_context
vm_snapshot_response: api_version* str; metadata* metadata; spec* vm_snapshot; status* vm_snapshot_status
vm_snapshot_resource: metadata* metadata; spec* vm_snapshot; status* vm_snapshot_status
vm_snapshot_list: api_version* str; metadata* list_metadata; entities* [vm_snapshot_resource]
region: offset* int; length* int; type* {REGULAR|ZEROED}
changed_regions: api_version* str; file_size* int; region_list* [region]; next_offset int

recoverability: status {RECOVERABLE|PARTIAL_RECOVERABLE|UNRECOVERABLE}; reason str
vm_recovery_point_resources: source_cluster_reference cluster_reference; parent_vm_reference vm_reference;
  recovery_point_type {CRASH_CONSISTENT|APPLICATION_CONSISTENT|LIVE}; creation_time time; expiration_time time;
  vm_recovery_point_location_agnostic_uuid uuid
vm_recovery_point_status_resources: source_cluster_reference cluster_reference; parent_vm_reference vm_reference;
  recovery_point_type {CRASH_CONSISTENT|APPLICATION_CONSISTENT|LIVE}; creation_time time; expiration_time time;
  vm_recovery_point_location_agnostic_uuid uuid; consistency_group_uuid str; recoverability recoverability; vm_spec vm;
  vm_metadata metadata
vm_recovery_point: name str; cluster_reference cluster_reference; resources vm_recovery_point_resources
vm_recovery_point_def_status: name str; state str; cluster_reference cluster_reference; message_list [message_resource];
  resources vm_recovery_point_status_resources
vm_recovery_point_intent_response: api_version* str; metadata* metadata; spec vm_recovery_point;
  status vm_recovery_point_def_status
vm_recovery_point_intent_resource: metadata* metadata; spec vm_recovery_point; status vm_recovery_point_def_status
vm_recovery_point_list: api_version* str; metadata* list_metadata; entities [vm_recovery_point_intent_resource]

volume_disk_input: data_source_reference reference; disk_size_bytes int; disk_size_mib int; index int;
  storage_container_uuid uuid
volume_disk_output: uuid uuid; disk_size_bytes int; disk_size_mib int; index int; storage_container_uuid uuid
attachment_input: client_secret str; iscsi_initiator_name str; iscsi_initiator_network_id str; vm_reference vm_reference
attachment_output: enabled_authentications {CHAP|NONE}; iscsi_initiator_name str; iscsi_initiator_network_id str;
  vm_reference vm_reference
volume_group_input: attachment_list [attachment_input]; created_by str; disk_list [volume_disk_input];
  flash_mode {ENABLED|DISABLED}; is_hidden bool; iscsi_target_prefix str; load_balance_vm_attachments bool;
  sharing_status {SHARED|NOT_SHARED}; usage_type {USER|INTERNAL|TEMPORARY|BACKUP_TARGET|UNKNOWN}
volume_group_output: attachment_list [attachment_output]; created_by str; disk_list [volume_disk_output];
  enabled_authentications {CHAP|NONE}; flash_mode {ENABLED|DISABLED}; is_hidden bool; iscsi_target_name str;
  iscsi_target_prefix str; load_balance_vm_attachments bool; sharing_status {SHARED|NOT_SHARED}; size_bytes int; size_mib int;
  usage_type {USER|INTERNAL|TEMPORARY|BACKUP_TARGET|UNKNOWN}
volume_group: name* str; description str; cluster_reference cluster_reference; resources* volume_group_input
volume_group_def_status: name* str; description str; state str; message_list [message_resource];
  cluster_reference cluster_reference; resources* volume_group_output; +execution_context execution_context
volume_group_intent_response: api_version* str; metadata* metadata; spec volume_group; status volume_group_def_status
volume_group_intent_resource: metadata* metadata; spec volume_group; status volume_group_def_status
volume_group_list: api_version* str; metadata* list_metadata; entities [volume_group_intent_resource]

checksum: checksum_algorithm* {SHA_1|SHA_256}; checksum_value* str
image_resources: architecture {X86_64|PPC64|PPC64LE}; checksum checksum; data_source_reference reference;
  image_type {DISK_IMAGE|ISO_IMAGE}; initial_placement_ref_list [cluster_reference]; source_uri str; source_options any
image_resources_def_status: architecture {X86_64|PPC64|PPC64LE}; checksum checksum; data_source_reference reference;
  current_cluster_reference_list [cluster_reference]; image_type {DISK_IMAGE|ISO_IMAGE};
  initial_placement_ref_list [cluster_reference]; retrieval_uri_list [str]; size_bytes int; source_uri str
image: name* str; description str; resources* image_resources
image_def_status: name* str; description str; state str; message_list [message_resource];
  cluster_reference cluster_reference; resources* image_resources_def_status; +execution_context execution_context
image_intent_response: api_version* str; metadata* metadata; spec image; status image_def_status
image_intent_resource: metadata* metadata; spec image; status image_def_status
image_list: api_version* str; metadata* list_metadata; entities [image_intent_resource]

build_info: build_type* str; version* str; full_version str; commit_id* str; short_commit_id* str; commit_date time;
  is_long_term_support bool
cluster_software: software_type* str; status str; version* str
cluster_network: external_ip ip; external_data_services_ip ip; external_subnet str; internal_subnet str;
  name_server_ip_list [ip]; ntp_server_ip_list [str]
cluster_config: service_list [{AOS|PRISM_CENTRAL}]; build build_info; software_map <cluster_software>; is_available bool;
  operation_mode str; redundancy_factor int; timezone str; cluster_arch {X86_64|PPC64LE}; encryption_status str
hypervisor_server: ip* ip; type str; version str
cluster_nodes: hypervisor_server_list [hypervisor_server]
cluster_resources: config* cluster_config; network* cluster_network; nodes cluster_nodes
cluster_spec_resources: config empty; network cluster_network
cluster: name str; resources cluster_spec_resources
cluster_def_status: name str; state str; message_list [message_resource]; resources* cluster_resources
cluster_intent_response: api_version* str; metadata* metadata; spec cluster; status cluster_def_status
cluster_intent_resource: metadata* metadata; spec cluster; status cluster_def_status
cluster_list: api_version* str; metadata* list_metadata; entities [cluster_intent_resource]
hypervisor: ip* ip; num_vms int; hypervisor_full_name str
controller_vm: ip* ip
host_resources: hypervisor hypervisor; controller_vm controller_vm; host_type str; serial_number str; num_cpu_sockets int;
  num_cpu_cores int; memory_capacity_mib int
host: name str; resources* empty
host_def_status: name str; state str; cluster_reference reference; resources* host_resources
host_intent_resource: metadata* metadata; spec host; status host_def_status
host_list: api_version* str; metadata* list_metadata; entities [host_intent_resource]
pc_resources: version* str; pc_vm_list* [any]; type str; cluster_uuid uuid; virtual_ip ip
prism_central: resources* pc_resources

subnet_resources: subnet_type* {VLAN|OVERLAY}; vlan_id int; vswitch_name str; virtual_switch_uuid uuid; is_external bool
subnet: name* str; description str; cluster_reference cluster_reference; resources* subnet_resources
subnet_def_status: name* str; description str; state str; cluster_reference cluster_reference; resources* subnet_resources
subnet_intent_response: api_version* str; metadata* metadata; spec subnet; status subnet_def_status
subnet_intent_resource: metadata* metadata; spec subnet; status subnet_def_status
subnet_list: api_version* str; metadata* list_metadata; entities [subnet_intent_resource]

task: api_version str; uuid uuid; status {QUEUED|RUNNING|SUCCEEDED|ABORTED|SUSPENDED|FAILED}; operation_type str;
  progress_message str; percentage_complete int; logical_timestamp int; entity_reference_list [reference];
  subtask_reference_list [task_reference]; cluster_reference cluster_reference; creation_time time; creation_time_usecs int;
  start_time time; start_time_usecs int; completion_time time; completion_time_usecs int; last_update_time time;
  error_code str; error_detail str; parent_task_reference task_reference; requested_status str
task_list: api_version* str; metadata* list_metadata; entities* [task]
task_poll_response: entities [task]; has_poll_timed_out bool
procedural_response: task_uuid* uuid
idempotence_identifiers_response: client_identifier str; count* int; expiration_time time; uuid_list* [uuid]

user_resources: user_type {LOCAL|IDP|DIRECTORY_SERVICE}; display_name str; projects_reference_list [project_reference];
  access_control_policy_reference_list [access_control_policy_reference]
user_spec: resources* empty
user_def_status: name* str; state str; message_list [message_resource]; resources* user_resources
user_intent_response: api_version* str; metadata* metadata; spec user_spec; status user_def_status
user_intent_resource: metadata* metadata; spec user_spec; status user_def_status
user_list: api_version* str; metadata* list_metadata; entities [user_intent_resource]
filter_list: context_list [any]
role_acp: name* str; permission_uuid_list [uuid]
acp_detail: filter_list filter_list; role role_acp
user_details: user_uuid uuid; username str; display_name str; user_type {LOCAL|IDP|DIRECTORY_SERVICE|Xi}
user_info: user_details user_details; user_legacy_name str; access_control_policy_list [acp_detail]
role_resources: permission_reference_list [permission_reference]
role: name* str; description str; resources* role_resources
role_def_status: name* str; description str; state str; is_system_defined bool; resources* role_resources
role_intent_resource: metadata* metadata; spec role; status role_def_status
role_list: api_version* str; metadata* list_metadata; entities [role_intent_resource]
acp_resources: role_reference role_reference; user_reference_list [user_reference]; user_group_reference_list [reference];
  filter_list filter_list
acp: name str; description str; resources* acp_resources
acp_def_status: name str; description str; state str; is_system_defined bool; resources* acp_resources
acp_intent_resource: metadata* metadata; spec acp; status acp_def_status
acp_list: api_version* str; metadata* list_metadata; entities [acp_intent_resource]
permission_resources: operation* str; kind* str
permission: name* str; description str; resources* permission_resources
permission_def_status: name* str; description str; state str; resources* permission_resources
permission_intent_resource: metadata* metadata; spec permission; status permission_def_status
permission_list: api_version* str; metadata* list_metadata; entities [permission_intent_resource]
category_key_status: api_version str; name* str; description str; system_defined bool
category_list: api_version str; metadata list_metadata; entities [category_key_status]
category_value_status: api_version str; name str; value str; description str; system_defined bool
category_value_list: api_version str; metadata list_metadata; entities [category_value_status]
versions: major_version* str; minor_version* str
groups_timevalue_pair: values [str]; time int
groups_field_data: name str; values [groups_timevalue_pair]
groups_entity: entity_id str; data [groups_field_data]
groups_group_result: entity_results [groups_entity]; group_by_column_value str; total_entity_count int
groups_response: entity_type str; filtered_entity_count int; filtered_group_count int; group_results [groups_group_result];
  total_entity_count int; total_group_count int
"""
#: Reasons of the published schema that are used here.
_REASONS = """
ACCESS_DENIED AUTHENTICATION_REQUIRED CONCURRENT_REQUESTS_NOT_ALLOWED ENTITY_ALREADY_EXISTS ENTITY_DELETION_FAILED
ENTITY_NAME_UUID_MISMATCH ENTITY_NOT_FOUND INTERNAL_ERROR INVALID_ARGUMENT INVALID_REQUEST INVALID_UUID MISSING_ATTRIBUTE
REQUEST_NOT_SUPPORTED SERVICE_UNAVAILABLE SPEC_UPDATE_ERROR TOO_MANY_REQUESTS UNSUPPORTED_MEDIA_TYPE_ERROR
"""
_FORMS = {
    "uuid": re.compile(r"[a-fA-F0-9]{8}(-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}"),
    "time": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
    "ip": re.compile(r"(\d{1,3}\.){3}\d{1,3}"),
    "reason": re.compile("|".join(_REASONS.split())),
    "str": re.compile(r"[\s\S]*"),
}


def _tables() -> dict[str, dict[str, tuple[str, bool]]]:
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    for line in re.sub(r";\n +", "; ", _TEXT).split("\n"):
        name, colon, rest = line.partition(":")
        if not colon:
            continue
        fields = {}
        for field in filter(None, (part.strip() for part in rest.split(";"))):
            key, _, kind = field.partition(" ")
            fields[key.strip("+*")] = (kind.strip(), key.endswith("*"))
        found[name] = fields
    return found


TABLES = _tables()


def check(value: Any, kind: str, where: str = "") -> None:
    """Raises AssertionError, with where it stands, for a value that the schema does not allow."""
    if kind == "any":
        return
    if kind[0] == "[":
        assert isinstance(value, list), f"{where}: no list"
        for index, item in enumerate(value):
            check(item, kind[1:-1], f"{where}[{index}]")
    elif kind[0] == "<":
        assert isinstance(value, dict), f"{where}: no map"
        for key, item in value.items():
            check(item, kind[1:-1], f"{where}.{key}")
    elif kind[0] == "{":
        assert value in kind[1:-1].split("|"), f"{where}: {value!r} is not one of {kind}"
    elif kind in ("int", "bool"):
        assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"
    elif kind in _FORMS:
        assert isinstance(value, str), f"{where}: {value!r} is no string"
        assert _FORMS[kind].fullmatch(value), f"{where}: {value!r} is no {kind}"
    else:
        _check_record(value, kind, where or kind)


def _check_record(value: Any, kind: str, where: str) -> None:
    fields = TABLES[kind]
    assert isinstance(value, dict), f"{where}: {value!r} is no {kind}"
    unknown = value.keys() - fields.keys()
    assert not unknown, f"{where}: {kind} has no {sorted(unknown)}"
    for name, (inner, required) in fields.items():
        assert name in value or not required, f"{where}: {name} is missing"
        if name in value:
            check(value[name], inner, f"{where}.{name}")
