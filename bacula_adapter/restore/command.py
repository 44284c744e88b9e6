# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl restore-images`: foreign disk images become a VM on Nutanix (cross_restore).

Found by the command line through the entry point group `replctl.commands`. Files of other plugins never come to ours: an image
that Bacula keeps is restored by Bacula to a folder first, and taken from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import click
import trio

from bacula_adapter.backend.interface import JobInfo, JobKind
from bacula_adapter.backend.params import with_options
from bacula_adapter.restore import convert
from bacula_adapter.restore.cross import ForeignImage, find_images, probe
from bacula_adapter.restore.leftovers import Leftovers
from bacula_adapter.restore.options import KEYS
from bacula_adapter.restore.slots import open_slot
from bacula_adapter.restore.target import RestoredDisk, RestoredVm, Target
from replicator.cli.context import CliContext
from replicator.config import Config
from replicator.errors import RefusedError, UsageError
from replicator.hardware import Firmware, Hardware

_logger = logging.getLogger(__name__)

_ROOT = "@image"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A VM to make: its name, how it boots, and what its disks are made from, in their order."""

    vm: str
    firmware: Firmware
    places: tuple[Path, ...]


@click.command("restore-images")
@click.option("--vm", required=True, help="Name of the VM that is made; there must be none yet.")
@click.option(
    "--firmware",
    type=click.Choice([each.value for each in Firmware]),
    default=Firmware.BIOS.value,
    show_default=True,
    help="How the VM boots: as it did where the images come from.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="As in the configuration: target_cluster, target_container, vcpu, memory_mib, power_on.",
)
@click.argument("places", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.pass_obj
def restore_images(
    context: CliContext, vm: str, firmware: str, options: Sequence[str], places: tuple[Path, ...]
) -> None:
    """Make a VM on Nutanix of disk images: qcow2, vmdk, vhd, vhdx, raw; files, or folders with nothing else in them.

    Each image is a disk, in the order given, in a folder in the order of names; the first one is booted.
    """
    config = _configured(context.config(), vm, options)
    if not vm.isprintable() or "/" in vm or vm in ("", ".", ".."):
        raise UsageError(f"--vm {vm!r}: no name of a VM")
    made = trio.run(make_vm, config, Wanted(vm, Firmware(firmware), places))
    if context.json:
        disks = [{"disk": disk.disk, "size": disk.size} for disk in made.disks]
        context.print_json({"vm": vm, "disks": disks})
    else:
        click.echo(f"{vm}: made of {len(made.disks)} disk(s)")


def _configured(config: Config, vm: str, options: Sequence[str]) -> Config:
    values = {"restore_vm_name": vm}
    for text in options:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in KEYS or key in values or key.startswith("restore_"):
            known = ", ".join(sorted(key for key in KEYS if not key.startswith("restore_")))
            raise UsageError(f"--option {text}: expected KEY=VALUE, once each, with KEY of {known}")
        values[key] = value.strip()
    found = with_options(config, values)
    if not found.cross_restore:
        raise RefusedError(
            "cross_restore: no in the configuration, and these images come from elsewhere"
        )
    return found


async def make_vm(config: Config, wanted: Wanted) -> RestoredVm:
    """Look at the images, bring them into raw form, and make the VM. Raises ReplicatorError; nothing stays then."""
    from bacula_adapter.restore.platform import (  # noqa: PLC0415 - loads the client of Prism
        open_platform_target,
    )

    paths = await trio.to_thread.run_sync(find_images, wanted.places)
    images = [await probe(path) for path in paths]
    now = time.time()
    job = JobInfo(
        name=f"restore-images.{time.strftime('%Y-%m-%d_%H.%M.%S', time.gmtime(now))}",
        job_id=int(now),
        kind=JobKind.RESTORE,
    )
    async with open_slot(config) as state:
        await Leftovers(state.log).sweep(state.config.work_path / "scratch")
        async with open_platform_target(state.config, job, state.log) as target:
            disks = [
                await _disk(target, wanted.vm, number, image) for number, image in enumerate(images)
            ]
            hardware = Hardware(
                platform="", uuid=str(uuid4()), name=wanted.vm, firmware=wanted.firmware
            )
            vm = RestoredVm(name=wanted.vm, disks=tuple(disks), hardware=hardware)
            await target.finish([vm])
            await target.keep()
    return vm


async def _disk(target: Target, vm: str, number: int, image: ForeignImage) -> RestoredDisk:
    """The disk in raw form: the file itself if it is raw."""
    disk = f"disk-{number}"
    _logger.info("%s: %s, %d bytes, %s", disk, image.path, image.size, image.driver)
    path = image.path
    if image.driver != "raw":
        path = await trio.to_thread.run_sync(target.image_path, _ROOT, vm, disk)
        await convert.to_raw(image.path, image.driver, path, title=disk, size=image.size)
    return RestoredDisk(disk=disk, identity=f"{vm}-{disk}", path=path, size=image.size)


__all__ = ["Wanted", "make_vm", "restore_images"]
