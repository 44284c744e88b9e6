# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images from elsewhere: what is read of a file that nobody vouches for, and VMs made of them on a simulated cluster."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest
import trio

from bacula_adapter.restore import open_restore
from bacula_adapter.restore.command import Wanted, make_vm
from bacula_adapter.restore.cross import find_images, probe
from replicator.cli.main import main
from replicator.errors import RefusedError, UsageError
from replicator.hardware import Firmware
from tests.bacula_platform.lab import configuration, contents, platform_lab
from tests.bacula_restore.lab import Bacula, Machine, chain, config_in, noise, restore_job
from tests.sources.simulated import Api

MIB = 1 << 20


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def raw_image(path: Path, size: int = 3 * MIB) -> bytes:
    image = bytearray(size)
    image[5000:105_000] = noise(size, 100_000)
    image[-700:] = noise(1, 700)
    path.write_bytes(image)
    return bytes(image)


def made(folder: Path, name: str, driver: str, *options: str) -> Path:
    raw = folder / "source"
    raw_image(raw)
    path = folder / name
    qemu_img("convert", "-f", "raw", "-O", driver, *options, raw, path)
    raw.unlink()
    return path


@pytest.mark.parametrize(
    ("name", "driver", "options"),
    [
        ("a.qcow2", "qcow2", ()),
        ("a.QCOW2", "qcow2", ("-c",)),
        ("a.vmdk", "vmdk", ("-o", "subformat=monolithicSparse")),
        ("a.vmdk", "vmdk", ("-o", "subformat=streamOptimized")),
        ("a.vhd", "vpc", ("-o", "force_size=on")),
        ("a.vhdx", "vhdx", ()),
        ("a.img", "raw", ()),
    ],
)
async def test_whole_images_are_taken(
    tmp_path: Path, name: str, driver: str, options: tuple[str, ...]
) -> None:
    path = made(tmp_path, name, driver, *options)
    found = await probe(path)
    assert (found.driver, found.size) == (driver, 3 * MIB)


async def test_a_layer_over_another_file_is_refused(tmp_path: Path) -> None:
    """Its header names a file of this host: whoever made it would get that file's bytes into a VM."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * MIB)
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", secret, path)
    with pytest.raises(RefusedError, match="only a layer over another file"):
        await probe(path)


async def test_data_in_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, "1M")
    with pytest.raises(RefusedError, match="its data stand in other files"):
        await probe(path)


@pytest.mark.parametrize("form", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_a_vmdk_that_names_files_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={form}", path, "1M")
    with pytest.raises(RefusedError, match="its data stand in other files"):
        await probe(path)


async def test_a_vmdk_descriptor_that_names_a_file_of_this_host_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * MIB)
    path = tmp_path / "a.vmdk"
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicSparse"\nRW 2048 FLAT "{secret}" 0\n'
    )
    with pytest.raises(RefusedError, match=r"a\.vmdk: "):
        await probe(path)


async def test_an_encrypted_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:  # the way of encryption in a qcow2 header: AES
        file.seek(32)
        file.write(struct.pack(">I", 1))
    with pytest.raises(RefusedError, match="it is encrypted; decrypt it first"):
        await probe(path)


@pytest.mark.parametrize("name", ["a.qcow2", "a.vmdk", "a.vhdx"])
async def test_what_is_no_image_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(noise(3, 100_000))
    with pytest.raises(RefusedError, match="qemu-img cannot read it as"):
        await probe(path)


async def test_a_disk_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:  # the size in a qcow2 header
        file.seek(24)
        file.write(struct.pack(">Q", 1 << 53))
    with pytest.raises(RefusedError, match=r"a disk of [0-9]+ bytes|cannot read it"):
        await probe(path)


async def test_a_header_that_asks_for_memory_is_held_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:  # clusters of an L1 table: 32 bits of entries
        file.seek(36)
        file.write(struct.pack(">I", 0x01FF_FFFF))
    with pytest.raises(RefusedError, match="cannot read it"):
        await probe(path)


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.qcow2", "a.vmdk", "notes.txt", ".hidden.raw"):
        (folder / name).touch()
    other = tmp_path / "z.RAW"
    other.touch()
    found = find_images([other, folder])
    assert [path.name for path in found] == ["z.RAW", "a.vmdk", "b.qcow2"]
    with pytest.raises(UsageError, match="twice"):
        find_images([folder, folder / "a.vmdk"])
    with pytest.raises(UsageError, match="no image by its name"):
        find_images([folder / "notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in it"):
        find_images([tmp_path / "empty"])
    (tmp_path / "l.raw").symlink_to(other)
    with pytest.raises(UsageError, match="no file"):
        find_images([tmp_path / "l.raw"])


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_foreign_images_become_a_vm(api: Api, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "state").mkdir()
    first = raw_image(images / "a.raw", 5 * MIB)
    second = raw_image(tmp_path / "b", 2 * MIB)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", tmp_path / "b", images / "b.vmdk")
    async with platform_lab(tmp_path, api) as lab:
        config = configuration(lab, target_cluster="cluster-a", restore_vm_name="imported")
        vm = await make_vm(config, Wanted("imported", Firmware.UEFI, (images,)))
        restored = lab.simulator.vm("imported")
        assert restored.boot["type"] == "UEFI"
        assert sorted(contents(lab.simulator, restored).values()) == sorted([first, second])
        assert not lab.objects()
    assert [disk.size for disk in vm.disks] == [5 * MIB, 2 * MIB]
    assert (images / "a.raw").read_bytes() == first
    assert list((tmp_path / "state/work").rglob("*.raw")) == []


async def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    path = made(tmp_path, "a.qcow2", "qcow2")
    async with platform_lab(tmp_path, "v4") as lab:
        configuration(lab)
        arguments = ["--config", str(tmp_path / "host.conf"), "--json", "restore-images"]
        arguments += ["--vm", "new", "--option", "target_cluster=cluster-b", str(path)]
        # A thread: the command has an event loop of its own, and the simulator is in this one.
        assert await trio.to_thread.run_sync(main, arguments) == 0
        assert lab.simulator.vm("new").power == "OFF"
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"vm": "new", "disks": [{"disk": "disk-0", "size": 3 * MIB}]}


@pytest.mark.parametrize(
    ("more", "why", "code"),
    [
        (["--vm", "a/b"], "no name of a VM", 2),
        (["--vm", "x", "--option", "state_dir=/tmp"], "--option state_dir=/tmp: expected", 2),
        (["--vm", "x", "--option", "vcpu=0"], "vcpu: expected a whole number", 2),
        (["--vm", "x", "--option", "cross_restore=no"], "cross_restore: no", 3),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], why: str, code: int
) -> None:
    conf = tmp_path / "host.conf"
    conf.write_text(f"state_dir = {tmp_path}/state\n")
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(512))
    assert main(["--config", str(conf), "restore-images", *more, str(image)]) == code
    assert why in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


# Chains of our own, to the platform


async def restored(lab_folder: Path, machine: Machine, config: object, **more: object) -> None:
    bacula = Bacula("")
    async with open_restore(restore_job("/"), config) as handler:  # type: ignore[arg-type]
        await bacula.give(handler, machine.parts, **more)  # type: ignore[arg-type]
        await handler.finish()
        await handler.conclude("T")
    assert not (lab_folder / "out").exists()


@pytest.mark.parametrize("root", ["@nutanix", "@image"])
async def test_a_chain_goes_back_to_the_platform(tmp_path: Path, root: str) -> None:
    (tmp_path / "state").mkdir()
    machine = chain(root=root)
    part = machine.parts[-1]
    async with platform_lab(tmp_path, "v4") as lab:
        config = configuration(lab, target_cluster="cluster-a")
        await restored(tmp_path, machine, config)
        found = contents(lab.simulator, lab.simulator.vm("web-restored"))
        assert not lab.objects()
    sizes = {len(image): image for image in found.values()}
    for image in part.images.values():
        whole = next(each for size, each in sizes.items() if size >= len(image) > size - MIB)
        assert whole[: len(image)] == image
        assert not any(whole[len(image) :])


@pytest.mark.parametrize("objects", [True, False], ids=["catalogue", "bootstrap"])
@pytest.mark.parametrize("root", ["@qemu", "@replica"])
async def test_without_cross_restore_only_nutanix_goes_to_nutanix(
    tmp_path: Path, root: str, objects: bool
) -> None:
    (tmp_path / "state").mkdir()
    async with platform_lab(tmp_path, "v4") as lab:
        config = configuration(lab, target_cluster="cluster-a", cross_restore="no")
        with pytest.raises(RefusedError, match="cross_restore: VM web comes from"):
            await restored(tmp_path, chain(root=root), config, objects=objects)
        assert not lab.objects()


async def test_damage_leaves_nothing_on_the_platform(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    machine = chain()
    next(iter(machine.parts[2].files.values())).flip(400)
    async with platform_lab(tmp_path, "v4") as lab:
        before = set(lab.simulator.world.vms)
        config = configuration(lab, target_cluster="cluster-a")
        with pytest.raises(Exception, match="is damaged"):
            await restored(tmp_path, machine, config)
        assert set(lab.simulator.world.vms) == before
        assert not lab.objects()


async def test_the_platform_is_missing_from_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prism_central"):
        await restored(tmp_path, chain(), config_in(tmp_path))


async def test_a_format_is_for_files(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="target_format: belongs to a restore with where"):
        await restored(tmp_path, chain(), config_in(tmp_path, target_format="vhdx"))


async def test_only_a_description_was_selected(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no disk of any VM was selected"):
        await restored(tmp_path, chain(), config_in(tmp_path), without=["disks/"])
