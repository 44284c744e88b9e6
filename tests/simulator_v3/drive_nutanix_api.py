# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run with nutanix-api's own interpreter: HOST PORT USER, the password on standard input. Raises where an answer is not right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime

from nutanix_api import (  # type: ignore[import-not-found]
    NutanixApiClient,
    NutanixCluster,
    NutanixImage,
    NutanixSubnet,
    NutanixTask,
    NutanixVM,
)
from nutanix_api.exceptions import RequestError  # type: ignore[import-not-found]
from nutanix_api.nutanix_task import TaskStatus  # type: ignore[import-not-found]
from nutanix_api.nutanix_vm import VMBootDevices  # type: ignore[import-not-found]


def refused(call: Callable[[], object]) -> str:
    """What the client raises."""
    try:
        call()
    except RequestError as error:
        return str(error)
    raise AssertionError("it was not refused")


def drive(client: NutanixApiClient) -> None:
    # Two pages of 20.
    vms = NutanixVM.list_entities(client)
    assert len({vm.uuid for vm in vms}) == len(vms) == 25, len(vms)
    app = next(vm for vm in vms if vm.name == "app01")
    assert app.power_state == "ON"
    assert app.num_sockets == 2
    assert len(app.mac_addresses) == 1
    assert len(app.spec.disk_list) == 3
    assert NutanixVM.get(client, app.uuid).entity_version == app.entity_version

    app.power_off()
    assert NutanixVM.get(client, app.uuid).power_state == "OFF"
    app.power_on()
    app.load(app.uuid)
    assert app.power_state == "ON"
    app.update_boot_order([VMBootDevices.NETWORK, VMBootDevices.DISK])
    app.load(app.uuid)
    assert app.spec.boot_device_order == ["NETWORK", "DISK"]
    assert app.reboot()["task_uuid"]
    stale = NutanixVM.get(client, app.uuid)
    app.load(app.uuid)
    app.update_boot_order(VMBootDevices.default_boot_order())
    assert "409" in refused(lambda: stale.update_boot_order([VMBootDevices.DISK]))
    assert "404" in refused(lambda: NutanixVM.get(client, "00000000-0000-4000-8000-000000000000"))

    clusters = NutanixCluster.list_entities(client)
    assert [c.name for c in clusters] == ["cluster-a", "cluster-b", "prism-central"]
    assert clusters[0].external_ip
    assert clusters[0].external_data_services_ip
    subnets = NutanixSubnet.list_entities(client)
    assert {s.name for s in subnets} == {"vlan10", "isolated"}
    assert all(s.subnet_type == "VLAN" for s in subnets)
    [image] = NutanixImage.list_entities(client)
    assert (image.name, image.size_bytes, image.image_type) == ("judge", 1 << 20, "DISK_IMAGE")
    # Its list of tasks is what was answered, not yet objects.
    tasks = [NutanixTask.get_from_info(client, info) for info in NutanixTask.list_entities(client)]
    assert tasks
    for task in tasks:
        assert isinstance(task.status, TaskStatus)
        assert isinstance(task.creation_time, datetime)
    found = NutanixTask.get(client, tasks[-1].uuid)
    assert found.percentage_complete == 100


if __name__ == "__main__":
    host, port, user = sys.argv[1:]
    drive(NutanixApiClient(user, sys.stdin.readline().strip(), port, host))
