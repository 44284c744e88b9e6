# SPDX-License-Identifier: AGPL-3.0-or-later
"""The state directory belongs to one process at a time: checked, made if need be, locked.

The lock is the kernel's (flock): it goes with the process that held it, however that ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replicator import durable
from replicator.errors import RefusedError, UsageError

LOCK = "lock"


def check_directory(path: Path, key: str) -> None:
    """Raise UsageError, naming the configuration's ``key``, unless ``path`` is or can become a directory to write in.

    Touches nothing. Only the last part of the path may be missing.
    """
    try:
        if not os.path.lexists(path):
            parent = path.parent
            if not parent.is_dir():
                raise UsageError(f"{key}: {path} cannot be made: {parent} is not a directory")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UsageError(f"{key}: {path} cannot be made: {parent} is not writable")
        elif not path.is_dir():
            raise UsageError(f"{key}: {path} is not a directory")
        elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"{key}: {path} is not writable for this user")
    except OSError as error:
        raise UsageError(f"{key}: {path}: {error.strerror}") from error


@contextmanager
def open_state_dir(path: Path) -> Iterator[Path]:
    """Hold the state directory alone, made (mode 0700) if only its parent is there. Blocks, briefly.

    Raises UsageError if it cannot be written to, RefusedError that names the process that holds it.
    """
    check_directory(path, "state_dir")
    try:
        durable.make_dir(path)
        lock = durable.DurableFile(path / LOCK, create=True)
    except OSError as error:
        # What access rights do not tell: a read-only or virtual file system.
        raise UsageError(f"state_dir: {path} is not writable: {error.strerror}") from error
    with lock:
        _take(lock, path)
        yield path


def _take(lock: durable.DurableFile, path: Path) -> None:
    try:
        fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(f"state_dir: {path} cannot be locked: {error.strerror}") from error
        pid = lock.read_at(20, 0).decode("ascii", "replace").strip()
        who = f" (pid {pid})" if pid.isdigit() else ""
        raise RefusedError(f"another replctl{who} is using {path}") from None
    text = f"{os.getpid()}\n".encode()
    lock.write_at(text, 0)
    lock.truncate(len(text))


__all__ = ["LOCK", "check_directory", "open_state_dir"]
