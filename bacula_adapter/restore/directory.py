# SPDX-License-Identifier: AGPL-3.0-or-later
"""The target of a restore with a ``where``: images in a folder, in the format that was asked for.

Everything is made beside its final name, and gets that name when Bacula says that the job ended well.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from bacula_adapter.description import Description, encode_file
from bacula_adapter.names import VirtualName
from bacula_adapter.restore import convert
from bacula_adapter.restore.files import lock_folder, make_folders, open_own, remove_folders
from bacula_adapter.restore.leftovers import Leftovers
from bacula_adapter.restore.target import RestoredDisk, RestoredVm
from replicator import durable
from replicator.errors import RefusedError

_logger = logging.getLogger(__name__)

_US: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class _Made:
    """A file under its first name, the name that it is to have, and the time of its content in seconds since the epoch."""

    partial: Path
    final: Path
    time_s: int


class DirectoryTarget:
    """See ``open_directory_target``. Bases and times are told by ``expect`` before a path is asked for."""

    def __init__(self, form: str, replace: str, leftovers: Leftovers) -> None:
        self._form = form
        self._replace = replace
        self._leftovers = leftovers
        self._bases: dict[tuple[str, str], Path] = {}
        self._times: dict[tuple[str, str], int] = {}
        self._folders: list[Path] = []
        self._partial: list[Path] = []
        self._made: list[_Made] = []
        self._locks: dict[Path, int] = {}
        self._kept = False

    def expect(self, root: str, vm: str, base: Path, time_s: int) -> None:
        """Files of this VM go below ``base``; they hold what it was at ``time_s``, seconds since the epoch."""
        self._bases.setdefault((root, vm), base)
        self._times[root, vm] = time_s

    def image_path(self, root: str, vm: str, disk: str) -> Path:
        """See ``Target``."""
        final = self._final(root, vm, disk, self._times.get((root, vm), 0))
        path = final.with_name(f".{disk}.raw.partial")
        self._partial.append(path)
        return path

    def note(self, path: Path) -> None:
        """Another file that goes if nothing is kept."""
        self._partial.append(path)

    def _final(self, root: str, vm: str, disk: str, time_s: int) -> Path:
        """A disk's name at the end, its folder made. Raises RefusedError where there is what may not be replaced."""
        folder = self._folder(root, vm, "disks")
        final = folder / f"{disk}.{self._form}"
        self._check_replace(final, time_s)
        return final

    def _folder(self, root: str, vm: str, *below: str) -> Path:
        folder = self.vm_folder(root, vm)
        made = make_folders(folder.parent.parent, (root, vm, *below))
        self._folders += made
        if folder not in self._locks:
            self._locks[folder] = lock_folder(folder)
        return folder.joinpath(*below)

    def vm_folder(self, root: str, vm: str) -> Path:
        """The folder of a VM; one restore at a time is at work in it."""
        base = self._bases.get((root, vm)) or next(iter(self._bases.values()))
        return base.joinpath(root, vm)

    def _check_replace(self, final: Path, time_s: int) -> None:
        try:
            there = final.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode):
            raise RefusedError(f"{final} is there, and is no file: a restore does not replace it")
        may = {"n": False, "w": time_s > there.st_mtime, "o": time_s < there.st_mtime}
        if not may.get(self._replace, True):
            why = {"n": "never", "w": "if newer", "o": "if older"}[self._replace]
            raise RefusedError(
                f"{final} is there, and the job says Replace = {why}: move it away, or restore to another folder"
            )

    async def finish(self, vms: Sequence[RestoredVm]) -> None:
        """See ``Target``."""
        for vm in vms:
            if vm.description is None:
                continue
            time_s = vm.description.taken_at_us // _US
            for disk in vm.disks:
                await self._finish_disk(vm.description, disk, time_s)
            await self._describe(vm.description, time_s)

    async def _finish_disk(self, part: Description, disk: RestoredDisk, time_s: int) -> None:
        # Once more, because without the catalogue name and time are only known by now.
        final = await trio.to_thread.run_sync(
            self._final, part.root_name, part.vm, disk.disk, time_s
        )
        title = f"{disk.disk} of VM {part.vm}"
        if self._form == "raw":
            self._made.append(_Made(disk.path, final, time_s))
            return
        convert.check_size(self._form, disk.size)
        partial = final.with_name(f".{final.name}.partial")
        await self._begin(partial, self.vm_folder(part.root_name, part.vm))
        await convert.convert(disk.path, partial, self._form, title=title, size=disk.size)
        await trio.to_thread.run_sync(durable.unlink, disk.path)
        self._made.append(_Made(partial, final, time_s))
        _logger.info(
            "%s: converted to %s, checked, and the same as what was restored", title, self._form
        )

    async def _begin(self, partial: Path, folder: Path) -> None:
        """An empty file, which goes if nothing is kept."""
        self._partial.append(partial)
        await self._leftovers.note(partial, folder)
        await trio.to_thread.run_sync(_empty, partial)

    async def _describe(self, part: Description, time_s: int) -> None:
        name = VirtualName(part.root_name, part.vm, "description", "", part.number, part.part)
        folder = await trio.to_thread.run_sync(self._folder, part.root_name, part.vm)
        final = folder / str(name).rpartition("/")[2]
        partial = final.with_name(f".{final.name}.partial")
        try:
            self._check_replace(final, time_s)
        except RefusedError as error:
            _logger.info("%s", error)  # it says what this one would: a part never changes
            return
        await self._begin(partial, folder)
        await trio.to_thread.run_sync(_write, partial, encode_file(part))
        self._made.append(_Made(partial, final, time_s))

    async def keep(self) -> None:
        """See ``Target``."""
        await self._leftovers.note_names([(made.partial, made.final) for made in self._made])
        self._kept = True
        for made in self._made:
            await trio.to_thread.run_sync(_rename, made)
            _logger.info("restored %s", made.final)

    async def close(self) -> None:
        """Remove what was made, unless it was kept."""
        with trio.CancelScope(shield=True):
            if not self._kept:
                await trio.to_thread.run_sync(self._remove)
            while self._locks:
                os.close(self._locks.popitem()[1])

    def _remove(self) -> None:
        for path in self._partial:
            with suppress(OSError):  # the next restore sweeps it
                durable.unlink(path)
        remove_folders(self._folders)


def _empty(path: Path) -> None:
    with open_own(path) as file:
        file.truncate(0)


def _write(path: Path, data: bytes) -> None:
    with durable.DurableFile(path) as file:
        file.write_at(data, 0)
        file.sync()


def _rename(made: _Made) -> None:
    os.utime(made.partial, (made.time_s, made.time_s))
    durable.rename(made.partial, made.final)


@asynccontextmanager
async def open_directory_target(
    form: str, replace: str, leftovers: Leftovers
) -> AsyncIterator[DirectoryTarget]:
    """A target that keeps images in folders. ``form``: ``target_format``; ``replace``: Bacula's a, w, n or o.

    Raises RefusedError, before anything is taken, if qemu-img is needed and not there.
    """
    if form != "raw":
        convert.find_qemu_img()
    target = DirectoryTarget(form, replace, leftovers)
    try:
        yield target
    finally:
        await target.close()


__all__ = ["DirectoryTarget", "open_directory_target"]
