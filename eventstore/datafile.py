# SPDX-License-Identifier: AGPL-3.0-or-later
"""What can be known of an LMDB data file before it is mapped: whether it is whole.

LMDB believes its two meta pages. In a file that was cut short they name pages that are not there,
and touching those kills the process with SIGBUS. So the meta pages are read by hand first (format
1, that of LMDB 0.9, 64 bits, this machine's byte order). Knows nothing of what is stored.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import lmdb.verify
from eventsourcing.persistence import InternalError

DATA_FILE = "data.mdb"
_MAGIC = 0xBEEFC0DE
_FORMAT = 1
_P_META = 0x08
_PAGE_BYTES_MIN = 512
_PAGE_BYTES_MAX = 1 << 16
_NO_PAGE = (1 << 64) - 1
#: Page number, pad, flags, free space; magic, format, address, map size; two databases (page size
#: or pad, flags, depth, branch, leaf and overflow pages, entries, root); last page, transaction.
_META = struct.Struct("=QHHI" + "IIQQ" + "IHHQQQQQ" * 2 + "QQ")
#: A writer may be committing while we read: only what is read twice is believed to be wrong.
_READS_MAX = 100


class _Meta(NamedTuple):
    page_bytes: int
    roots: tuple[int, int]
    last_page: int
    transaction: int


def check_data_file(folder: str) -> None:
    """Raises InternalError if the data file in ``folder`` is no LMDB file, or is cut short.

    Nothing there, or an empty file, is no error: LMDB makes a new one. Raises OSError.
    """
    path = os.path.join(folder, DATA_FILE)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        seen, fault = b"", ""
        for _ in range(_READS_MAX):
            heads = os.pread(fd, _PAGE_BYTES_MAX + _META.size, 0)
            # After the meta pages: a writer makes the file longer before it says so there.
            length = os.fstat(fd).st_size
            fault = _fault(path, heads, length)
            if not fault:
                return
            if heads == seen:
                break
            seen = heads
        raise InternalError(f"event store {folder}: {DATA_FILE} {fault}")
    finally:
        os.close(fd)


def check_structure(folder: str) -> None:
    """Raises InternalError unless every page in the data file of ``folder`` is sound.

    Walks over all pages in use, about 25 s for a gigabyte. LMDB believes its pages: a few kinds of
    damage in them would otherwise end the process. Only of use while nobody writes.
    """
    path = os.path.join(folder, DATA_FILE)
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    try:
        faults: list[str] = lmdb.verify.verify(path)  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        faults = [str(error)]
    if faults:
        raise InternalError(f"event store {folder}: {DATA_FILE} is damaged: {faults[0]}")


def _fault(path: str, heads: bytes, length: int) -> str:
    """What is wrong with the file; empty if nothing is."""
    if not length:
        return ""
    fault, newest = _judge(heads)
    if newest is None or length >= (newest.last_page + 1) * newest.page_bytes:
        return fault
    return _cut_short(path, length, newest)


def _cut_short(path: str, length: int, newest: _Meta) -> str:
    """What is wrong with a file that ends before its last page; empty if nothing is.

    The last pages of a commit that freed them again are counted but never written. So the slow walk
    over the pages that are in use decides.
    """
    expected = (newest.last_page + 1) * newest.page_bytes
    text = f"is cut short: {length} bytes of {expected}"
    if any(root != _NO_PAGE and root * newest.page_bytes >= length for root in newest.roots):
        return text
    try:
        check_structure(os.path.dirname(path))
    except InternalError:
        return text
    return ""


def _judge(heads: bytes) -> tuple[str, _Meta | None]:
    """(what is wrong, the newest meta page)."""
    first = _meta(heads, 0)
    if first is None:
        return "is not an LMDB file that this version can read", None
    second = _meta(heads, first.page_bytes)
    if second is None or second.page_bytes != first.page_bytes:
        return "is damaged: its second meta page cannot be read", None
    # Commits write the two pages in turns: each has the parity of its own, and they are neighbours.
    older, newer = sorted((first, second), key=lambda meta: meta.transaction)
    begun = newer.transaction > 0
    if begun and (newer.transaction - older.transaction != 1 or first.transaction % 2):
        numbers = f"{first.transaction} and {second.transaction}"
        return f"is damaged: its meta pages are of transactions {numbers}", None
    for root in newer.roots:
        if root != _NO_PAGE and not 2 <= root <= newer.last_page:
            return f"is damaged: it has no page {root}", None
    return "", newer


def _meta(heads: bytes, offset: int) -> _Meta | None:
    if len(heads) < offset + _META.size:
        return None
    fields = _META.unpack_from(heads, offset)
    flags, magic, form = fields[2], fields[4], fields[5]
    page_bytes, last_page, transaction = fields[8], fields[24], fields[25]
    if not flags & _P_META or magic != _MAGIC or form != _FORMAT:
        return None
    if not _PAGE_BYTES_MIN <= page_bytes <= _PAGE_BYTES_MAX or page_bytes & (page_bytes - 1):
        return None
    return _Meta(page_bytes, (fields[15], fields[23]), last_page, transaction)
