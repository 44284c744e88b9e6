# SPDX-License-Identifier: AGPL-3.0-or-later
"""A clone's files: qcow2 overlays that take the guest's writes and read the rest from an NBD export. No disk is copied."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import trio

from receiver.failover.console import clean_line
from receiver.store.landing import remove_folder
from receiver.store.layout import VmPaths
from replicator import durable
from replicator.errors import RefusedError, StateError

_CREATE_S = 60.0


def check_qemu_img() -> None:
    """Raise RefusedError, naming the package, if there is nothing to make overlays with."""
    if shutil.which("qemu-img") is None:
        raise RefusedError("qemu-img is not installed: install the package qemu-utils")


def make_folder(paths: VmPaths, clone_id: str) -> Path:
    """The clone's folder, durable. Blocks. Raises OSError."""
    durable.make_dir(paths.clones)
    folder = paths.clones / clone_id
    durable.make_dir(folder)
    return folder


async def make_overlay(path: Path, size: int, socket: Path, export: str) -> None:
    """Make an empty overlay of ``size`` bytes over an NBD export; nothing is read. Raises StateError, OSError."""
    backing = f"nbd+unix:///{quote(export)}?socket={quote(str(socket))}"
    durable.observe("create", str(path))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-u", "-b", backing]
    try:
        with trio.fail_after(_CREATE_S):
            done = await trio.run_process(
                [*command, str(path), str(size)],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except trio.TooSlowError:
        raise StateError(f"qemu-img did not make {path} in {_CREATE_S:g} s") from None
    if done.returncode:
        lines = [line for raw in done.stderr.splitlines() if (line := clean_line(raw))]
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise StateError(f"qemu-img cannot make {path}: {reason}")


def remove_clone(paths: VmPaths, clone_id: str) -> None:
    """Remove a clone's folder, durably. Can be repeated. Blocks. Raises OSError."""
    remove_folder(paths.clones / clone_id)
    if paths.clones.is_dir():
        durable.sync_dir(paths.clones)


def sweep_clones(paths: VmPaths, keep: str | None) -> list[str]:
    """Remove everything in the folder of clones but the clone ``keep``; returns the names of what went. Blocks."""
    removed: list[str] = []
    if not paths.clones.is_dir():
        return removed
    for entry in sorted(paths.clones.iterdir()):
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            remove_folder(entry)
        else:
            durable.unlink(entry)
        removed.append(entry.name)
    return removed
