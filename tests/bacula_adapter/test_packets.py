# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bytes to packets and back, wherever they are cut; and what is no packet."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend.packets import (
    PAYLOAD_MAX,
    TEXT_MAX,
    Packet,
    PacketReader,
    ProtocolError,
    encode,
    header,
)

packets = st.one_of(
    st.builds(Packet, st.sampled_from("CDEAQWIB"), st.binary(max_size=300)),
    st.builds(Packet, st.sampled_from("FTK")),
)


def read(*chunks: bytes) -> list[Packet]:
    reader = PacketReader()
    return [packet for chunk in chunks for packet in reader.feed(chunk)]


@given(st.lists(packets, max_size=8), st.lists(st.integers(0, 3000), max_size=12))
def test_what_is_encoded_is_read_wherever_it_is_cut(given: list[Packet], cuts: list[int]) -> None:
    data = b"".join(encode(packet.status, packet.payload) for packet in given)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert read(*(data[a:b] for a, b in itertools.pairwise(places))) == given


@given(st.lists(packets, min_size=1, max_size=4))
def test_reading_what_is_wanted_copies_nothing_and_never_reads_too_far(given: list[Packet]) -> None:
    data = b"".join(encode(packet.status, packet.payload) for packet in given)
    reader, found, at = PacketReader(), list[Packet](), 0
    while at < len(data):
        assert reader.between == (data[at:] in endings(given))
        chunk = data[at : at + reader.wanted]
        at += len(chunk)
        for packet in reader.feed(chunk):
            assert not packet.payload or packet.payload is chunk
            found.append(packet)
    assert found == given
    assert reader.between


def endings(given: list[Packet]) -> set[bytes]:
    return {
        b"".join(encode(packet.status, packet.payload) for packet in given[at:])
        for at in range(len(given))
    }


@given(st.binary(max_size=60))
def test_any_bytes_are_packets_or_an_error(data: bytes) -> None:
    try:
        found = read(data)
    except ProtocolError as error:
        assert str(error).isprintable()  # noqa: PT017 - either is fine
        return
    assert data.startswith(b"".join(encode(packet.status, packet.payload) for packet in found))


@pytest.mark.parametrize(
    "head",
    [
        b"X000000\n", b"c000000\n", bytes(1) + b"000000\n", b"C00000a\n", b"C 00001\n", b"C+00001\n", b"C-00001\n",
        b"C1_0000\n", b"C000000\r", b"C0000000", b"C000000 ", b"F000001\n", b"T000010\n", b"K000001\n",
        b"GET / HT",
    ],
)  # fmt: skip
def test_what_is_no_header_is_refused(head: bytes) -> None:
    with pytest.raises(
        ProtocolError, match=r"^(what should be a packet begins with|a packet [FTK] with)"
    ):
        read(head)


def test_the_longest_packet() -> None:
    (packet,) = read(b"D999999\n", bytes(PAYLOAD_MAX))
    assert len(packet.payload) == PAYLOAD_MAX
    assert header("D", PAYLOAD_MAX) == b"D999999\n"
    with pytest.raises(AssertionError):
        header("D", PAYLOAD_MAX + 1)


@pytest.mark.parametrize(
    ("payload", "text"),
    [(b"Hello\n", "Hello"), (b"a b \t\r\n", "a b"), (b"", ""), (" é\n".encode(), " é")],
)
def test_text(payload: bytes, text: str) -> None:
    assert Packet("C", payload).text() == text


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\xff\n", "a packet C is not UTF-8"),
        (b"a\nb\n", "a packet C is not one line"),
        (b"a\0b", "a packet C is not one line"),
        (bytes(TEXT_MAX + 1), "too long for text"),
    ],
)
def test_what_is_no_text(payload: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(why)):
        Packet("C", payload).text()
