# SPDX-License-Identifier: AGPL-3.0-or-later
"""Frames: what was sealed comes out, and nothing else does."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import WireError
from replicator.wire import frames
from replicator.wire.frames import (
    HEAD_BYTES,
    NEED_DATA,
    PAYLOAD_BYTES_MAX,
    Close,
    CutError,
    Data,
    FrameError,
    FrameOpener,
    FrameSealer,
)

KEY = hashlib.sha256(b"client to server").digest()
OTHER_KEY = hashlib.sha256(b"another direction or session").digest()


def sealed(payloads: list[bytes], *, close: bool = True, key: bytes = KEY) -> list[bytes]:
    sealer = FrameSealer(key)
    whole = [sealer.seal(payload) + payload for payload in payloads]
    return [*whole, sealer.seal_close()] if close else whole


def events(opener: FrameOpener, data: bytes) -> list[Data | Close]:
    opener.receive_data(data)
    found: list[Data | Close] = []
    while not isinstance(event := opener.next_event(), frames.NeedData):
        found.append(event)
    return found


def collect(opener: FrameOpener, data: bytes, found: list[Data | Close]) -> None:
    """Take events, then the end of bytes, until an error."""
    opener.receive_data(data)
    while not isinstance(event := opener.next_event(), frames.NeedData):
        found.append(event)
    opener.receive_eof()


def refused(data: bytes) -> tuple[list[Data | Close], WireError]:
    """What is handed up of bytes that must be refused, and the error, which must be for ever."""
    opener = FrameOpener(KEY)
    found: list[Data | Close] = []
    with pytest.raises(FrameError) as caught:
        collect(opener, data, found)
    with pytest.raises(FrameError) as again:
        opener.next_event()
    assert again.value is caught.value
    assert opener.buffered_bytes <= HEAD_BYTES
    assert KEY.hex() not in repr(caught.value)
    return found, caught.value


payload_lists = st.lists(st.binary(min_size=1, max_size=300), max_size=6)


@given(payloads=payload_lists, cuts=st.lists(st.integers(0, 2000), max_size=12))
def test_what_was_sealed_comes_out_however_the_bytes_are_split(
    payloads: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(sealed(payloads))
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    opener = FrameOpener(KEY)
    found: list[Data | Close] = []
    for start, end in itertools.pairwise(marks):
        found += events(opener, stream[start:end])
    assert found == [*(Data(bytearray(payload)) for payload in payloads), Close()]
    opener.receive_eof()
    assert opener.buffered_bytes == 0
    assert not opener.inside_frame


def test_the_greatest_payload_passes_in_small_pieces_without_being_held_twice() -> None:
    payload = hashlib.shake_256(b"x").digest(PAYLOAD_BYTES_MAX)
    stream = sealed([payload], close=False)[0]
    opener = FrameOpener(KEY)
    found: list[Data | Close] = []
    for start in range(0, len(stream), 4096):
        found += events(opener, stream[start : start + 4096])
        assert opener.buffered_bytes <= min(start + 4096, len(stream))
    assert found == [Data(bytearray(payload))]


def test_the_payload_is_not_copied_into_the_head() -> None:
    assert len(FrameSealer(KEY).seal(bytes(PAYLOAD_BYTES_MAX))) == HEAD_BYTES == 37


@pytest.mark.parametrize("size", [0, PAYLOAD_BYTES_MAX + 1])
def test_a_payload_out_of_bounds_is_not_sealed(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        FrameSealer(KEY).seal(bytes(size))


def test_nothing_is_sealed_after_the_close() -> None:
    sealer = FrameSealer(KEY)
    sealer.seal_close()
    with pytest.raises(RuntimeError):
        sealer.seal(b"x")
    with pytest.raises(RuntimeError):
        sealer.seal_close()


def test_feeding_before_taking_the_events_is_a_bug_of_the_caller() -> None:
    opener = FrameOpener(KEY)
    opener.receive_data(b"ab")
    with pytest.raises(RuntimeError):
        opener.receive_data(b"c")


@pytest.mark.parametrize(
    "header",
    [
        b"\x00\x10\x00\x01\x01",  # 1 MiB and a byte
        b"\xff\xff\xff\xff\x01",
        b"\x00\x00\x00\x00\x01",  # data without bytes: no progress
        b"\x00\x00\x00\x01\x02",  # close with a body
        b"\x00\x00\x00\x01\x00",
        b"\x00\x00\x00\x01\x03",
        b"RPLW\x04",  # an alert of the handshake
    ],
)
def test_a_header_out_of_bounds_is_refused_before_its_payload_is_waited_for(header: bytes) -> None:
    assert refused(header.ljust(HEAD_BYTES, b"\0"))[0] == []


def test_a_great_length_alone_makes_nothing_grow() -> None:
    opener = FrameOpener(KEY)
    assert events(opener, b"\x00\x10\x00\x00\x01".ljust(HEAD_BYTES, b"\0")) == []
    assert opener.inside_frame
    assert opener.buffered_bytes == HEAD_BYTES


def test_every_turned_bit_is_found_before_anything_of_its_frame_is_handed_up() -> None:
    pieces = sealed([b"first", b"second"])
    stream = b"".join(pieces)
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    good: list[Data | Close] = [Data(bytearray(b"first")), Data(bytearray(b"second")), Close()]
    for bit in range(len(stream) * 8):
        turned = bytearray(stream)
        turned[bit // 8] ^= 1 << bit % 8
        before = sum(bit // 8 >= end for end in ends)
        found: list[Data | Close] = []
        # Either it is refused, or (a greater length) still waited for; then the end of bytes is.
        with pytest.raises((FrameError, CutError)):
            collect(FrameOpener(KEY), bytes(turned), found)
        assert found == good[:before]


def test_a_stream_cut_at_any_byte_is_a_cut() -> None:
    stream = b"".join(sealed([b"first", b"second"]))
    for cut in range(len(stream)):
        opener = FrameOpener(KEY)
        found = events(opener, stream[:cut])
        assert found == [Data(bytearray(b"first")), Data(bytearray(b"second"))][: len(found)]
        with pytest.raises(CutError):
            opener.receive_eof()
        with pytest.raises(CutError):
            opener.next_event()


def test_frames_swapped_repeated_left_out_or_put_in_are_refused() -> None:
    one, two, three, close = sealed([b"same", b"same", b"other"])
    first: list[Data | Close] = [Data(bytearray(b"same"))]
    assert refused(two + one)[0] == []
    assert refused(one + one)[0] == first
    assert refused(one + three)[0] == first
    assert refused(one + close)[0] == first
    assert refused(one + sealed([b"x", b"y"], key=OTHER_KEY)[1])[0] == first


def test_frames_of_the_other_direction_or_another_session_are_refused() -> None:
    assert refused(sealed([b"reflected"], key=OTHER_KEY)[0])[0] == []
    assert refused(sealed([], key=OTHER_KEY)[0])[0] == []


def test_bytes_after_the_close_are_refused() -> None:
    assert refused(b"".join(sealed([])) + b"x")[0] == [Close()]


def test_the_last_frame_number_is_used_and_none_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # A session of 2**64 frames cannot be made; the bound is brought near instead.
    many = sealed([b"1", b"2"], close=True)
    monkeypatch.setattr(frames, "SEQUENCE_MAX", 1)
    sealer = FrameSealer(KEY)
    assert [sealer.seal(b"1") + b"1", sealer.seal(b"2") + b"2"] == many[:2]
    with pytest.raises(WireError, match="used up"):
        sealer.seal(b"3")
    found, error = refused(b"".join(many))
    assert found == [Data(bytearray(b"1")), Data(bytearray(b"2"))]
    assert "used up" in str(error)


def test_the_bound_on_frame_numbers_is_what_the_field_holds() -> None:
    assert frames.SEQUENCE_MAX == 2**64 - 1


@given(
    honest=payload_lists,
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=400),
            st.builds(
                lambda length, kind, rest: length.to_bytes(4) + bytes([kind]) + rest,
                st.integers(0, PAYLOAD_BYTES_MAX + 2),
                st.integers(0, 3),
                st.binary(max_size=400),
            ),
        ),
        max_size=8,
    ),
)
def test_random_bytes_after_honest_frames_hand_up_nothing_and_keep_nothing_beyond_the_bound(
    honest: list[bytes], pieces: list[bytes]
) -> None:
    opener = FrameOpener(KEY)
    assert len(events(opener, b"".join(sealed(honest, close=False)))) == len(honest)
    fed = 0
    try:
        for piece in pieces:
            fed += len(piece)
            opener.receive_data(piece)
            assert opener.next_event() is NEED_DATA
            assert opener.buffered_bytes <= min(fed, HEAD_BYTES + PAYLOAD_BYTES_MAX)
    except FrameError:
        assert opener.buffered_bytes <= HEAD_BYTES
