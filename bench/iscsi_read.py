# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m bench.iscsi_read HOST PORT TARGET INITIATOR OUT DEPTH READ_SIZE`: read a disk whole, as a backup would.

OUT is a new file, or `-` for nowhere. Prints the seconds that it took from the connection on, and the processor's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator

import trio

from replicator.iscsi import IscsiSettings, Portal, open_disk
from replicator.iscsi.disk import IscsiDisk

#: What one worker reads and then writes, bytes; some read while others write.
_CHUNK = 2 << 20
_WORKERS = 5


async def _read(portal: Portal, target: str, settings: IscsiSettings, out: str) -> None:
    file = -1 if out == "-" else os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    async with open_disk(portal, target, None, settings) as disk:
        offsets = iter(range(0, disk.size, _CHUNK))
        async with trio.open_nursery() as nursery:
            for _ in range(_WORKERS):
                nursery.start_soon(_worker, disk, offsets, file)
        if file >= 0:
            os.ftruncate(file, disk.size)


async def _worker(disk: IscsiDisk, offsets: Iterator[int], file: int) -> None:
    memory = memoryview(bytearray(_CHUNK))
    for offset in offsets:
        part = memory[: min(_CHUNK, disk.size - offset)]
        await disk.read_into(offset, part)
        if file >= 0:
            await trio.to_thread.run_sync(os.pwrite, file, part, offset)


def main() -> None:
    """See the module."""
    host, port, target, initiator, out, depth, read_size = sys.argv[1:]
    settings = IscsiSettings(initiator, depth=int(depth), read_size=int(read_size))
    started, cpu = time.perf_counter(), time.process_time()
    trio.run(_read, Portal(host, int(port)), target, settings, out)
    print(json.dumps({"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
