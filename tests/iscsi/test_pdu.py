# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bytes to PDUs and back; whatever comes, the only error is PduError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.iscsi import pdu
from replicator.iscsi.pdu import NO_TAG, DataIn, LoginResponse, PduError, ScsiResponse, TextResponse
from tests.iscsi.fake_target import LAYOUT
from tests.iscsi.fake_target import pdu as raw

WORDS = (11, 12, 13, 14, 15, 16, 17)


@given(st.binary(min_size=48, max_size=48))
def test_any_header_is_a_pdu_or_a_pdu_error(header: bytes) -> None:
    try:
        unit = pdu.decode(header)
    except PduError:
        return
    assert 0 <= unit.data_length < 1 << 24


@given(
    st.sampled_from([0x20, 0x21, 0x22, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3F]),
    st.binary(min_size=47, max_size=47),
)
def test_every_kind_takes_its_numbers_from_the_same_place(opcode: int, rest: bytes) -> None:
    header = bytes([opcode]) + rest
    try:
        unit = pdu.decode(header)
    except PduError:
        return
    fields = LAYOUT.unpack(header)
    assert unit[1:5] == (fields[6], fields[8], fields[9], fields[10])


def test_a_login_response() -> None:
    header = raw(0x23, flags=0x87, lun=b"abcdef\0\x09", itt=3, words=(0, 1, 2, 3, 0x01020000))
    assert pdu.decode(header[:48]) == LoginResponse(
        0, 3, 1, 2, 3, True, False, 1, 3, 0, b"abcdef", 9, 0x0102
    )


def test_a_text_response_that_goes_on() -> None:
    header = raw(0x24, flags=0x40, lun=b"12345678", itt=3, words=(77, 1, 2, 3), length=5)
    assert pdu.decode(header[:48]) == TextResponse(5, 3, 1, 2, 3, False, True, 77, b"12345678")


@pytest.mark.parametrize(("flags", "residual"), [(0x80, 0), (0x82, 17), (0x84, -17)])
def test_a_scsi_response(flags: int, residual: int) -> None:
    header = raw(0x21, flags=flags, byte2=1, byte3=2, itt=3, words=WORDS)
    assert pdu.decode(header) == ScsiResponse(0, 3, 12, 13, 14, 1, 2, residual)


def test_data_with_and_without_a_status() -> None:
    with_status = raw(0x25, flags=0x83, byte3=8, itt=3, words=WORDS, length=9)
    assert pdu.decode(with_status) == DataIn(9, 3, 12, 13, 14, 8, 15, 16, 17)
    without = raw(0x25, flags=0x80, byte3=8, itt=3, words=WORDS, length=9)
    assert pdu.decode(without) == DataIn(9, 3, 12, 13, 14, None, 15, 16, 0)


@pytest.mark.parametrize(
    "header",
    [
        raw(0x01),  # of an initiator
        raw(0x27),  # of nobody
        raw(0x63),  # the immediate bit, which targets do not set
        bytes([0x21, 0x80, 0, 0, 1]) + bytes(43),  # an additional header segment
        raw(0x23, flags=0xC0),
        raw(0x24, flags=0xC0, words=(NO_TAG,)),
        raw(0x24, flags=0x80, words=(5,)),
        raw(0x21, flags=0x86),
        raw(0x25, flags=0x01),
    ],
)
def test_what_no_target_sends_is_refused(header: bytes) -> None:
    with pytest.raises(PduError):
        pdu.decode(header)


def test_requests_are_whole_pdus() -> None:
    request = pdu.login_request(
        isid=b"abcdef", itt=1, flags=0x81, cmd_sn=2, exp_stat_sn=3, data=b"key=v\0"
    )
    assert len(request) == 48 + 8
    assert LAYOUT.unpack(request[:48])[:9] == (0x43, 0x81, 0, 0, 6, b"abcdef\0\0", 1, 0, 2)
    read = pdu.scsi_read(
        lun=bytes(8), itt=1, expected=512, cmd_sn=2, exp_stat_sn=3, cdb=bytes(range(16))
    )
    assert (read[0], read[1], read[32:]) == (0x01, 0xC1, bytes(range(16)))
    nothing = pdu.scsi_read(lun=bytes(8), itt=1, expected=0, cmd_sn=2, exp_stat_sn=3, cdb=bytes(6))
    assert (nothing[1], len(nothing)) == (0x81, 48)


@given(st.integers(0, NO_TAG), st.integers(1, (1 << 31) - 1))
def test_serial_numbers_go_round(number: int, step: int) -> None:
    later = (number + step) & NO_TAG
    assert pdu.after(later, number)
    assert not pdu.after(number, later)
    assert not pdu.after(number, number)
