# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images become VMs on a cluster, byte for byte, and nothing else stays there; over HTTPS, by v3 and by v4."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from bacula_adapter.restore.platform import open_platform_target, restore_to_platform
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from bacula_adapter.state import open_job_state
from replicator.errors import RefusedError, UsageError
from replicator.prism.errors import PrismError, PrismRefusedError
from replicator.prism.settings import Account
from tests.bacula_platform.lab import (
    JOB,
    MIB,
    configuration,
    contents,
    disks_of,
    image,
    platform_lab,
)
from tests.sources.simulated import Api, prism_of

APIS = pytest.mark.parametrize("api", ["v3", "v4"])


@APIS
async def test_a_vm_comes_back_as_it_was(
    api: Api, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with platform_lab(tmp_path, api) as lab:
        async with lab.target() as target:
            vm = await lab.restored(target)
            expected = [disk.path.read_bytes() for disk in vm.disks]
            await target.finish([vm])
            (made,) = [each for each in lab.simulator.world.vms.values() if each.name[:4] == "drx-"]
            assert made.power == "OFF"
            await target.keep()
        original, restored = lab.original, lab.simulator.vm("app01-restored")
        assert restored.uuid == made.uuid
        assert contents(lab.simulator, restored) == {
            ("SATA", 2): expected[0],
            ("SCSI", 0): expected[1],
        }
        assert [disk.container for disk in disks_of(restored)] == [
            disk.container for disk in reversed(disks_of(original))
        ]
        assert (restored.cluster, restored.power) == (original.cluster, "OFF")
        assert (restored.sockets, restored.cores, restored.memory) == (2, 3, original.memory)
        assert (restored.machine, restored.boot["type"]) == ("Q35", "UEFI")
        assert sum(disk.cdrom for disk in restored.disks) == 1
        ((old,), (new,)) = original.nics, restored.nics
        assert new.subnet == old.subnet
        assert new.mac
        assert new.mac != old.mac, "the original is there: the MAC would be used twice"
        assert JOB.name in restored.description
        assert not lab.objects()
        assert not lab.simulator.world.images
        assert not [key for key in lab.store.items if key.startswith("prism/")]
    total = sum(map(len, expected))
    assert (
        f"Restored VM app01 as app01-restored on cluster cluster-a, 2 disks, {total} bytes, powered off"
        in caplog.text
    )
    assert "its NICs get new MAC addresses: there is a VM that has the old ones" in caplog.text


@APIS
async def test_options_of_the_operator(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        world = lab.simulator.world
        other = next(each for each in world.clusters.values() if each.name == "cluster-b")
        vm = await lab.restore(
            target_cluster="cluster-b",
            target_container="archive",
            network_map="vlan10=isolated",
            restore_vm_name="app02",
            vcpu="4",
            memory_mib="2048",
            power_on="yes",
        )
        made = lab.simulator.vm("app02")
        assert (made.cluster, made.power) == (other.uuid, "ON")
        assert (made.sockets, made.cores, made.memory) == (4, 1, 2048 * MIB)
        (nic,) = made.nics
        subnet = world.subnets[nic.subnet]
        assert (subnet.name, subnet.cluster) == ("isolated", other.uuid)
        containers = {world.containers[disk.container].name for disk in disks_of(made)}
        assert containers == {"archive"}
        assert {world.containers[disk.container].cluster for disk in disks_of(made)} == {other.uuid}
        sizes = [len(each) for each in lab.images("app02").values()]
        assert sizes == [disk.size for disk in vm.disks]
        assert not lab.objects()


@APIS
async def test_macs_are_kept_once_the_original_is_gone(
    api: Api, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with platform_lab(tmp_path, api) as lab:
        async with lab.target() as target:
            vm = await lab.restored(target)
            (mac,) = [nic.mac for nic in lab.original.nics]
            del lab.simulator.world.vms[lab.original.uuid]
            await target.finish([vm])
            await target.keep()
        (nic,) = lab.simulator.vm("app01-restored").nics
        assert nic.mac == mac
    assert "keep their MAC addresses" in caplog.text


@APIS
async def test_some_disks_only_and_no_description(api: Api, tmp_path: Path) -> None:
    """As images from elsewhere come: defaults for what nobody knows."""
    async with platform_lab(tmp_path, api, target_cluster="cluster-b") as lab:
        path = image(tmp_path / "foreign.raw", 2 * MIB, 5)
        disk = RestoredDisk(disk="disk-0", identity="", path=path, size=2 * MIB)
        async with lab.target() as target:
            vm = await lab.restored(target)
            part = RestoredVm(name=vm.name, disks=vm.disks[1:], description=vm.description)
            await target.finish([part, RestoredVm(name="from-vmware", disks=(disk,))])
            expected = vm.disks[1].path.read_bytes()
            await target.keep()
        assert lab.images("app01-restored") == {("SCSI", 0): expected}
        assert lab.images("from-vmware-restored") == {("SCSI", 0): path.read_bytes()}
        made = lab.simulator.vm("from-vmware-restored")
        assert (made.sockets, made.memory, made.nics) == (1, 1024 * MIB, [])
        assert path.exists(), "what is not in the scratch is not ours to remove"


async def test_the_plain_function(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v3") as lab:
        config = configuration(lab, target_cluster="cluster-a")
        path = image(tmp_path / "foreign.raw", MIB, 5)
        disk = RestoredDisk(disk="disk-0", identity="", path=path, size=MIB)
        vm = RestoredVm(name="box", disks=(disk,))
        await restore_to_platform(config, JOB, lab.store, [vm])
        assert lab.images("box-restored") == {("SCSI", 0): path.read_bytes()}
        assert not lab.objects()


@APIS
async def test_not_kept_is_removed(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        await lab.restore(keep=False)
        assert [vm.name for vm in lab.simulator.world.vms.values()] == ["app01"]
        assert not lab.objects()
        assert not [key for key in lab.store.items if key.startswith("prism/")]
        assert not list((tmp_path / "state").rglob("*.raw"))


REFUSED = {
    "target_cluster": ("no-such", r"target_cluster: cluster no-such: there is none; .*cluster-a .*cluster-b"),
    "target_container": ("no-such", r"target_container: storage container on cluster cluster-a no-such: there is none; .*archive"),
    "network_map": ("vlan10=no-such", r"network_map: subnet on cluster cluster-a no-such: there is none; .*isolated .*vlan10"),
    "restore_vm_name": ("app01", "there is a VM app01 already"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
@APIS
async def test_what_is_not_there_is_refused_before_anything_is_uploaded(
    api: Api, key: str, tmp_path: Path
) -> None:
    value, message = REFUSED[key]
    async with platform_lab(tmp_path, api) as lab:
        with pytest.raises(RefusedError, match=message):
            await lab.restore(keep=True, **{key: value})
        asked = {(each.method, each.path.rpartition("/")[2]) for each in lab.simulator.server.log}
        assert asked.isdisjoint({("POST", "images"), ("POST", "vms"), ("PUT", "file")})


@APIS
async def test_a_network_that_is_not_at_the_target(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        async with lab.target() as target:
            hardware = await lab.hardware()
            (nic,) = hardware.nics
            gone = type(nic)(subnet="55555555-5555-4555-8555-555555555555", subnet_name="old-lan")
            vm = await lab.restored(target, nics=(nic, gone))
            assert vm.description is not None
            message = r"NIC 1 is in subnet old-lan, which is not on cluster cluster-a.*network_map = old-lan=.*isolated .*vlan10"
            with pytest.raises(RefusedError, match=message):
                await target.check([vm.description])
            with pytest.raises(RefusedError, match=message):
                await target.finish([vm])
        await lab.restore(network_map="old-lan=isolated")
        assert not lab.objects()


async def test_two_vms_and_names(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v4") as lab:
        async with lab.target(restore_vm_name="one") as target:
            vm = await lab.restored(target)
            with pytest.raises(RefusedError, match="restore_vm_name: one name, and 2 VMs"):
                await target.finish([vm, vm])
        async with lab.target() as target:
            with pytest.raises(RefusedError, match="two VMs would be restored as app01-restored"):
                await target.finish([vm, vm])
            with pytest.raises(RefusedError, match="none of its disks"):
                await target.finish([RestoredVm(name="empty", disks=())])
        with pytest.raises(UsageError, match="network_map: 'vlan10': expected source=target"):
            await lab.restore(network_map="vlan10")


@APIS
async def test_an_upload_that_breaks_half_way_begins_again(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        fault = lab.simulator.faults.add("upload-cut", count=2, value=MIB)
        vm = await lab.restore()
        assert fault.struck == 2
        assert [len(each) for each in lab.images("app01-restored").values()] == [
            disk.size for disk in vm.disks
        ]
        assert not lab.objects()
        lab.simulator.faults.add("upload-cut", count=None, value=MIB)
        with pytest.raises(PrismError, match="the connection broke during PUT"):
            await lab.restore(restore_vm_name="again")
        assert not lab.objects()
        assert not [key for key in lab.store.items if key.startswith("prism/")]


@pytest.mark.parametrize("kind", ["task-failed", "half-created"])
@pytest.mark.parametrize("where", ["CreateImage", "CreateVm"])
@APIS
async def test_a_task_that_fails(api: Api, kind: str, where: str, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        lab.simulator.faults.add(kind, f"^{where}$")  # type: ignore[arg-type]  # one of them
        with pytest.raises(PrismError, match="create a"):
            await lab.restore()
        async with lab.target():
            pass  # what the first one could not find
        assert not lab.objects()
        assert [vm.name for vm in lab.simulator.world.vms.values()] == ["app01"]


@APIS
async def test_what_cannot_be_removed_now_is_removed_by_the_next(
    api: Api, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with platform_lab(tmp_path, api) as lab:
        lab.simulator.faults.add("task-failed", "^DeleteVm$")
        await lab.restore(keep=False)
        assert "stays on the cluster" in caplog.text
        assert len(lab.objects()) == 1
        async with lab.target():
            assert not lab.objects()


@APIS
async def test_a_kept_vm_that_does_not_run_stays(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        lab.simulator.faults.add("task-failed", "^VmPowerOn$")
        with pytest.raises(
            PrismError, match=r"VM app01-restored is restored and stays .*power a VM on"
        ):
            await lab.restore(power_on="yes")
        assert lab.simulator.vm("app01-restored").power == "OFF"
        async with lab.target():
            pass
        lab.simulator.vm("app01-restored")
        assert not [key for key in lab.store.items if key.startswith("prism/")]


@APIS
async def test_a_kept_vm_that_did_not_get_its_name_gets_it(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        lab.simulator.faults.add("task-failed", "^UpdateVm$", count=2)
        with pytest.raises(PrismError, match="it may still be called drx-"):
            await lab.restore()
        assert len(lab.objects()) == 1
        async with lab.target():
            lab.simulator.vm("app01-restored")
        assert not lab.objects()


@APIS
async def test_cancelled_during_an_upload(api: Api, tmp_path: Path) -> None:
    async with platform_lab(tmp_path, api) as lab:
        lab.simulator.faults.add("latency", "PUT .*/file", count=None, value=3600)
        with trio.CancelScope() as scope:
            async with lab.target() as target:
                vm = await lab.restored(target)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(target.finish, [vm])
                    while len(lab.simulator.world.images) < 2:
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        assert scope.cancelled_caught
        assert not lab.objects()


async def test_a_prism_that_has_v4_alone(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v4") as lab:
        lab.simulator.core.knobs["v3"] = False
        with pytest.raises(PrismRefusedError, match=r"does not serve v3.*where=/path"):
            async with lab.target():
                raise AssertionError


async def test_an_element_is_refused(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v3") as lab:
        address = lab.simulator.world.clusters[lab.original.cluster].address
        settings = dataclasses.replace(prism_of(lab.simulator, "v3"), host=address)
        with pytest.raises(PrismRefusedError, match="set prism_central"):
            async with open_platform_target(lab.config(), JOB, lab.store, settings=settings):
                raise AssertionError


async def test_no_room_in_the_scratch(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v4") as lab, lab.target() as target:
        target.check_room(MIB)
        with pytest.raises(
            RefusedError, match=r"working_dir: .* give a working_dir with more room"
        ):
            target.check_room(1 << 60)


async def test_owned_lists_what_a_restore_has_on_the_cluster(tmp_path: Path) -> None:
    async with platform_lab(tmp_path, "v4") as lab:
        config = configuration(lab, restore_vm_name="app02")
        command = [
            sys.executable,
            "-c",
            "import sys; from replicator.cli.main import main; sys.exit(main())",
            "--config",
            str(tmp_path / "host.conf"),
        ]

        async def owned(*words: str) -> list[dict[str, Any]]:
            done = await trio.run_process(
                [*command, "--json", "owned", *words], capture_stdout=True
            )
            found: list[dict[str, Any]] = msgspec.json.decode(done.stdout)
            return found

        async with (
            open_job_state(config, "restore", "1") as state,
            open_platform_target(state.config, JOB, state.log) as target,
        ):
            vm = await lab.restored(target)
            lab.simulator.faults.add("task-failed", "^DeleteImage$", count=2)
            await target.finish([vm])
            rows = await owned()
            assert sorted((row["kind"], row["why"]) for row in rows) == [
                ("VM", "made by a restore"),
                ("image", "of a Bacula job that is under way, or removed by its next one"),
                ("image", "of a Bacula job that is under way, or removed by its next one"),
            ]
            assert sorted(row["name"] for row in rows) == sorted(lab.objects())
            assert {row["cluster"] for row in rows} == {lab.original.cluster}
            assert [row["name"] for row in await owned("--all")] == [row["name"] for row in rows]
            await target.keep()
        assert await owned() == []
        lab.simulator.vm("app02")


async def test_an_account_that_no_element_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By v3 the disks of the new VM cannot be looked at then: that is said, and fails nothing."""
    async with platform_lab(tmp_path, "v3") as lab:
        account = Account("central-only", lab.simulator.password("central-only"))
        settings = dataclasses.replace(prism_of(lab.simulator, "v3"), account=account)
        async with open_platform_target(lab.config(), JOB, lab.store, settings=settings) as target:
            vm = await lab.restored(target)
            await target.finish([vm])
            await target.keep()
        assert "its disks could not be looked at" in caplog.text
        assert len(lab.images("app01-restored")) == 2
        assert not lab.objects()
