# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the configuration to the source that it names. Checks what can be checked, touches nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from replicator.config import Config, parse_image_disks
from replicator.errors import SourceError, UsageError
from replicator.push.files import GRAIN
from replicator.sources.base import Source
from replicator.sources.image import ImageSource
from replicator.sources.qemu import QemuSource
from replicator.wire.messages import is_vm_name

_GLOB = frozenset("*?[],")


def make_source(config: Config) -> Source:
    """The source of the one VM that this host pushes. Raises UsageError that names the key."""
    if config.source == "image":
        name = vm_name(config)
        if name is None:
            raise UsageError("vm: name the VM whose disks the images are; * does not say which")
        disks = parse_image_disks(config.image_disks)
        for disk, path in disks.items():
            _check_image(disk, path)
        return ImageSource(name, disks, config.work_path, GRAIN)
    if config.source == "qemu":
        if config.qemu_socket is None:
            raise UsageError("qemu_socket: missing; it names the QMP socket of the running QEMU")
        name = vm_name(config)
        try:
            return QemuSource(
                config.qemu_socket,
                config.work_path,
                name=name,
                nbd_socket=config.qemu_nbd_socket,
                grain=GRAIN,
            )
        except SourceError as error:
            # A path that no socket can have: QEMU was not asked anything yet.
            raise UsageError(f"source=qemu: {error}") from error
    raise UsageError("source=nutanix: this version has no Nutanix source yet; use qemu or image")


def vm_name(config: Config) -> str | None:
    """The one name in ``vm``, None for ``*``. Raises UsageError for a list or a pattern: a source pushes one VM."""
    name = config.vm.strip()
    if name == "*":
        return None
    if not name.isprintable() or not is_vm_name(name) or _GLOB & set(name):
        raise UsageError(f"vm: a source pushes one VM, {config.vm!r} is not one plain name")
    return name


def _check_image(disk: str, path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"image_disks: {disk}: {path}: {error.strerror}") from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise UsageError(f"image_disks: {disk}: {path} is neither a file nor a block device")
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        raise UsageError(f"image_disks: {disk}: {path} is empty")
    if not os.access(path, os.R_OK):
        raise UsageError(f"image_disks: {disk}: {path} is not readable for this user")


__all__ = ["make_source", "vm_name"]
