# SPDX-License-Identifier: AGPL-3.0-or-later
"""The text of logins: ``key=value`` pairs, and the table of what is negotiated (RFC 7143, chapters 6 and 13). No I/O."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from replicator.iscsi.pdu import PduError

#: Most bytes of one side's text in one exchange: a login.
TEXT_MAX: Final = 64 << 10
_VALUE_MAX: Final = 8192
_KEY = re.compile(r"[A-Z][A-Za-z0-9.+@_#-]{0,62}")
_NUMBER = re.compile(r"[0-9]{1,8}|0[xX][0-9A-Fa-f]{1,6}")
_BINARY_MAX: Final = 1024
_LENGTHS: Final = (512, (1 << 24) - 1)


def encode_text(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The data segment that holds the pairs."""
    return b"".join(f"{key}={value}\0".encode() for key, value in pairs)


def decode_text(data: bytes) -> list[tuple[str, str]]:
    """The pairs of a data segment, in order. Raises PduError."""
    pairs = []
    for piece in data.split(b"\0"):
        if not piece:
            continue
        try:
            key, equals, value = piece.decode("utf-8").partition("=")
        except UnicodeDecodeError:
            raise PduError("text that is not UTF-8") from None
        if not equals or _KEY.fullmatch(key) is None or len(value) > _VALUE_MAX:
            raise PduError("text that is not key=value")
        pairs.append((key, value))
    return pairs


def decode_binary(value: str) -> bytes:
    """A binary value, ``0x`` and hexadecimal or ``0b`` and base64, of 1 to 1024 bytes. Raises PduError."""
    try:
        if value[:2] in {"0x", "0X"}:
            digits = value[2:]
            data = bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
        elif value[:2] in {"0b", "0B"}:
            data = base64.b64decode(value[2:], validate=True)
        else:
            data = b""
    except (ValueError, binascii.Error):
        data = b""
    if not 1 <= len(data) <= _BINARY_MAX:
        raise PduError("a binary value that is none")
    return data


def encode_binary(data: bytes) -> str:
    """As ``decode_binary`` reads it."""
    return "0x" + data.hex()


@dataclass(frozen=True, slots=True)
class Parameters:
    """What both sides agreed on. Sizes in bytes."""

    header_digest: bool = False
    data_digest: bool = False
    #: Most bytes of data in a PDU that the target takes from us.
    send_max: int = 8192


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of the table: what we offer, and which answers are legal."""

    offer: str
    low: int = 0
    high: int = 0
    words: tuple[str, ...] = ()
    in_discovery: bool = False
    #: Each side says its own number: there is no answer to check against the offer.
    declared: bool = False
    #: An answer must be no more (minimum) or no less (maximum) than what was offered; 0: no such rule.
    direction: int = 0

    def check(self, name: str, value: str) -> None:
        if self.words:
            if value not in self.words:
                raise PduError(f"an answer to {name} that was not offered")
            return
        number = _number(name, value)
        if not self.low <= number <= self.high:
            raise PduError(f"{name} out of range")
        if not self.declared and (number - int(self.offer)) * self.direction < 0:
            raise PduError(f"an answer to {name} beyond the offer")


def _number(name: str, value: str) -> int:
    if _NUMBER.fullmatch(value) is None:
        raise PduError(f"{name} is not a number")
    return int(value, 16) if value[:2] in {"0x", "0X"} else int(value)


_MINIMUM: Final = -1
_MAXIMUM: Final = 1


def _table(receive_max: int, burst_max: int) -> dict[str, _Key]:
    """What is offered, by name. We never write, so what rules writes is set to the plainest."""
    digest = _Key("None,CRC32C", words=("None", "CRC32C"), in_discovery=True)
    low, high = _LENGTHS
    return {
        "HeaderDigest": digest,
        "DataDigest": digest,
        "MaxRecvDataSegmentLength": _Key(
            str(receive_max), low, high, declared=True, in_discovery=True
        ),
        "ErrorRecoveryLevel": _Key("0", 0, 2, direction=_MINIMUM, in_discovery=True),
        "DefaultTime2Wait": _Key("2", 0, 3600, direction=_MAXIMUM, in_discovery=True),
        "DefaultTime2Retain": _Key("0", 0, 3600, direction=_MINIMUM, in_discovery=True),
        "InitialR2T": _Key("Yes", words=("Yes",)),
        "ImmediateData": _Key("No", words=("No",)),
        "MaxBurstLength": _Key(str(burst_max), low, high, direction=_MINIMUM),
        "MaxConnections": _Key("1", 1, 65535, direction=_MINIMUM),
        "MaxOutstandingR2T": _Key("1", 1, 65535, direction=_MINIMUM),
        "DataPDUInOrder": _Key("Yes", words=("Yes",)),
        "DataSequenceInOrder": _Key("Yes", words=("Yes",)),
    }


#: What a target says of itself, which needs no answer.
_DECLARED_BY_TARGET: Final = frozenset({"TargetAlias", "TargetPortalGroupTag", "TargetAddress"})
#: Answers to what a target may propose and we do not. FirstBurstLength has no meaning without immediate data.
_ANSWERS: Final = {"FirstBurstLength": "Irrelevant", "IFMarker": "No", "OFMarker": "No"}


class Negotiation:
    """One login's operational negotiation: what is offered, the answers, and what we answer in turn."""

    def __init__(self, *, discovery: bool, receive_max: int, burst_max: int) -> None:
        table = _table(receive_max, burst_max)
        self._offered = {
            name: key for name, key in table.items() if key.in_discovery or not discovery
        }
        self._answers: dict[str, str] = {}
        self._replied: set[str] = set()

    def offers(self) -> list[tuple[str, str]]:
        """What we ask for."""
        return [(name, key.offer) for name, key in self._offered.items()]

    def take(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Check the target's keys; the result is what has to be answered. Raises PduError."""
        replies = []
        for name, value in pairs:
            key = self._offered.get(name)
            if key is not None:
                self._take_answer(name, key, value)
            elif name not in _DECLARED_BY_TARGET:
                if name in self._replied:
                    raise PduError("a key negotiated twice")
                self._replied.add(name)
                if value not in {"NotUnderstood", "Irrelevant", "Reject"}:
                    replies.append((name, _ANSWERS.get(name, "NotUnderstood")))
        return replies

    def _take_answer(self, name: str, key: _Key, value: str) -> None:
        if name in self._answers:
            raise PduError(f"a second answer to {name}")
        if value == "Reject":
            raise PduError(f"a rejection of {name}")
        if value not in {"NotUnderstood", "Irrelevant"}:
            key.check(name, value)
        self._answers[name] = value

    def result(self) -> Parameters:
        """What holds from now on; what the target did not answer has its default."""
        send_max = self._answers.get("MaxRecvDataSegmentLength", "")
        return Parameters(
            header_digest=self._answers.get("HeaderDigest") == "CRC32C",
            data_digest=self._answers.get("DataDigest") == "CRC32C",
            send_max=_number("", send_max) if _NUMBER.fullmatch(send_max) else 8192,
        )


__all__ = [
    "TEXT_MAX",
    "Negotiation",
    "Parameters",
    "decode_binary",
    "decode_text",
    "encode_binary",
    "encode_text",
]
