# SPDX-License-Identifier: AGPL-3.0-or-later
"""A file's attributes as the dialogue has them, checked. Pure."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import Final

from bacula_adapter.backend.interface import FileEntry
from bacula_adapter.backend.packets import ProtocolError

#: No file is larger: an offset is a signed number of 64 bits.
SIZE_MAX: Final = (1 << 63) - 1
#: No object that a catalogue keeps is larger, when it has been unpacked.
OBJECT_MAX: Final = 16 << 20
_STAT: Final = re.compile(
    r"([A-Z]) (\d{1,19}) (\d{1,10}) (\d{1,10}) ([0-7]{1,8}) (\d{1,10})(?: (-?\d{1,10}))?"
)
_TSTAMP: Final = re.compile(r"(-?\d{1,12}) (-?\d{1,12}) (-?\d{1,12})")


@dataclass(frozen=True, slots=True)
class Stat:
    """What STAT says. ``kind``: F file, E empty file, D directory, others as Bacula has them."""

    kind: str
    size: int
    mode: int
    file_index: int


def format_stat(entry: FileEntry) -> str:
    """STAT of a file that is backed up; a name that ends in a slash is a directory."""
    if entry.name.endswith("/"):
        return f"D 0 0 0 {stat.S_IFDIR | 0o700:o} 1"
    return f"F {entry.size} 0 0 {stat.S_IFREG | entry.mode:o} 1"


def parse_stat(text: str) -> Stat:
    """STAT of a file that is restored. Raises ProtocolError."""
    match = _STAT.fullmatch(text)
    if match is None or int(match[2]) > SIZE_MAX:
        raise ProtocolError(f"STAT:{text[:80]} is not a file's attributes")
    return Stat(match[1], int(match[2]), int(match[5], 8), int(match[7] or 0))


def parse_tstamp(text: str) -> int:
    """The time of the last change in TSTAMP, in seconds since the epoch. Raises ProtocolError."""
    match = _TSTAMP.fullmatch(text)
    if match is None:
        raise ProtocolError(f"TSTAMP:{text[:80]} is not three times")
    return int(match[2])


def parse_number(key: str, text: str, largest: int) -> int:
    """A whole number from 0 on. Raises ProtocolError that names ``key``."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > largest:
        raise ProtocolError(f"{key}: {text[:40]!r} is no number from 0 to {largest}")
    return int(text)


__all__ = [
    "OBJECT_MAX",
    "SIZE_MAX",
    "Stat",
    "format_stat",
    "parse_number",
    "parse_stat",
    "parse_tstamp",
]
