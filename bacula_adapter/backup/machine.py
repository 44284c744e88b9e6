# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a backup needs of a VM, wherever its disks come from."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Protocol
from uuid import UUID

import trio

from replicator.config import Config
from replicator.hardware import Hardware
from replicator.log import EventLog
from replicator.sources.base import Source

#: Opens the source of a VM. ``own``: the configuration of the chain, ``log`` its log, which keeps what is made on a platform.
OpenSource = Callable[[Config, EventLog], AbstractAsyncContextManager[Source]]


class Loss(Enum):
    """What is done where it is not known what changed since the reference."""

    #: The disk is sent in full: to read all of it costs as much.
    FULL = auto()
    #: All is read, and what differs from the last backup's digests is sent.
    COMPARE = auto()
    #: The same, always: there is no tracking to lose.
    ALWAYS = auto()


async def _no_hardware() -> Hardware | None:
    await trio.lowlevel.checkpoint()
    return None


def _push_id(own: Config) -> str:
    del own
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A VM that is chosen. ``root`` and ``folder``: what its files are called in Bacula's catalogue (bacula_adapter.names).

    ``push_id`` names a new snapshot. ``point``: the recovery point that is read, 0 for a source. ``disks``: identity and size in
    bytes of each, without a snapshot. ``alone``: a file to be locked from the snapshot to the verdict, where the platform has one
    snapshot of the VM at a time.
    """

    root: str
    folder: str
    name: str
    uuid: UUID
    open_source: OpenSource
    disks: Callable[[], Awaitable[Sequence[tuple[str, int]]]]
    loss: Loss = Loss.FULL
    point: int = 0
    hardware: Callable[[], Awaitable[Hardware | None]] = _no_hardware
    push_id: Callable[[Config], str] = _push_id
    alone: Path | None = None


class Machines(Protocol):
    """The VMs that a job's configuration chooses, for as long as their platform is open."""

    async def select(self) -> Sequence[Machine]:
        """The VMs, by name. Raises UsageError where nothing is chosen or a choice is not clear, SourceError."""
        ...

    async def query(self, parameter: str) -> Sequence[tuple[str, str]]:
        """What there is of a kind other than VMs, as keys and values. Raises UsageError for a kind that is not known."""
        ...


@asynccontextmanager
async def given(source: Source) -> AsyncIterator[Source]:
    """A source that needs no opening."""
    await trio.lowlevel.checkpoint()
    yield source


__all__ = ["Loss", "Machine", "Machines", "OpenSource", "given"]
