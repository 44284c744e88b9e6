# SPDX-License-Identifier: AGPL-3.0-or-later
"""The product's backend, with a gate in the middle of the data: a test finds it there, not somewhere near there.

A gate is a pair of FIFOs in the folder ``REPLCTL_GATES``: ``NAME.reached`` is written to when a file of the VM ``NAME`` has had
some of its data, and the backend goes on when ``NAME.go`` can be read. Waiting there can be cancelled, as everything can be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from bacula_adapter.backend.dispatch import Product, Work
from bacula_adapter.backend.interface import BackupHandler, FileEntry, RestoreHandler
from bacula_adapter.backend_command import main

GATES = Path(os.environ["REPLCTL_GATES"])


async def pass_gate(name: str) -> None:
    """Say that the gate is reached, and wait until it opens; nothing if there is none."""
    reached, go = GATES / f"{name}.reached", GATES / f"{name}.go"
    if not go.exists():
        return
    waiting = os.open(go, os.O_RDONLY | os.O_NONBLOCK)
    saying = os.open(reached, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(saying, f"{os.getpid()}\n".encode())
        await trio.lowlevel.wait_readable(waiting)
        go.unlink(missing_ok=True)
    finally:
        os.close(saying)
        os.close(waiting)


class Gated:
    """Everything of another object, but ``data`` waits at a VM's gate before its second piece of data."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._vm = ""
        self._pieces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def begin(self, entry: FileEntry) -> None:
        """A backup's file."""
        self._vm = _vm_of(entry.name)
        await self._inner.begin(entry)

    async def create(self, file: Any) -> Any:
        """A restore's file."""
        self._vm = _vm_of(file.name)
        return await self._inner.create(file)

    async def data(self, *arguments: Any) -> None:
        """Data of either."""
        self._pieces += 1
        if self._pieces == 2:
            await pass_gate(self._vm)
        await self._inner.data(*arguments)


class GatedBackup:
    """A backup whose output has a gate."""

    def __init__(self, inner: BackupHandler) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def run(self, output: Any) -> None:
        """See ``BackupHandler``."""
        await self._inner.run(Gated(output))


def _vm_of(name: str) -> str:
    """``web`` of ``@image/web/disks/disk-0.raw``, whatever stands before it."""
    parts = name.split("/")
    return next((parts[n + 1] for n, part in enumerate(parts[:-1]) if part[:1] == "@"), "")


class GatedProduct(Product):
    """The product's handlers, behind gates."""

    def backup(self, work: Work) -> AbstractAsyncContextManager[BackupHandler]:
        """See ``Handlers``."""
        return _gated(super().backup(work), GatedBackup)

    def restore(self, work: Work) -> AbstractAsyncContextManager[RestoreHandler]:
        """See ``Handlers``."""
        return _gated(super().restore(work), Gated)


@asynccontextmanager
async def _gated(inner: AbstractAsyncContextManager[Any], wrap: Any) -> AsyncIterator[Any]:
    async with inner as handler:
        yield wrap(handler)


if __name__ == "__main__":
    import bacula_adapter.backend.dispatch

    bacula_adapter.backend.dispatch.Product = GatedProduct  # type: ignore[misc]
    sys.exit(main())
