# SPDX-License-Identifier: AGPL-3.0-or-later
"""Files and folders below a place that an operator names, with names that come from a volume. All functions block."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from replicator import durable
from replicator.errors import RefusedError


def open_own(path: Path) -> durable.DurableFile:
    """A file that is made if need be. Raises RefusedError if it is a link, or no file, or cannot be written."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RefusedError(f"{path} is no file")
    finally:
        os.close(fd)
    return durable.DurableFile(path)


def lock_folder(path: Path) -> int:
    """A descriptor that holds the folder against other restores until it is closed. Raises RefusedError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise RefusedError(
            f"another restore is at work in {path}; let it end, or cancel it"
        ) from None
    return fd


def make_folders(base: Path, parts: Sequence[str]) -> list[Path]:
    """Make ``base`` and the folders below it that are missing; returns those made, the outermost first.

    ``base`` is the operator's, and may lead anywhere; below it nothing is followed: RefusedError for a link, or a file.
    """
    made: list[Path] = []
    if not base.is_absolute() or ".." in base.parts:
        raise RefusedError(f"where: {base} is not an absolute path without '..'")
    path = base
    missing = [each for each in (base, *base.parents) if not each.exists()]
    try:
        for path in reversed(missing):
            durable.make_dir(path)
            made.append(path)
        path = base
        for part in parts:
            assert "/" not in part
            assert part not in ("", ".", "..")
            path /= part
            if not os.path.lexists(path):
                durable.make_dir(path)
                made.append(path)
            elif not stat.S_ISDIR(path.lstat().st_mode):
                raise RefusedError(
                    f"{path} is no folder: a restore follows no links below its place"
                )
    except OSError as error:
        remove_folders(made)
        raise RefusedError(f"where: {path} cannot be made: {error.strerror}") from error
    except BaseException:
        remove_folders(made)
        raise
    return made


def remove_folders(made: Sequence[Path]) -> None:
    """Remove the folders that are empty, the innermost first."""
    for path in reversed(made):
        try:
            durable.remove_dir(path)
        except OSError:
            continue


__all__ = ["lock_folder", "make_folders", "open_own", "remove_folders"]
