# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a long stream to the end of a file without the page cache, where the file system can (O_DIRECT).

What is written once and read much later only costs there: pages have to be found, filled and written back, and on virtual
machines whose host takes freed memory back that is many times the cost of writing past them. All calls block.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Final

from replicator import durable

#: What offsets, lengths and memory of a direct write are multiples of; more than any device asks for in use today.
BLOCK: Final = 4096
#: Shorter pieces go through the page cache.
_WORTH: Final = 128 << 10
#: What a file system answers that cannot do it.
_CANNOT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class Staging:
    """Aligned memory for pieces of up to ``size`` bytes; one for all files that are written in turn."""

    def __init__(self, size: int) -> None:
        self.size: Final = -(-(size + 2 * BLOCK) // BLOCK) * BLOCK
        self._memory: memoryview | None = None

    @property
    def memory(self) -> memoryview:
        """The memory; made when it is first needed."""
        if self._memory is None:
            self._memory = memoryview(mmap.mmap(-1, self.size))
        return self._memory


class PastCache:
    """Writes whole blocks of ``file`` past the page cache, until the file system says that it cannot.

    Several threads may write at once. Raises OSError; the range is undefined then.
    """

    def __init__(self, file: durable.DurableFile) -> None:
        self._file = file
        self._fd: int | None = None
        #: Whether the file system has said so.
        self.refused = False

    def open(self) -> None:
        """Open the file once more; ``write`` does it when it is first needed. Raises nothing where it cannot be had."""
        try:
            self._fd = os.open(self._file.path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            self._refuse(error)

    def write(self, view: memoryview, offset: int) -> bool:
        """Write aligned memory; whether it could be done so. If not, some of it may have been written."""
        if self._fd is None and not self.refused:
            self.open()
        if self.refused:
            return False
        assert self._fd is not None
        try:
            durable.observe("write", self._file.path)
            while view:
                count = os.pwrite(self._fd, view, offset)
                if count % BLOCK or not count:
                    raise OSError(errno.EINVAL, "a part of a block was written")
                view, offset = view[count:], offset + count
        except OSError as error:
            self._refuse(error)
            return False
        return True

    def close(self) -> None:
        """Close what this opened; the file stays open."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _refuse(self, error: OSError) -> None:
        if error.errno not in _CANNOT:
            raise error
        self.refused = True


class Appender:
    """Appends to ``file``, which must be at least ``end`` bytes long. Large pieces go past the page cache, up to the last whole
    block; ``written`` is how far the file has what was appended, and ``flush`` brings it to the end.

    One thread at a time; ``file.sync`` may be called beside it and covers what was ``written`` before. Raises OSError; what
    was appended since ``written`` is undefined then.
    """

    def __init__(self, file: durable.DurableFile, end: int, staging: Staging) -> None:
        self._file = file
        self._staging = staging
        self._direct = PastCache(file)
        self._tail = (
            b""  # what was appended and not written: less than a block, from a block border on
        )
        self.end = end
        self.written = end

    def append(self, piece: bytes | bytearray | memoryview) -> None:
        """Append a piece, of any length."""
        start = self.end
        self.end += len(piece)
        if (
            len(piece) < _WORTH
            or len(piece) > self._staging.size - 2 * BLOCK
            or self._direct.refused
        ):
            self.flush()
            self._file.write_at(piece, start)
            self.written = self.end
            return
        base = start // BLOCK * BLOCK
        memory = self._staging.memory
        head = self._head(base, start)
        memory[: len(head)] = head
        memory[len(head) : len(head) + len(piece)] = piece
        whole = (self.end - base) // BLOCK * BLOCK
        if not self._direct.write(memory[:whole], base):
            self._file.write_at(memory[: self.end - base], base)
            self.written, self._tail = self.end, b""
            return
        self.written = base + whole
        self._tail = bytes(memory[whole : self.end - base])

    def flush(self) -> None:
        """Write what is left of the last block; through the page cache."""
        if self._tail:
            self._file.write_at(self._tail, self.written)
            self._tail = b""
        self.written = self.end

    def close(self) -> None:
        """Close what this opened; the file stays open."""
        self._direct.close()

    def _head(self, base: int, start: int) -> bytes:
        """The bytes of the file from ``base`` to ``start``: the piece goes on in the middle of a block."""
        if len(self._tail) == start - base:
            return self._tail
        return self._file.read_at(start - base, base)


__all__ = ["BLOCK", "Appender", "PastCache", "Staging"]
