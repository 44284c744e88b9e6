# SPDX-License-Identifier: AGPL-3.0-or-later
"""Run with ntnx-api's own interpreter: CENTRAL ELEMENT PORT USER, the password on standard input."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

warnings.simplefilter("ignore")  # of the old packages that it needs

from ntnx_api import prism  # type: ignore[import-not-found]  # noqa: E402
from ntnx_api.client import PrismApi  # type: ignore[import-not-found]  # noqa: E402

GIB = 1 << 30


def refused(call: Callable[[], object]) -> str:
    """What the Element answered to what the client raised for."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it raises what it likes
        return str(getattr(error, "text", error))
    raise AssertionError("it was not refused")


def drive_central(api: PrismApi) -> None:
    """v3, as it asks Prism Central."""
    assert api.connection_type == "pc"
    assert len(prism.Cluster(api_client=api).get_all_uuids()) == 2
    hosts = prism.Hosts(api_client=api)
    assert len(hosts.get_metadata()) == 4
    categories = prism.Categories(api_client=api)
    assert "Environment" in [c["name"] for c in categories.get_categories()]
    assert categories.search_category_value("Environment", "Production")


def drive_element(api: PrismApi) -> None:
    """v2.0, as it asks an Element: a volume group's whole life, waited for through tasks."""
    assert api.connection_type == "pe"
    [cluster] = prism.Cluster(api_client=api).get_all_uuids()
    assert prism.Cluster(api_client=api).get()["uuid"] == cluster
    hosts = prism.Hosts(api_client=api).get()
    assert len(hosts) == 2
    containers = prism.StorageContainer(api_client=api)
    container = containers.search_name("default-container", clusteruuid=cluster)
    vms = prism.Vms(api_client=api)
    app = vms.search_name("app01", clusteruuid=cluster)
    assert app["power_state"] == "on"
    assert [d["is_cdrom"] for d in app["vm_disk_info"]] == [False, False, True], app
    volumes = prism.StorageVolume(api_client=api)
    assert volumes.create_volume_group(
        name="judge",
        load_balancing=False,
        disks=[{"size_gb": 1, "storage_container_uuid": container["storage_container_uuid"]}],
        iscsi_initators=["iqn.2026-01.org.example:judge"],
        iscsi_chap_password="Tq8sN2vLx5Rz",
        clusteruuid=cluster,
    )
    group = volumes.search_volume_groups_name("judge", refresh=True, clusteruuid=cluster)
    assert [d["vmdisk_size_bytes"] for d in group["disk_list"]] == [GIB]
    assert group["attached_clients"][0]["client_address"] == "iqn.2026-01.org.example:judge"
    assert volumes.add_disk_by_volume_group_uuid(
        group["uuid"],
        size_gb=1,
        index=1,
        storage_container_uuid=container["storage_container_uuid"],
        clusteruuid=cluster,
    )
    assert (
        len(
            volumes.search_volume_groups_uuid(group["uuid"], refresh=True, clusteruuid=cluster)[
                "disk_list"
            ]
        )
        == 2
    )
    # It is in use: refused, and still there.
    assert "attachments" in refused(
        lambda: volumes.delete_volume_group_uuid(group["uuid"], clusteruuid=cluster)
    )
    path = f"/volume_groups/{group['uuid']}"
    task = api.request(uri=path, method="PUT", payload={"attached_clients": []})["task_uuid"]
    tasks = prism.Task(api_client=api)
    tasks.watch_task(task, clusteruuid=cluster, max_refresh_secs=1)
    assert tasks.task_result[task]["progress_status"] == "Succeeded"
    assert volumes.delete_volume_group_uuid(group["uuid"], clusteruuid=cluster)
    volumes.get_volume_groups(clusteruuid=cluster)
    assert volumes.volume_groups[cluster] == []


if __name__ == "__main__":
    central, element, port, user = sys.argv[1:]
    password = sys.stdin.readline().strip()
    drive_central(PrismApi(ip_address=central, port=port, username=user, password=password))
    drive_element(PrismApi(ip_address=element, port=port, username=user, password=password))
