# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where restored disks go: the interface between putting images together and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bacula_adapter.description import Description
from replicator.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """A disk whose image is whole: size, digests and root were checked. ``path``: a raw, sparse file. Bytes."""

    disk: str
    identity: str
    path: Path
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredVm:
    """A VM with the disks that were asked for. ``description`` is that of the newest part; None for images from elsewhere, of
    which ``hardware`` says what is known.
    """

    name: str
    disks: tuple[RestoredDisk, ...]
    description: Description | None = None
    hardware: Hardware | None = None

    @property
    def made_of(self) -> Hardware | None:
        """What the VM is made of, if anybody knows."""
        return self.description.hardware if self.description is not None else self.hardware


class Target(Protocol):
    """What is done with images. Opened for one restore; leaving its context without ``keep`` removes what it made."""

    def image_path(self, root: str, vm: str, disk: str) -> Path:
        """Where to put a disk's raw image together: on the file system that it stays on where it stays. Parents exist. Raises
        RefusedError where there is something that may not be replaced.
        """
        ...

    async def finish(self, vms: Sequence[RestoredVm]) -> None:
        """All images are whole: convert, upload, make VMs. Raises ReplicatorError; nothing of it counts before ``keep``."""
        ...

    async def keep(self) -> None:
        """Bacula says that the job ended well: what was made stays, under its final name."""
        ...


__all__ = ["RestoredDisk", "RestoredVm", "Target"]
