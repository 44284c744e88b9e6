# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the configuration to the VMs that this host pushes, each with its source.

What can be checked is checked when a ``Sources`` is made, and nothing is touched until it is opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

import trio

from replicator.config import Config, parse_image_disks
from replicator.errors import SourceError, UsageError
from replicator.log import EventLog
from replicator.push.files import GRAIN
from replicator.sources.base import Source
from replicator.sources.image import ImageSource
from replicator.sources.qemu import QemuSource
from replicator.wire.messages import is_vm_name

_GLOB = frozenset("*?[],")


@dataclass(frozen=True, slots=True)
class ChosenVm:
    """A VM to push. ``uuid`` None: the only one of this host, and its source says who it is.

    ``label`` is what to call it; ``config`` the host's, with a working directory of this VM alone.
    """

    label: str
    name: str
    uuid: UUID | None
    source: Source
    config: Config


class OpenSources(Protocol):
    """The VMs of this host, for as long as they are open."""

    async def select(self) -> Sequence[ChosenVm]:
        """The VMs to push now, by name; the same source for a VM each time. Raises UsageError where nothing is chosen or a
        choice is not clear, SourceError.
        """
        ...


class Sources(Protocol):
    """Where this host's VMs are; see ``find_sources``."""

    @property
    def one(self) -> bool:
        """Whether the configuration names one VM: then answers are about it, and not lists."""
        ...

    @property
    def api_errors(self) -> Callable[[], dict[str, int]] | None:
        """Answers of Prism that were errors, by endpoint, since the process began; None where there is no Prism."""
        ...

    @property
    def attach_failures(self) -> Callable[[], int] | None:
        """Disks that could not be attached over iSCSI since the process began; None where nothing is."""
        ...

    def open(
        self, log: EventLog, retry_s: float | None = None
    ) -> AbstractAsyncContextManager[OpenSources]:
        """Connect. With ``retry_s``: again and again, so many seconds apart, where that may help. Raises SourceError."""
        ...


def find_sources(config: Config) -> Sources:
    """Where this host's VMs are. Raises UsageError that names the key; touches nothing."""
    if config.source == "nutanix":
        # Loaded only where it is used: a start should not wait for it.
        from replicator.cli.prism_vms import PrismSources  # noqa: PLC0415

        return PrismSources(config)
    return OneSource(config, make_source(config))


def open_sources(config: Config, log: EventLog) -> AbstractAsyncContextManager[OpenSources]:
    """``find_sources`` and its ``open`` in one."""
    return find_sources(config).open(log)


class OneSource:
    """A host with one VM: its source is known, and who it is, is for the source to say."""

    one = True
    api_errors = None
    attach_failures = None

    def __init__(self, config: Config, source: Source) -> None:
        self.source = source
        self._chosen = ChosenVm(config.vm, config.vm, None, source, config)

    @asynccontextmanager
    async def open(self, log: EventLog, retry_s: float | None = None) -> AsyncIterator[OpenSources]:
        """There is nothing to connect to before a push."""
        del log, retry_s
        await trio.lowlevel.checkpoint()
        yield self

    async def select(self) -> Sequence[ChosenVm]:
        """The VM."""
        await trio.lowlevel.checkpoint()
        return [self._chosen]


def make_source(config: Config, family: str = "") -> Source:
    """The source of the one VM of a host whose ``source`` is image or qemu. Raises UsageError that names the key.

    ``family``: whose snapshots they are, where others than `replctl run` read the same QEMU.
    """
    if config.source == "image":
        name = vm_name(config)
        if name is None:
            raise UsageError("vm: name the VM whose disks the images are; * does not say which")
        disks = parse_image_disks(config.image_disks)
        for disk, path in disks.items():
            _check_image(disk, path)
        return ImageSource(name, disks, config.work_path, GRAIN)
    assert config.source == "qemu"
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
            family=family,
        )
    except SourceError as error:
        # A path that no socket can have: QEMU was not asked anything yet.
        raise UsageError(f"source=qemu: {error}") from error


def vm_name(config: Config) -> str | None:
    """The one name in ``vm``, None for ``*``. Raises UsageError for a list or a pattern: such a source pushes one VM."""
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


__all__ = [
    "ChosenVm",
    "OneSource",
    "OpenSources",
    "Sources",
    "find_sources",
    "make_source",
    "open_sources",
    "vm_name",
]
