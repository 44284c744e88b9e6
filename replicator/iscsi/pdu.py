# SPDX-License-Identifier: AGPL-3.0-or-later
"""iSCSI's messages (RFC 7143, chapter 11): what an initiator that reads sends, and what it can be sent. No I/O.

Requests are built by functions that return whole PDUs without digests. What comes in is decoded from its 48 bytes of
header into one of eleven types; the data segment that follows is the caller's to receive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final, NamedTuple

HEADER_SIZE: Final = 48
#: "No task": the tag that stands for none.
NO_TAG: Final = 0xFFFFFFFF
#: Bits of a login's flags.
TRANSIT: Final = 0x80
CONTINUE: Final = 0x40
_FINAL: Final = 0x80
_IMMEDIATE: Final = 0x40
_LAYOUT: Final = struct.Struct(">4BI8s8I")


class PduError(ValueError):
    """What was received breaks RFC 7143. The text says how, and holds nothing that the peer wrote."""


class Opcode(IntEnum):
    """The low six bits of a PDU's first byte."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_REQUEST = 0x02
    LOGIN_REQUEST = 0x03
    TEXT_REQUEST = 0x04
    LOGOUT_REQUEST = 0x06
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    READY_TO_TRANSFER = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


class LoginResponse(NamedTuple):
    """``status``: class and detail, 0 for success."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    transit: bool
    more: bool
    stage: int
    next_stage: int
    version: int
    isid: bytes
    tsih: int
    status: int


class TextResponse(NamedTuple):
    """``final``: the last of an exchange; ``ttt`` is what a continuation is asked with."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    final: bool
    more: bool
    ttt: int
    lun: bytes


class ScsiResponse(NamedTuple):
    """``residual`` is negative where the target had more than was asked for (overflow)."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    response: int
    status: int
    residual: int


class DataIn(NamedTuple):
    """A piece of what was asked for. ``status`` is None unless this PDU ends the command."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    status: int | None
    data_sn: int
    offset: int
    residual: int


class NopIn(NamedTuple):
    """A ping; it wants an answer if ``ttt`` is a tag."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    ttt: int
    lun: bytes


class TaskResponse(NamedTuple):
    """The answer to ``abort_task``; 0: done, 1: no such task."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    response: int


class LogoutResponse(NamedTuple):
    """The answer to ``logout``."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    response: int


class ReadyToTransfer(NamedTuple):
    """The target wants data: never in answer to what we send."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int


class AsyncMessage(NamedTuple):
    """Something that the target says by itself; ``event`` as in RFC 7143, 11.9.1."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    event: int


class Reject(NamedTuple):
    """The target did not understand a PDU, whose header follows as data."""

    data_length: int
    itt: int
    stat_sn: int
    exp_cmd_sn: int
    max_cmd_sn: int
    reason: int


Pdu = (
    LoginResponse
    | TextResponse
    | ScsiResponse
    | DataIn
    | NopIn
    | TaskResponse
    | LogoutResponse
    | ReadyToTransfer
    | AsyncMessage
    | Reject
)

_Fields = tuple[int, int, int, int, int, bytes, int, int, int, int, int, int, int, int]


def decode(header: bytes | bytearray | memoryview) -> Pdu:
    """The PDU of a header of 48 bytes. Raises PduError for anything that a target does not send to an initiator."""
    fields: _Fields = _LAYOUT.unpack(header)
    make = _DECODERS.get(fields[0] & 0x3F)
    if make is None or fields[0] & 0xC0:
        raise PduError(f"a PDU of type 0x{fields[0]:02x} from a target")
    if fields[4] >> 24:
        raise PduError("an additional header segment from a target")
    return make(fields)


def _login_response(f: _Fields) -> LoginResponse:
    flags = f[1]
    if flags & TRANSIT and flags & CONTINUE:
        raise PduError("a login response that both goes on and moves on")
    return LoginResponse(
        data_length=f[4],
        itt=f[6],
        stat_sn=f[8],
        exp_cmd_sn=f[9],
        max_cmd_sn=f[10],
        transit=bool(flags & TRANSIT),
        more=bool(flags & CONTINUE),
        stage=flags >> 2 & 3,
        next_stage=flags & 3,
        version=f[3],
        isid=f[5][:6],
        tsih=int.from_bytes(f[5][6:], "big"),
        status=f[11] >> 16,
    )


def _text_response(f: _Fields) -> TextResponse:
    final, more = bool(f[1] & _FINAL), bool(f[1] & CONTINUE)
    if final and (more or f[7] != NO_TAG):
        raise PduError("a final text response that asks for more")
    return TextResponse(f[4], f[6], f[8], f[9], f[10], final, more, f[7], f[5])


def _residual(flags: int, count: int) -> int:
    if flags & 0x06 == 0x06:
        raise PduError("a residual count that is both too much and too little")
    if flags & 0x02:
        return count
    return -count if flags & 0x04 else 0


def _scsi_response(f: _Fields) -> ScsiResponse:
    return ScsiResponse(f[4], f[6], f[8], f[9], f[10], f[2], f[3], _residual(f[1], f[13]))


def _data_in(f: _Fields) -> DataIn:
    ends = f[1] & 0x01
    if ends and not f[1] & _FINAL:
        raise PduError("data with a status that is not the last")
    residual = _residual(f[1], f[13]) if ends else 0
    return DataIn(f[4], f[6], f[8], f[9], f[10], f[3] if ends else None, f[11], f[12], residual)


def _nop_in(f: _Fields) -> NopIn:
    return NopIn(f[4], f[6], f[8], f[9], f[10], f[7], f[5])


def _task_response(f: _Fields) -> TaskResponse:
    return TaskResponse(f[4], f[6], f[8], f[9], f[10], f[2])


def _logout_response(f: _Fields) -> LogoutResponse:
    return LogoutResponse(f[4], f[6], f[8], f[9], f[10], f[2])


def _ready_to_transfer(f: _Fields) -> ReadyToTransfer:
    return ReadyToTransfer(f[4], f[6], f[8], f[9], f[10])


def _async_message(f: _Fields) -> AsyncMessage:
    return AsyncMessage(f[4], f[6], f[8], f[9], f[10], f[11] >> 24)


def _reject(f: _Fields) -> Reject:
    return Reject(f[4], f[6], f[8], f[9], f[10], f[2])


_DECODERS: Final[dict[int, Callable[[_Fields], Pdu]]] = {
    Opcode.LOGIN_RESPONSE: _login_response,
    Opcode.TEXT_RESPONSE: _text_response,
    Opcode.SCSI_RESPONSE: _scsi_response,
    Opcode.DATA_IN: _data_in,
    Opcode.NOP_IN: _nop_in,
    Opcode.TASK_RESPONSE: _task_response,
    Opcode.LOGOUT_RESPONSE: _logout_response,
    Opcode.READY_TO_TRANSFER: _ready_to_transfer,
    Opcode.ASYNC_MESSAGE: _async_message,
    Opcode.REJECT: _reject,
}


def login_request(
    *, isid: bytes, itt: int, flags: int, cmd_sn: int, exp_stat_sn: int, data: bytes
) -> bytes:
    """A login request of a new session's first connection. ``flags``: TRANSIT, CONTINUE and the two stages."""
    first = Opcode.LOGIN_REQUEST | _IMMEDIATE
    header = _LAYOUT.pack(
        first, flags, 0, 0, len(data), isid + b"\0\0", itt, 0, cmd_sn, exp_stat_sn, 0, 0, 0, 0
    )
    return header + data + bytes(-len(data) % 4)


def text_request(
    *, itt: int, ttt: int, lun: bytes, cmd_sn: int, exp_stat_sn: int, data: bytes
) -> bytes:
    """A text request; with a target's tag it asks for the next part of an answer."""
    header = _LAYOUT.pack(
        Opcode.TEXT_REQUEST, _FINAL, 0, 0, len(data), lun, itt, ttt, cmd_sn, exp_stat_sn, 0, 0, 0, 0
    )
    return header + data + bytes(-len(data) % 4)


def scsi_read(
    *, lun: bytes, itt: int, expected: int, cmd_sn: int, exp_stat_sn: int, cdb: bytes
) -> bytes:
    """A SCSI command that brings up to ``expected`` bytes (0: none) to the initiator; simple task attribute."""
    words = struct.unpack(">4I", cdb.ljust(16, b"\0"))
    flags = _FINAL | 0x01 | (0x40 if expected else 0)
    return _LAYOUT.pack(
        Opcode.SCSI_COMMAND, flags, 0, 0, 0, lun, itt, expected, cmd_sn, exp_stat_sn, *words
    )


def abort_task(
    *, lun: bytes, itt: int, task: int, task_cmd_sn: int, cmd_sn: int, exp_stat_sn: int
) -> bytes:
    """Task management: give up the task with the tag ``task``. Immediate: it needs no room in the window."""
    first = Opcode.TASK_REQUEST | _IMMEDIATE
    return _LAYOUT.pack(
        first, _FINAL | 1, 0, 0, 0, lun, itt, task, cmd_sn, exp_stat_sn, task_cmd_sn, 0, 0, 0
    )


def nop_out(*, lun: bytes, ttt: int, cmd_sn: int, exp_stat_sn: int) -> bytes:
    """The answer to a target's ping."""
    first = Opcode.NOP_OUT | _IMMEDIATE
    return _LAYOUT.pack(first, _FINAL, 0, 0, 0, lun, NO_TAG, ttt, cmd_sn, exp_stat_sn, 0, 0, 0, 0)


def logout(*, itt: int, cmd_sn: int, exp_stat_sn: int) -> bytes:
    """End the session."""
    first = Opcode.LOGOUT_REQUEST | _IMMEDIATE
    return _LAYOUT.pack(first, _FINAL, 0, 0, 0, bytes(8), itt, 0, cmd_sn, exp_stat_sn, 0, 0, 0, 0)


def after(a: int, b: int) -> bool:
    """Whether ``a`` comes after ``b`` in the circle of 32-bit numbers (RFC 1982)."""
    return a != b and (a - b) & 0xFFFFFFFF < 1 << 31


__all__ = [
    "CONTINUE",
    "HEADER_SIZE",
    "NO_TAG",
    "TRANSIT",
    "AsyncMessage",
    "DataIn",
    "LoginResponse",
    "LogoutResponse",
    "NopIn",
    "Opcode",
    "Pdu",
    "PduError",
    "ReadyToTransfer",
    "Reject",
    "ScsiResponse",
    "TaskResponse",
    "TextResponse",
    "abort_task",
    "after",
    "decode",
    "login_request",
    "logout",
    "nop_out",
    "scsi_read",
    "text_request",
]
