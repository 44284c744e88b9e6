# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a target says when a command fails: status and sense data (SPC-4, 4.5), made into errors. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replicator.iscsi.errors import BusyError, LunGoneError, MediumError, ScsiError

GOOD: Final = 0x00
CHECK_CONDITION: Final = 0x02
_BUSY: Final = frozenset({0x08, 0x28})
_STATUS: Final = {
    0x04: "condition met",
    0x08: "the target is busy",
    0x18: "another initiator holds a reservation of the disk",
    0x28: "the target's queue is full",
    0x30: "an active auto contingent allegiance",
    0x40: "the target aborted the command",
}
_KEYS: Final = {
    0x0: "no sense",
    0x1: "recovered error",
    0x2: "not ready",
    0x3: "medium error",
    0x4: "hardware error",
    0x5: "illegal request",
    0x6: "unit attention",
    0x7: "data protected",
    0xB: "aborted command",
}
_CODES: Final = {
    0x1100: "unrecovered read error",
    0x2000: "the target does not know the command",
    0x2100: "beyond the end of the disk",
    0x2400: "a field of the command is not understood",
    0x2500: "no such logical unit",
    0x2A09: "the disk's size has changed",
    0x2A01: "the disk's parameters have changed",
    0x3F0E: "the target's list of units has changed",
    0x3A00: "no medium",
    0x0401: "becoming ready",
    0x0402: "not started",
}


@dataclass(frozen=True, slots=True)
class Sense:
    """Sense key, additional code and qualifier; ``information`` is the block concerned, where the target says so."""

    key: int = 0
    asc: int = 0
    ascq: int = 0
    information: int | None = None


def parse_sense(data: bytes) -> Sense:
    """Fixed or descriptor format; whatever is not there counts as 0, as targets differ in how much they send."""
    if not data:
        return Sense()
    code = data[0] & 0x7F
    if code in {0x70, 0x71}:
        padded = data.ljust(14, b"\0")
        information = (
            int.from_bytes(data[3:7], "big") if data[0] & 0x80 and len(data) >= 7 else None
        )
        return Sense(padded[2] & 0x0F, padded[12], padded[13], information)
    if code in {0x72, 0x73}:
        padded = data.ljust(8, b"\0")
        return Sense(padded[1] & 0x0F, padded[2], padded[3], _descriptor_information(data[8:]))
    return Sense()


def _descriptor_information(data: bytes) -> int | None:
    while len(data) >= 2:
        length = data[1] + 2
        if data[0] == 0 and length == 12 and len(data) >= 12:
            return int.from_bytes(data[4:12], "big") if data[2] & 0x80 else None
        data = data[length:]
    return None


def sense_of_response(data: bytes) -> bytes:
    """The sense data in the data segment of a SCSI response (two bytes of length before it); empty if there is none."""
    length = int.from_bytes(data[:2], "big")
    return data[2 : 2 + length]


def failure(where: str, command: str, status: int, sense: Sense, lba: int) -> ScsiError:
    """The error of a command that did not end with GOOD. ``lba``: the first block of the request."""
    code = sense.asc << 8 | sense.ascq
    if status in _BUSY:
        return BusyError(f"{where}: {command}: {_STATUS[status]}", status=status)
    if status != CHECK_CONDITION:
        words = _STATUS.get(status, "an unknown status")
        return ScsiError(f"{where}: {command}: {words} (status 0x{status:02x})", status=status)
    key = _KEYS.get(sense.key, f"sense key {sense.key}")
    more = _CODES.get(code)
    words = f"{key} {sense.key}/0x{code:04x}" + (f", {more}" if more else "")
    if sense.key == 3:
        at = sense.information if sense.information is not None else lba
        text = f"{where}: {command}: block {at}: {words}"
        return MediumError(text, status=status, asc=sense.asc, ascq=sense.ascq, lba=at)
    kind = LunGoneError if sense.key == 5 and sense.asc == 0x25 else ScsiError
    text = f"{where}: {command}: {words}"
    return kind(text, status=status, key=sense.key, asc=sense.asc, ascq=sense.ascq)


__all__ = ["CHECK_CONDITION", "GOOD", "Sense", "failure", "parse_sense", "sense_of_response"]
