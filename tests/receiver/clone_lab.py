# SPDX-License-Identifier: AGPL-3.0-or-later
"""What tests of clones share."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from receiver.failover.clone import CloneManager
from replicator.domain.failover import State
from replicator.nbd.client import open_nbd
from tests.receiver.store_lab import StoreFixture

#: Boot loaders and kernels under emulation, on a machine that does other work as well. Seconds.
BOOT_S = 120


def no_steps(text: str) -> None:
    """For tests that do not look at the steps."""
    assert text


@asynccontextmanager
async def clone_manager(
    fixture: StoreFixture, *, console_wait_s: float = BOOT_S
) -> AsyncIterator[CloneManager]:
    """A manager as a receiver has it after its start."""
    manager = CloneManager(
        fixture.config, fixture.log, fixture.stores, fixture.nursery, console_wait_s=console_wait_s
    )
    await manager.recover()
    yield manager


async def disk_sha256(socket: str | Path, name: str) -> str:
    """SHA-256 of a whole NBD export."""
    digest = hashlib.sha256()
    async with open_nbd(Path(socket), name) as client:
        for at in range(0, client.size, 1 << 20):
            digest.update(await client.read(at, min(1 << 20, client.size - at)))
    return digest.hexdigest()


async def check_clone_content(fixture: StoreFixture, result: dict[str, Any]) -> None:
    """Every export of a clone is the point that it was made of."""
    for disk in result["disks"]:
        expected = fixture.expected[result["point"]][disk["disk"]]
        assert await disk_sha256(disk["nbd"], disk["disk"]) == expected.sha256()


def contents(path: str | Path) -> bytes:
    """What is in a file now; it is there."""
    return Path(path).read_bytes()


async def leftovers(fixture: StoreFixture) -> list[str]:
    """Everything that a clone leaves while it is there: files, sockets, its journal entry, its state."""
    found: list[str] = []
    for folder in (fixture.store.paths.clones, fixture.state_dir / "run"):
        if folder.is_dir():
            found += [str(path.relative_to(fixture.state_dir)) for path in sorted(folder.iterdir())]
    if await fixture.log.journal_get(f"clone/{fixture.store.uuid}") is not None:
        found.append("journal entry")
    if fixture.store.vm.test is not None or fixture.store.vm.state is State.TESTING:
        found.append("state")
    return found


def children(pid: int | str = "self") -> set[int]:
    """Ids of a process' children."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found.update(int(word) for word in (task / "children").read_text().split())
    return found


def only_programs(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> Path:
    """Make these the only programs there are; returns the folder that PATH names, for more of them."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None, f"{name} is missing: run scripts/setup"
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(path: Path, lines: Sequence[str]) -> None:
    """Put a shell script in place of a program."""
    path.unlink(missing_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o700)
