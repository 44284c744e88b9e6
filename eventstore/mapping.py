# SPDX-License-Identifier: AGPL-3.0-or-later
"""Opens the LMDB environment of a folder: its sizes, its files, and how its map grows.

Knows nothing of who else uses it in this process; `eventstore.shared` does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import lmdb
from eventsourcing.persistence import OperationalError, ProgrammingError

from eventstore.datafile import DATA_FILE, check_data_file, check_structure

StrPath = str | os.PathLike[str]

#: Address space tried in this order. A reserve costs no disk, only address space, and saves growing
#: the map at run time.
MAP_SIZE_RESERVES = tuple(1 << bits for bits in (40, 38, 36, 34, 32, 30, 28, 26))
MAP_SIZE_BYTES_MIN = 1 << 16
#: Also where growing ends.
MAP_SIZE_BYTES_MAX = 1 << 46
MAX_READERS_DEFAULT = 126
MAX_READERS_LIMIT = 4096
#: Named databases per environment: up to six for each log, one for each journal and view.
MAX_DATABASES = 64
NAME_BYTES_MAX = 100


def check_limits(map_size: int | None, max_readers: int) -> None:
    """Raises ProgrammingError for a size out of bounds."""
    if map_size is not None and not MAP_SIZE_BYTES_MIN <= map_size <= MAP_SIZE_BYTES_MAX:
        raise ProgrammingError(
            f"LMDB map size {map_size} is not within "
            f"{MAP_SIZE_BYTES_MIN}..{MAP_SIZE_BYTES_MAX} bytes"
        )
    if not 1 <= max_readers <= MAX_READERS_LIMIT:
        raise ProgrammingError(
            f"LMDB max readers {max_readers} is not within 1..{MAX_READERS_LIMIT}"
        )


def check_name(name: str, what: str) -> None:
    """Raises ProgrammingError unless ``name`` can be part of a database's name: short, and without
    a slash.
    """
    if "/" in name or "\0" in name or len(name.encode()) > NAME_BYTES_MAX:
        raise ProgrammingError(f"{what} {name!r} has a slash or more than {NAME_BYTES_MAX} bytes")


def open_environment(
    folder: str, map_size: int | None, max_readers: int, *, readonly: bool, verify: bool
) -> lmdb.Environment:
    """The environment in ``folder``, which is made if it may be; slots of dead readers are cleared.

    Raises OperationalError (nothing to read), InternalError (a file that is damaged or cut short),
    OSError, lmdb.Error.
    """
    if readonly:
        data = Path(folder) / DATA_FILE
        # LMDB makes the file before it writes its first pages: an empty one is no environment yet.
        if not data.is_file() or data.stat().st_size == 0:
            raise OperationalError(f"there is no event store in {folder}")
    elif not os.path.isdir(folder):
        os.mkdir(folder, 0o700)
    check_data_file(folder)
    if verify:
        check_structure(folder)
    environment = _open_lmdb(folder, map_size, max_readers, readonly=readonly)
    try:
        if not readonly:
            # LMDB syncs what is in its files but not their names.
            _sync_directory(folder)
            _sync_directory(os.path.dirname(folder))
        environment.reader_check()
    except BaseException:
        environment.close()
        raise
    return environment


def _open_lmdb(
    folder: str, map_size: int | None, max_readers: int, *, readonly: bool
) -> lmdb.Environment:
    sizes = MAP_SIZE_RESERVES if map_size is None else (map_size,)
    for attempt, size in enumerate(sizes, start=1):
        try:
            return lmdb.Environment(
                folder,
                map_size=size + -size % mmap.PAGESIZE,
                readonly=readonly,
                create=False,
                mode=0o600,
                max_readers=max_readers,
                max_dbs=MAX_DATABASES,
                # A replay touches pages all over the file: reading ahead of each fault only delays
                # it.
                readahead=False,
            )
        except lmdb.MemoryError:
            if attempt == len(sizes):
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def grow(environment: lmdb.Environment, folder: str, seen: int) -> None:
    """Make the map larger than ``seen`` bytes. No transaction may be open in this process.

    One process at a time: two that grew the same map at once have damaged it (py-lmdb issue 269).
    Raises OperationalError if it may not or cannot grow, OSError, lmdb.Error.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = seen * 2
        if size > MAP_SIZE_BYTES_MAX:
            raise OperationalError(
                f"event store {folder}: the map of {seen} bytes is full, and may not grow over "
                f"{MAP_SIZE_BYTES_MAX} bytes"
            )
        _check_address_space(folder, size)
        environment.set_mapsize(size)
    finally:
        os.close(fd)


def adopt(environment: lmdb.Environment) -> None:
    """Map as much as another process has made of it. No transaction may be open in this one."""
    environment.set_mapsize(0)


def map_size(environment: lmdb.Environment) -> int:
    """Bytes of address space that the map takes."""
    size: int = environment.info()["map_size"]
    return size


def _check_address_space(folder: str, size: int) -> None:
    """LMDB unmaps the old map before it makes the new one: a failure there is the end of it."""
    try:
        mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
        ).close()
    except (OSError, OverflowError, ValueError) as error:
        raise OperationalError(
            f"event store {folder}: the map is full, and there is no address space for {size} bytes"
        ) from error


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
