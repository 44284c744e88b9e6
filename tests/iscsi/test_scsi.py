# SPDX-License-Identifier: AGPL-3.0-or-later
"""SCSI answers and sense data: what targets say, and what is refused of it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.iscsi import scsi
from replicator.iscsi.errors import BusyError, LunGoneError, MediumError, ScsiError
from replicator.iscsi.sense import Sense, failure, parse_sense, sense_of_response


@given(st.integers(0, 16383))
def test_luns_go_there_and_back(number: int) -> None:
    assert scsi.decode_lun(scsi.encode_lun(number)) == number


def test_luns_out_of_range_and_of_several_levels() -> None:
    for number in (-1, 16384):
        with pytest.raises(ValueError, match="LUN"):
            scsi.encode_lun(number)
    assert scsi.decode_lun(bytes([0, 1, 0, 1, 0, 0, 0, 0])) is None
    assert scsi.decode_lun(bytes([0xC1]) + bytes(7)) is None


def test_commands() -> None:
    assert scsi.read(5, 16) == bytes([0x88, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 16, 0, 0])
    assert scsi.inquiry(0x83) == bytes([0x12, 1, 0x83, 0x10, 0, 0])
    assert scsi.inquiry() == bytes([0x12, 0, 0, 0x10, 0, 0])
    assert len(scsi.report_luns()) == 12
    assert scsi.read_capacity()[:2] == bytes([0x9E, 0x10])
    assert scsi.get_lba_status(9)[:10] == bytes([0x9E, 0x12, 0, 0, 0, 0, 0, 0, 0, 9])


def test_capacity() -> None:
    answer = struct.pack(">QIBBBB16x", 99, 4096, 0, 0, 0xC0, 0)
    assert scsi.parse_capacity(answer) == scsi.Capacity(100, 4096, thin=True, zeroes=True)
    for last, size in ((99, 0), (99, 513), (99, 1 << 31), ((1 << 64) - 1, 512)):
        with pytest.raises(ValueError, match="READ CAPACITY"):
            scsi.parse_capacity(struct.pack(">QI20x", last, size))


def designator(association: int, kind: int, body: bytes) -> bytes:
    return bytes([1, association << 4 | kind, 0, len(body)]) + body


def test_identifiers_are_those_of_the_unit() -> None:
    page = designator(0, 3, bytes.fromhex("600140512345678a")) + designator(1, 3, bytes(range(8)))
    page += designator(0, 1, b"NUTANIX disk-1 ") + designator(0, 2, bytes(range(8)))
    page += designator(0, 8, b"iqn.x\0\0") + designator(0, 3, bytes(8))
    answer = struct.pack(">BBH", 0, 0x83, len(page)) + page
    assert scsi.parse_identifiers(answer) == (
        "naa.600140512345678a",
        "t10.NUTANIX disk-1",
        "eui.0001020304050607",
        "name.iqn.x",
    )


def runs(*found: tuple[int, int, int]) -> bytes:
    body = b"".join(struct.pack(">QIB3x", *each) for each in found)
    return struct.pack(">I4x", len(body) + 4) + body


def test_lba_status_is_clipped_to_the_disk() -> None:
    answer = runs((10, 10, 0), (20, 100, 1), (120, 5, 0))
    assert scsi.parse_lba_status(answer, 15, 50) == [
        scsi.LbaStatus(15, 5, mapped=True),
        scsi.LbaStatus(20, 30, mapped=False),
    ]


def test_only_what_is_surely_unmapped_is_called_so() -> None:
    answer = runs(*((at, 1, at) for at in range(16)))
    mapped = [run.lba for run in scsi.parse_lba_status(answer, 0, 16) if run.mapped]
    assert mapped == [0, *range(3, 16)]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        runs(),
        runs((16, 10, 0)),  # begins after what was asked for
        runs((15, 0, 0)),  # nothing: asked again it would not end
        runs((5, 10, 0)),  # ends before it
        runs((15, 5, 0), (21, 5, 0)),  # a gap
        runs((15, 5, 0), (18, 5, 0)),  # an overlap
    ],
)
def test_lba_status_that_leads_nowhere(answer: bytes) -> None:
    with pytest.raises(ValueError, match="GET LBA STATUS"):
        scsi.parse_lba_status(answer, 15, 1000)


@pytest.mark.parametrize(
    "parse",
    [
        scsi.parse_luns,
        scsi.is_disk,
        scsi.parse_capacity,
        scsi.parse_serial,
        scsi.parse_identifiers,
        scsi.parse_transfer_max,
        lambda data: scsi.parse_lba_status(data, 3, 1000),
    ],
)
def test_any_answer_is_parsed_or_a_value_error(parse: Callable[[bytes], object]) -> None:
    @given(st.binary(max_size=80))
    def check(data: bytes) -> None:
        try:
            parse(data)
        except ValueError:
            return

    check()


@given(st.binary(max_size=40))
def test_any_sense_is_parsed(data: bytes) -> None:
    sense = parse_sense(sense_of_response(data))
    assert 0 <= sense.key < 16


def test_sense_in_both_formats() -> None:
    fixed = bytes([0xF0, 0, 3, 0, 0, 0, 77, 10, 0, 0, 0, 0, 0x11, 0])
    assert parse_sense(fixed) == Sense(3, 0x11, 0, 77)
    assert parse_sense(bytes([0x70]) + fixed[1:]) == Sense(3, 0x11, 0, None)
    descriptor = bytes([0x72, 3, 0x11, 4, 0, 0, 0, 12, 0, 10, 0x80, 0]) + (1 << 40).to_bytes(
        8, "big"
    )
    assert parse_sense(descriptor) == Sense(3, 0x11, 4, 1 << 40)
    assert parse_sense(b"") == Sense()
    assert parse_sense(fixed[:3]) == Sense(3, 0, 0, None)


@pytest.mark.parametrize(
    ("status", "sense", "kind", "words"),
    [
        (2, Sense(3, 0x11, 0, 77), MediumError, "block 77.*unrecovered"),
        (2, Sense(3, 0x11, 0), MediumError, "block 5:"),
        (2, Sense(5, 0x25, 0), LunGoneError, "no such logical unit"),
        (2, Sense(6, 0x29, 0), ScsiError, "unit attention 6/0x2900"),
        (2, Sense(), ScsiError, "no sense"),
        (8, Sense(), BusyError, "busy"),
        (0x28, Sense(), BusyError, "queue is full"),
        (0x18, Sense(), ScsiError, "reservation"),
        (0xEE, Sense(), ScsiError, "0xee"),
    ],
)
def test_failures(status: int, sense: Sense, kind: type[ScsiError], words: str) -> None:
    error = failure("the target", "READ(16)", status, sense, 5)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error
    assert error.is_reset == (sense.key == 6)
