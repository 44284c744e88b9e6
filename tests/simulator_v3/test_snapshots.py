# SPDX-License-Identifier: AGPL-3.0-or-later
"""vm_snapshots and changed regions of an Element, their rules to the letter; recovery points of Prism Central."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.simulator_v3.lab_v3 import MIB, V3, Client, Lab, running

BLOCK = 65536


async def test_prism_central_does_not_know_what_an_element_does(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        for path in ("/vm_snapshots/list", "/vm_snapshots", "/data/changed_regions"):
            await lab.refused(lab.pc, "POST", path, {}, 404, "ENTITY_NOT_FOUND")
        await lab.v3(
            lab.pe, "POST", "/vm_snapshots/list", {"kind": "vm_snapshot"}, "vm_snapshot_list"
        )
        for path in ("/volume_groups/list", "/roles/list", "/vm_recovery_points/list", "/groups"):
            await lab.refused(lab.pe, "POST", path, {}, 404, "ENTITY_NOT_FOUND")
        await lab.refused(lab.pe, "PUT", f"/vms/{lab.vm.uuid}", {}, 405, "REQUEST_NOT_SUPPORTED")
        v2 = await lab.pc.ask("GET", f"/PrismGateway/services/rest/v2.0/vms/{lab.vm.uuid}")
        assert v2.status == 412


async def test_a_snapshot_gets_the_id_that_was_given_and_its_files_real_paths(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as lab:
        asked = {"client_identifier": "drx-1a2b3c4d", "count": 1, "valid_duration_in_minutes": 60}
        kind = "idempotence_identifiers_response"
        [uuid] = (await lab.v3(lab.pe, "POST", "/idempotence_identifiers", asked, kind))[
            "uuid_list"
        ]
        expires = int(time.time() * 1000) + 3_600_000
        spec = {
            "name": "drx-1a2b3c4d-7-rp-20260102T030405Z",
            "snapshot_type": "APPLICATION_CONSISTENT",
            "expiration_time_msecs": expires,
            "resources": {"entity_uuid": lab.vm.uuid},
        }
        body = {"metadata": {"kind": "vm_snapshot", "uuid": uuid}, "spec": spec}
        made = [
            await lab.v3(lab.pe, "POST", "/vm_snapshots", body, "accepted_vm_snapshot", 202)
            for _ in range(2)
        ]
        assert made[0] == made[1]  # asked for twice, it is one snapshot
        await lab.task(made[0], lab.pe)
        found = await lab.v3(lab.pe, "GET", f"/vm_snapshots/{uuid}", kind="vm_snapshot_response")
        status = found["status"]
        assert status["snapshot_type"] == "APPLICATION_CONSISTENT"
        assert status["expiration_time_msecs"] == expires
        assert len(status["snapshot_file_list"]) == 3  # the CD-ROM is one of them
        for each in status["snapshot_file_list"]:
            live = re.fullmatch(
                r"/default-container/\.acropolis/vmdisk/([\w-]+)", each["file_path"]
            )
            kept = re.fullmatch(
                r"/default-container/\.snapshot/(\d\d)/\d+-\d+-(\d+)/\.acropolis/vmdisk/([\w-]+)",
                each["snapshot_file_path"],
            )
            assert live is not None
            assert kept is not None
            assert int(kept[1]) == int(kept[2]) % 100
            assert live[1] == kept[3]
        listed = await lab.v3(
            lab.pe,
            "POST",
            "/vm_snapshots/list",
            {"kind": "vm_snapshot", "filter": f"entity_uuid=={lab.vm.uuid}"},
            "vm_snapshot_list",
        )
        assert [e["metadata"]["uuid"] for e in listed["entities"]] == [uuid]
        body["spec"] = {**spec, "name": "another"}
        await lab.refused(lab.pe, "POST", "/vm_snapshots", body, 409, "ENTITY_ALREADY_EXISTS")


async def test_a_snapshot_that_fails_says_so_and_one_that_is_deleted_is_gone(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as lab:
        lab.vm.tools = False
        body = {
            "metadata": {"kind": "vm_snapshot"},
            "spec": {
                "name": "n",
                "snapshot_type": "APPLICATION_CONSISTENT",
                "resources": {"entity_uuid": lab.vm.uuid},
            },
        }
        made = await lab.v3(lab.pe, "POST", "/vm_snapshots", body, "accepted_vm_snapshot", 202)
        await lab.task(made, lab.pe, "FAILED")
        found = await lab.v3(
            lab.pe, "GET", f"/vm_snapshots/{made['metadata']['uuid']}", kind="vm_snapshot_response"
        )
        assert found["status"]["state"] == "ERROR"
        uuid = (await lab.snapshot("good"))["metadata"]["uuid"]
        await lab.task(
            await lab.v3(lab.pe, "DELETE", f"/vm_snapshots/{uuid}", kind="deleted", status=202)
        )
        await lab.refused(lab.pe, "GET", f"/vm_snapshots/{uuid}", None, 404, "ENTITY_NOT_FOUND")
        await lab.refused(lab.pe, "DELETE", f"/vm_snapshots/{uuid}", None, 404, "ENTITY_NOT_FOUND")


async def test_a_snapshots_body_is_checked(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        metadata = {"kind": "vm_snapshot"}
        entity = {"entity_uuid": lab.vm.uuid}
        past = {"name": "n", "resources": entity, "expiration_time_msecs": 1}
        for spec in (
            {"name": "x" * 65, "resources": entity},
            past,
            {"name": "n", "resources": entity, "snapshot_type": "BEST"},
            {"name": "n", "resources": entity, "expiration_time_msecs": "1"},
        ):
            body = {"metadata": metadata, "spec": spec}
            await lab.refused(lab.pe, "POST", "/vm_snapshots", body, 422, "INVALID_REQUEST")
        body = {
            "metadata": metadata,
            "spec": {"name": "n", "resources": {"entity_uuid": str(uuid4())}},
        }
        await lab.refused(lab.pe, "POST", "/vm_snapshots", body, 404, "ENTITY_NOT_FOUND")


async def _two(lab: Lab) -> tuple[str, str, str]:
    """A disk's paths in two snapshots with writes between, and the disk's id."""
    first = await lab.paths(await lab.snapshot("one"))
    guest = lab.simulator.guest(lab.vm.uuid)
    await guest.write(5 * MIB + 10, b"changed")
    await guest.write(9 * MIB, b"x" * (3 * BLOCK))
    second = await lab.paths(await lab.snapshot("two"))
    disk = next(d.backing for d in lab.vm.disks if not d.cdrom)
    assert disk is not None
    return first[disk], second[disk], disk


async def test_changed_regions_hold_what_changed_in_whole_blocks(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        first, second, _ = await _two(lab)
        size, found = await lab.regions(second, first)
        assert size == 16 * MIB
        assert found == [(5 * MIB, BLOCK, "REGULAR"), (9 * MIB, 3 * BLOCK, "REGULAR")]
        assert (await lab.regions(second, second))[1] == []
        whole = (await lab.regions(second))[1]
        assert sum(length for _, length, _ in whole) == size
        lab.simulator.core.knobs["regions_per_page"] = 1
        assert (await lab.regions(second, first))[1] == found
        guest = lab.simulator.guest(lab.vm.uuid)
        await guest.zero(9 * MIB, BLOCK)
        disk = guest.disk.backing
        assert disk is not None
        third = (await lab.paths(await lab.snapshot("three")))[disk]
        assert (await lab.regions(third, second))[1] == [(9 * MIB, BLOCK, "ZEROED")]


async def test_the_type_field_can_have_its_other_name(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        lab.simulator.core.knobs["v3_region_type_field"] = "region_type"
        first, second, _ = await _two(lab)
        body = {
            "snapshot_file_path": second,
            "reference_snapshot_file_path": first,
            "start_offset": 0,
        }
        page = (await lab.pe.ask("POST", f"{V3}/data/changed_regions", body)).json
        assert {r["region_type"] for r in page["region_list"]} == {"REGULAR"}


async def test_the_rules_of_changed_regions(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        first, second, _ = await _two(lab)
        call = "/data/changed_regions"
        await lab.refused(lab.pe, "POST", call, {}, 422, "MISSING_ATTRIBUTE")
        for wrong in (
            {"reference_snapshot_file_path": None},
            {"start_offset": "0"},
            {"start_offset": -1},
            {"start_offset": True},
            {"block": 1},
        ):
            body: dict[str, Any] = {"snapshot_file_path": second, **wrong}
            await lab.refused(lab.pe, "POST", call, body, 422, "INVALID_REQUEST")
        gone = second.replace("/.snapshot/", "/.snapshot/9")
        for body in (
            {"snapshot_file_path": gone},
            {"snapshot_file_path": "/etc/passwd"},
            {"snapshot_file_path": second, "reference_snapshot_file_path": gone},
        ):
            text = await lab.refused(lab.pe, "POST", call, body, 400, "ENTITY_NOT_FOUND")
            assert "kInvalidValue" in text
        other = next(
            path
            for path in (await lab.paths(await lab.snapshot("x"))).values()
            if path[-36:] != first[-36:]
        )
        body = {"snapshot_file_path": second, "reference_snapshot_file_path": other}
        await lab.refused(lab.pe, "POST", call, body, 400, "ENTITY_NOT_FOUND")
        empty = {"snapshot_file_path": second, "reference_snapshot_file_path": ""}
        await lab.v3(lab.pe, "POST", call, empty, "changed_regions")  # as good as none


async def test_an_expired_reference_is_an_unknown_path(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        first, second, _ = await _two(lab)
        lab.simulator.faults.add("snapshot-expired", "one")
        body = {"snapshot_file_path": second, "reference_snapshot_file_path": first}
        text = await lab.refused(
            lab.pe, "POST", "/data/changed_regions", body, 400, "ENTITY_NOT_FOUND"
        )
        assert "kInvalidValue" in text
        assert [s.name for s in lab.simulator.world.snapshots.values()] == ["two"]


async def test_identifiers_can_be_refused_by_elements(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        asked = {"client_identifier": "c", "count": 3}
        kind = "idempotence_identifiers_response"
        made = await lab.v3(lab.pc, "POST", "/idempotence_identifiers", asked, kind)
        assert len(set(made["uuid_list"])) == 3
        assert await lab.v3(lab.pc, "GET", "/idempotence_identifiers/c", None, kind) == made
        await lab.v3(lab.pc, "DELETE", "/idempotence_identifiers/c", kind="empty")
        await lab.refused(
            lab.pc, "GET", "/idempotence_identifiers/c", None, 404, "ENTITY_NOT_FOUND"
        )
        lab.simulator.core.knobs["v3_identifiers_on_element"] = False
        await lab.refused(
            lab.pe, "POST", "/idempotence_identifiers", asked, 404, "ENTITY_NOT_FOUND"
        )
        await lab.refused(
            lab.pc, "POST", "/idempotence_identifiers", {"count": 4097}, 422, "INVALID_REQUEST"
        )


async def test_recovery_points_of_prism_central_hold_the_configuration(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        uuid = str(uuid4())
        body = {
            "name": "rp",
            "vm_recovery_point_uuid": uuid,
            "recovery_point_type": "CRASH_CONSISTENT",
        }
        made = await lab.v3(
            lab.pc, "POST", f"/vms/{lab.vm.uuid}/snapshot", body, "procedural_response", 202
        )
        await lab.task(made)
        kind = "vm_recovery_point_intent_response"
        found = await lab.v3(lab.pc, "GET", f"/vm_recovery_points/{uuid}", kind=kind)
        assert found["status"]["resources"]["vm_spec"]["name"] == "app01"
        listed = await lab.v3(
            lab.pc, "POST", "/vm_recovery_points/list", {}, "vm_recovery_point_list"
        )
        assert listed["metadata"]["total_matches"] == 1
        on_element = await lab.v3(lab.pe, "POST", "/vm_snapshots/list", {}, "vm_snapshot_list")
        assert on_element["entities"] == []
        override = {"vm_override_spec": {"name": "restored"}}
        path = f"/vm_recovery_points/{uuid}/restore"
        await lab.task(await lab.v3(lab.pc, "POST", path, override, "procedural_response", 202))
        assert lab.simulator.vm("restored").power == "OFF"
        await lab.task(
            await lab.v3(
                lab.pc, "DELETE", f"/vm_recovery_points/{uuid}", kind="deleted", status=202
            )
        )
        await lab.refused(
            lab.pc, "GET", f"/vm_recovery_points/{uuid}", None, 404, "ENTITY_NOT_FOUND"
        )


async def test_an_account_of_prism_central_alone_is_none_on_an_element(tmp_path: Path) -> None:
    async with running(tmp_path) as lab:
        async with Client(lab.simulator, "central-only") as central:
            assert (await central.ask("GET", f"{V3}/users/me")).status == 200
        async with Client(lab.simulator, "central-only", lab.cluster.address) as element:
            answer = await element.ask("POST", f"{V3}/vm_snapshots/list", {})
            assert answer.status == 401
            assert b"<html" in answer.body.lower()
