# SPDX-License-Identifier: AGPL-3.0-or-later
"""Peers that keep repositories of deduplicated chunks: borg and restic."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from bench.contender import Contender, Lab, Pair
from bench.images import Image
from bench.meter import Meter
from bench.programs import Command, change, pipe, run, warm

_SFTP: Final = "/usr/lib/openssh/sftp-server"
#: In place of ssh: what is to run at the other end runs here, over a pipe.
_STUB: Final = '#!/bin/sh\nshift\nexec "$@"\n'


class _RepositoryPair(Pair):
    """``create``: the command that backs up the image; ``restore``: the one that writes it to its output."""

    def __init__(
        self, source: Path, env: Mapping[str, str], create: Command, restore: Command
    ) -> None:
        self._source = source
        self._env = env
        self._create = create
        self._restore = restore
        self._number = 0

    async def seed(self, meter: Meter) -> None:
        del meter
        self._number += 1
        await run(self._named(self._create), env=self._env)

    async def check(self) -> None:
        await pipe([self._named(self._restore), ["cmp", "-", self._source]], env=self._env)

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        await trio.to_thread.run_sync(change, self._source, offsets, pieces)

    async def warm(self) -> None:
        """All of the source is read."""
        await trio.to_thread.run_sync(warm, self._source)

    async def cycle(self, meter: Meter) -> None:
        await self.seed(meter)

    def _named(self, command: Command) -> Command:
        return [str(each).replace("{number}", str(self._number)) for each in command]


class Borg(Contender):
    """borg to a repository that `borg serve` keeps, over a pipe."""

    name = "borg"
    detail = "borg create, repokey-blake2, lz4, to borg serve over a pipe"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            folder = Path(name)
            source = await _source(folder, image, copy=cycles)
            stub = folder / "stub"
            stub.write_text(_STUB, "ascii")
            stub.chmod(0o700)
            env = {
                "BORG_BASE_DIR": name,
                "BORG_PASSPHRASE": "bench",
                "BORG_RSH": str(stub),
                "BORG_REPO": f"ssh://receiver{name}/repository",
            }
            await run(["borg", "init", "--encryption=repokey-blake2"], env=env)
            create: Command = ["borg", "create", "--files-cache=disabled", "::{number}", source]
            restore: Command = ["borg", "extract", "--stdout", "::{number}", str(source)[1:]]
            yield _RepositoryPair(source, env, create, restore)


class Restic(Contender):
    """restic to a repository behind an SFTP server, over a pipe."""

    name = "restic"
    detail = "restic backup, its own encryption and compression, to sftp-server over a pipe"

    @asynccontextmanager
    async def pair(self, lab: Lab, image: Image, *, cycles: bool = False) -> AsyncIterator[Pair]:
        """See ``Contender``."""
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            folder = Path(name)
            source = await _source(folder, image, copy=cycles)
            env = {
                "RESTIC_REPOSITORY": f"sftp:receiver:{name}/repository",
                "RESTIC_PASSWORD": "bench",
                "RESTIC_CACHE_DIR": f"{name}/cache",
            }
            base: Command = ["restic", "-q", "-o", f"sftp.command={_SFTP}"]
            await run([*base, "init"], env=env)
            restore: Command = [*base, "dump", "latest", source]
            yield _RepositoryPair(source, env, [*base, "backup", source], restore)


async def _source(folder: Path, image: Image, *, copy: bool) -> Path:
    if not copy:
        return image.path
    source = folder / "source.raw"
    await run(["cp", "--sparse=always", image.path, source])
    return source


__all__ = ["Borg", "Restic"]
