# SPDX-License-Identifier: AGPL-3.0-or-later
"""The SCSI commands that reading a disk takes (SPC-4, SBC-3): their bytes, and what their answers say. No I/O.

Answers come from the target: every length in them is checked against what was received, and ValueError says what is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

#: A target has at most this many logical units that we look at.
LUNS_MAX: Final = 256
ANSWER_MAX: Final = 4096
_BLOCK_SIZES: Final = frozenset({512, 1024, 2048, 4096})
#: Larger than any volume disk (200 TiB), and far from where arithmetic in other languages ends.
_SIZE_MAX: Final = 1 << 60
IDENTIFIERS_PAGE: Final = 0x83
SERIAL_PAGE: Final = 0x80
#: Deallocated and anchored. Everything else (mapped, unknown, of a later standard) has to be read.
_UNMAPPED: Final = frozenset({1, 2})
LIMITS_PAGE: Final = 0xB0


def encode_lun(number: int) -> bytes:
    """A LUN as eight bytes: peripheral addressing up to 255, flat space up to 16383. Raises ValueError."""
    if 0 <= number < 256:
        return bytes([0, number]) + bytes(6)
    if 256 <= number < 1 << 14:
        return struct.pack(">H", 0x4000 | number) + bytes(6)
    raise ValueError(f"LUN {number}: 0 to 16383")


def decode_lun(data: bytes) -> int | None:
    """The number in a LUN's eight bytes; None for a way of addressing that a single-level target does not use."""
    first, method = data[0], data[0] >> 6
    if data[2:8] != bytes(6) or method not in {0, 1} or (method == 0 and first):
        return None
    return (first & 0x3F) << 8 | data[1]


def test_unit_ready() -> bytes:
    """TEST UNIT READY."""
    return bytes(6)


def report_luns() -> bytes:
    """REPORT LUNS; the answer has room for LUNS_MAX."""
    return struct.pack(">B5xIxx", 0xA0, 8 + 8 * LUNS_MAX)


def inquiry(page: int | None = None) -> bytes:
    """INQUIRY: the standard answer, or a page of vital product data."""
    return struct.pack(">BBBHx", 0x12, 0 if page is None else 1, page or 0, ANSWER_MAX)


def read_capacity() -> bytes:
    """READ CAPACITY(16)."""
    return struct.pack(">BBQIxx", 0x9E, 0x10, 0, 32)


def read(lba: int, blocks: int) -> bytes:
    """READ(16)."""
    return struct.pack(">BxQIxx", 0x88, lba, blocks)


def get_lba_status(lba: int) -> bytes:
    """GET LBA STATUS from ``lba`` on; the answer has ANSWER_MAX bytes."""
    return struct.pack(">BBQIxx", 0x9E, 0x12, lba, ANSWER_MAX)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Blocks of a disk. ``zeroes``: blocks that are not allocated read as zeros (LBPRZ)."""

    blocks: int
    block_size: int
    thin: bool
    zeroes: bool


def parse_luns(data: bytes) -> list[int]:
    """The LUNs of REPORT LUNS, ascending; those of several levels are left out."""
    if len(data) < 8:
        raise ValueError("REPORT LUNS: a short answer")
    length = int.from_bytes(data[:4], "big")
    if length > 8 * LUNS_MAX:
        raise ValueError(f"REPORT LUNS: {length // 8} units, more than {LUNS_MAX}")
    if length % 8 or len(data) < 8 + length:
        raise ValueError("REPORT LUNS: a list that does not fit the answer")
    found = (decode_lun(data[at : at + 8]) for at in range(8, 8 + length, 8))
    return sorted({number for number in found if number is not None})


def is_disk(data: bytes) -> bool:
    """Whether a standard INQUIRY answer is that of a connected direct-access block device."""
    if len(data) < 5:
        raise ValueError("INQUIRY: a short answer")
    return data[0] == 0


def parse_capacity(data: bytes) -> Capacity:
    """READ CAPACITY(16)."""
    if len(data) < 16:
        raise ValueError("READ CAPACITY(16): a short answer")
    last, block_size = struct.unpack_from(">QI", data)
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"READ CAPACITY(16): blocks of {block_size} bytes")
    blocks = last + 1
    if blocks * block_size > _SIZE_MAX:
        raise ValueError(f"READ CAPACITY(16): a disk of {blocks} blocks")
    flags = data[14]
    return Capacity(blocks, block_size, thin=bool(flags & 0x80), zeroes=bool(flags & 0x40))


def _page(data: bytes, number: int) -> bytes:
    if len(data) < 4 or data[1] != number:
        raise ValueError(f"INQUIRY: not page 0x{number:02x}")
    length = int.from_bytes(data[2:4], "big")
    if len(data) < 4 + length:
        raise ValueError(f"INQUIRY: page 0x{number:02x} is cut short")
    return data[4 : 4 + length]


def parse_serial(data: bytes) -> str:
    """The unit serial number of page 0x80; what is not printable is left out."""
    return _printable(_page(data, SERIAL_PAGE))


def parse_identifiers(data: bytes) -> tuple[str, ...]:
    """The designators of page 0x83 that name the logical unit: ``naa.…``, ``eui.…``, ``t10.…``, ``name.…``."""
    return tuple(_identifiers(_page(data, IDENTIFIERS_PAGE)))


def _identifiers(page: bytes) -> Iterator[str]:
    while page:
        if len(page) < 4 or len(page) < 4 + page[3]:
            raise ValueError("INQUIRY: a designator that is cut short")
        body, page_left = page[4 : 4 + page[3]], page[4 + page[3] :]
        association, kind = page[1] >> 4 & 3, page[1] & 0x0F
        page = page_left
        if association != 0 or not body.strip(b"\0 "):
            continue  # of a port or of the target
        if kind == 1:
            yield f"t10.{_printable(body)}"
        elif kind == 2:
            yield f"eui.{body.hex()}"
        elif kind == 3:
            yield f"naa.{body.hex()}"
        elif kind == 8:
            yield f"name.{_printable(body)}"


def parse_transfer_max(data: bytes) -> int:
    """Most blocks that one READ may have, by page 0xB0; 0: no limit is reported."""
    page = _page(data, LIMITS_PAGE)
    return int.from_bytes(page[4:8], "big") if len(page) >= 8 else 0


@dataclass(frozen=True, slots=True)
class LbaStatus:
    """A run of blocks and whether they are allocated."""

    lba: int
    blocks: int
    mapped: bool


def parse_lba_status(data: bytes, lba: int, end: int) -> list[LbaStatus]:
    """GET LBA STATUS: runs without gaps from ``lba`` on, clipped to ``end``; at least one."""
    if len(data) < 24:
        raise ValueError("GET LBA STATUS: a short answer")
    length = min(int.from_bytes(data[:4], "big") + 4, len(data))
    found: list[LbaStatus] = []
    at = lba
    for start in range(8, length - 15, 16):
        first, blocks, state = struct.unpack_from(">QIB", data, start)
        stop = min(first + blocks, end)
        # The first run may begin before the block that was asked for.
        if (first != at if found else first > at) or stop <= at:
            raise ValueError("GET LBA STATUS: runs that do not follow each other")
        found.append(LbaStatus(at, stop - at, mapped=state & 0x0F not in _UNMAPPED))
        at = stop
        if at == end:
            break
    if not found:
        raise ValueError("GET LBA STATUS: no run of blocks")
    return found


def _printable(data: bytes) -> str:
    return "".join(chr(byte) for byte in data if 0x20 <= byte < 0x7F).strip()


__all__ = [
    "ANSWER_MAX",
    "IDENTIFIERS_PAGE",
    "LIMITS_PAGE",
    "LUNS_MAX",
    "SERIAL_PAGE",
    "Capacity",
    "LbaStatus",
    "decode_lun",
    "encode_lun",
    "get_lba_status",
    "inquiry",
    "is_disk",
    "parse_capacity",
    "parse_identifiers",
    "parse_lba_status",
    "parse_luns",
    "parse_serial",
    "parse_transfer_max",
    "read",
    "read_capacity",
    "report_luns",
    "test_unit_ready",
]
