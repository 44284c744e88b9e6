# SPDX-License-Identifier: AGPL-3.0-or-later
"""Packets of the dialogue between plugin and backend (docs/backend-protocol.md): bytes to packets, and back. No I/O.

A packet is a status character, its payload's length in six decimal digits, a newline, and the payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from replicator.errors import WireError

HEADER_BYTES: Final = 8
PAYLOAD_MAX: Final = 999_999
#: Every status of the protocol: ours, and those of Bacula's own metaplugins.
STATUSES: Final = frozenset(b"CDFTEAQWIBKSNRPOV")
#: Those that never have a payload.
BARE: Final = frozenset(b"FTK")
#: No command and no message is longer.
TEXT_MAX: Final = 64 << 10
_DIGITS: Final = frozenset(b"0123456789")


class ProtocolError(WireError):
    """The other side said what may not be said there. The conversation ends: there is no way back into step."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet. ``status`` is one character."""

    status: str
    payload: bytes = b""

    def text(self) -> str:
        """The payload as text, without the white space at its end. Raises ProtocolError unless it is UTF-8, one line, and short
        enough.
        """
        if len(self.payload) > TEXT_MAX:
            raise ProtocolError(
                f"a packet {self.status} of {len(self.payload)} bytes is too long for text"
            )
        try:
            text = self.payload.decode().rstrip()
        except UnicodeDecodeError:
            raise ProtocolError(f"the text of a packet {self.status} is not UTF-8") from None
        if "\0" in text or "\n" in text:
            raise ProtocolError(f"the text of a packet {self.status} is not one line")
        return text


def header(status: str, length: int) -> bytes:
    """The header of a packet with so many bytes of payload."""
    assert ord(status) in STATUSES
    assert 0 <= length <= PAYLOAD_MAX, length
    return b"%c%06d\n" % (ord(status), length)


def encode(status: str, payload: bytes = b"") -> bytes:
    """A whole packet. For small ones: it copies the payload."""
    return header(status, len(payload)) + payload


class PacketReader:
    """Bytes as they arrive to packets.

    Payloads are not copied where a read brings exactly what ``wanted`` asks for. Nothing is kept but one unfinished packet.
    """

    __slots__ = ("_length", "_parts", "_status", "_wanted")

    def __init__(self) -> None:
        self._status = ""  # empty: the header is being read
        self._length = 0
        self._parts: list[bytes] = []
        self._wanted = HEADER_BYTES

    @property
    def wanted(self) -> int:
        """How many bytes are missing to the end of what is being read, a header or a payload; at least 1."""
        return self._wanted

    @property
    def between(self) -> bool:
        """Whether nothing of a packet has arrived: here the input may end."""
        return not self._status and self._wanted == HEADER_BYTES

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The packets that ``data``, of any length, completes. Raises ProtocolError at the first header that is none."""
        at = 0
        while at < len(data):
            part = data[at : at + self._wanted]  # the whole of bytes is the object itself
            at += len(part)
            self._wanted -= len(part)
            self._parts.append(part)
            if self._wanted:
                return
            whole = part if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            if not self._status:
                self._status, self._length = _take_apart(whole)
                self._wanted = self._length
                whole = b""
            if not self._wanted:
                packet = Packet(self._status, whole)
                self._status, self._wanted = "", HEADER_BYTES
                yield packet


def _take_apart(head: bytes) -> tuple[str, int]:
    """Status and length in a header."""
    status = head[0]
    if status not in STATUSES or head[7] != 0x0A or not _DIGITS.issuperset(head[1:7]):
        raise ProtocolError(f"what should be a packet begins with {head!r}")
    length = int(head[1:7])
    if length and status in BARE:
        raise ProtocolError(f"a packet {chr(status)} with {length} bytes of payload")
    return chr(status), length


__all__ = [
    "HEADER_BYTES",
    "PAYLOAD_MAX",
    "STATUSES",
    "TEXT_MAX",
    "Packet",
    "PacketReader",
    "ProtocolError",
    "encode",
    "header",
]
