# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images from elsewhere on their way to Nutanix: whether a VM is one, and taking foreign files apart safely.

A file that somebody gives is not trusted: its header may name other files of this host, or ask for more than there is. So it is
looked at by qemu-img under limits, what it says is checked, and only then it is read, with the format stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from bacula_adapter.description import Description
from bacula_adapter.restore import convert
from replicator.config import Config
from replicator.errors import RefusedError, UsageError

_NUTANIX: Final = "nutanix"
_SIZE_MAX: Final = 1 << 50
#: Drivers of qemu-img by what files are called. Everything else is no image.
DRIVERS: Final = {
    ".raw": "raw",
    ".img": "raw",
    ".qcow2": "qcow2",
    ".vmdk": "vmdk",
    ".vhd": "vpc",
    ".vpc": "vpc",
    ".vhdx": "vhdx",
}
#: Variants of vmdk whose data stand in the file itself. The others are a text that names files.
_VMDK_ALONE: Final = frozenset({"monolithicSparse", "streamOptimized"})
_IMAGES_MAX: Final = 256


def is_foreign(part: Description) -> bool:
    """Whether a VM comes from another platform than Nutanix, or nobody knows from which."""
    if part.hardware is not None and part.hardware.platform:
        return part.hardware.platform != _NUTANIX
    return part.root_name != "@nutanix"


def check_cross(part: Description, config: Config) -> None:
    """Raise RefusedError if the VM comes from elsewhere and that is not wanted."""
    if is_foreign(part) and not config.cross_restore:
        platform = part.hardware.platform if part.hardware else ""
        raise RefusedError(
            f"cross_restore: VM {part.vm} comes from {platform or part.root_name.lstrip('@')} and not from Nutanix; set"
            " cross_restore = yes, or restore it to files with where=/path"
        )


@dataclass(frozen=True, slots=True)
class ForeignImage:
    """A file whose header was checked. ``size``: bytes of the disk in it."""

    path: Path
    driver: str
    size: int


def find_images(places: Iterable[Path]) -> list[Path]:
    """The images in these files and folders, in the order of their names. Raises UsageError. Blocks."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(
                each
                for each in place.iterdir()
                if each.suffix.lower() in DRIVERS and not each.name.startswith(".")
            )
            if not inside:
                raise UsageError(f"{place}: no image in it ({', '.join(sorted(DRIVERS))})")
            found += inside
        else:
            found.append(place)
    for path in found:
        if path.suffix.lower() not in DRIVERS:
            raise UsageError(f"{path}: no image by its name ({', '.join(sorted(DRIVERS))})")
        if path.is_symlink() or not path.is_file():
            raise UsageError(f"{path}: no file")
    if len(found) > _IMAGES_MAX or len(set(found)) != len(found):
        raise UsageError(f"more than {_IMAGES_MAX} images, or one of them twice")
    return found


async def probe(path: Path) -> ForeignImage:
    """Look at an image's header. Raises RefusedError if it needs other files, or is none of that format."""
    driver = DRIVERS[path.suffix.lower()]
    if driver == "raw":
        size = (await trio.to_thread.run_sync(path.stat)).st_size
        return ForeignImage(path, driver, _checked_size(path, size))
    status, text, why = await convert.guarded(
        ["info", "-U", "-f", driver, "--output=json", str(path)]
    )
    if status:
        raise RefusedError(f"{path}: qemu-img cannot read it as {driver}: {why}")
    try:
        info = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise RefusedError(f"{path}: qemu-img says nothing of it") from None
    return ForeignImage(path, driver, _checked_info(path, driver, info))


def _checked_info(path: Path, driver: str, info: dict[str, Any]) -> int:
    """The size of the disk. Raises RefusedError."""
    if info.get("format") != driver:
        raise RefusedError(f"{path}: it is no {driver} image")
    details = info.get("format-specific")
    data = details.get("data") if isinstance(details, dict) else None
    data = data if isinstance(data, dict) else {}
    if any(key in info for key in ("backing-filename", "full-backing-filename")):
        raise RefusedError(
            f"{path}: it is only a layer over another file; make it whole first (qemu-img convert), where you trust both"
        )
    if data.get("data-file") or (driver == "vmdk" and data.get("create-type") not in _VMDK_ALONE):
        raise RefusedError(f"{path}: its data stand in other files; make it one file first")
    if info.get("encrypted"):
        raise RefusedError(f"{path}: it is encrypted; decrypt it first")
    return _checked_size(path, info.get("virtual-size"))


def _checked_size(path: Path, size: object) -> int:
    if not isinstance(size, int) or not 1 <= size <= _SIZE_MAX:
        raise RefusedError(f"{path}: a disk of {size} bytes")
    return size


__all__ = ["DRIVERS", "ForeignImage", "check_cross", "find_images", "is_foreign", "probe"]
