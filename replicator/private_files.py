# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a small file that may hold a secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from replicator.config import check_private
from replicator.errors import UsageError


def read_file(path: Path, size_max: int, *, private: bool) -> bytes:
    """The whole of a file of at most ``size_max`` bytes; ``private``: others must not be able to read or write it.

    Raises UsageError that names the file. Blocks, but not on a pipe that stands in its place.
    """
    try:
        with open(path, "rb", opener=_open_now) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{path} is not a file")
            if private:
                check_private(path, mode)
            data = file.read(size_max + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if len(data) > size_max:
        raise UsageError(f"{path}: larger than {size_max} bytes")
    return data


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


__all__ = ["read_file"]
