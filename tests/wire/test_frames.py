# SPDX-License-Identifier: AGPL-3.0-or-later
"""Frames, readable and sealed: what was sealed comes out, and nothing else does."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import WireError
from replicator.wire import frames
from replicator.wire.buffers import Buffers
from replicator.wire.frames import (
    HEAD_BYTES,
    MAC_BYTES,
    NEED_DATA,
    PAYLOAD_BYTES_MAX,
    SEAL_BYTES,
    Close,
    CutError,
    Data,
    FrameError,
    FrameOpener,
    FrameSealer,
)

KEY = hashlib.sha256(b"client to server").digest()
OTHER_KEY = hashlib.sha256(b"another direction or session").digest()
both_suites = pytest.mark.parametrize("sealed", [False, True], ids=["readable", "sealed"])


def frames_of(
    payloads: list[bytes], *, sealed: bool, close: bool = True, key: bytes = KEY
) -> list[bytes]:
    sealer = FrameSealer(key, sealed=sealed)
    whole = [bytes(sealer.seal(payload)) for payload in payloads]
    return [*whole, bytes(sealer.seal_close())] if close else whole


def data(payload: bytes) -> Data:
    return Data(memoryview(payload))


def events(opener: FrameOpener, received: bytes) -> list[Data | Close]:
    opener.receive_data(received)
    found: list[Data | Close] = []
    while not isinstance(event := opener.next_event(), frames.NeedData):
        found.append(event)
    return found


def collect(opener: FrameOpener, received: bytes, found: list[Data | Close]) -> None:
    """Take events, then the end of bytes, until an error."""
    opener.receive_data(received)
    while not isinstance(event := opener.next_event(), frames.NeedData):
        found.append(event)
    opener.receive_eof()


def refused(received: bytes, *, sealed: bool) -> tuple[list[Data | Close], WireError]:
    """What is handed up of bytes that must be refused, and the error, which must be for ever."""
    opener = FrameOpener(KEY, sealed=sealed)
    found: list[Data | Close] = []
    with pytest.raises(FrameError) as caught:
        collect(opener, received, found)
    with pytest.raises(FrameError) as again:
        opener.next_event()
    assert again.value is caught.value
    assert opener.buffered_bytes == 0
    assert KEY.hex() not in repr(caught.value)
    return found, caught.value


payload_lists = st.lists(st.binary(min_size=1, max_size=300), max_size=6)


@both_suites
@given(payloads=payload_lists, cuts=st.lists(st.integers(0, 2000), max_size=12))
def test_what_was_sealed_comes_out_however_the_bytes_are_split(
    sealed: bool, payloads: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(frames_of(payloads, sealed=sealed))
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    opener = FrameOpener(KEY, sealed=sealed)
    found: list[Data | Close] = []
    for start, end in itertools.pairwise(marks):
        found += events(opener, stream[start:end])
    assert found == [*map(data, payloads), Close()]
    opener.receive_eof()
    assert opener.buffered_bytes == 0
    assert not opener.inside_frame


@both_suites
@given(pieces=st.lists(st.binary(max_size=5000), min_size=1, max_size=6).filter(any))
def test_the_pieces_of_a_payload_are_joined(sealed: bool, pieces: list[bytes]) -> None:
    frame = bytes(FrameSealer(KEY, sealed=sealed).seal(*pieces))
    assert frame == frames_of([b"".join(pieces)], sealed=sealed, close=False)[0]
    assert events(FrameOpener(KEY, sealed=sealed), frame) == [data(b"".join(pieces))]


@both_suites
def test_the_greatest_payload_passes_in_small_pieces(sealed: bool) -> None:
    payload = hashlib.shake_256(b"x").digest(PAYLOAD_BYTES_MAX)
    stream = frames_of([payload], sealed=sealed, close=False)[0]
    opener = FrameOpener(KEY, sealed=sealed)
    found: list[Data | Close] = []
    for start in range(0, len(stream), 4096):
        found += events(opener, stream[start : start + 4096])
        assert opener.buffered_bytes <= min(start + 4096, len(stream))
    assert found == [data(payload)]


@both_suites
def test_bytes_may_be_put_where_they_belong(sealed: bool) -> None:
    """As a stream does that receives into the opener's own memory."""
    stream = memoryview(b"".join(frames_of([b"first", bytes(9000)], sealed=sealed)))
    opener = FrameOpener(KEY, sealed=sealed)
    found: list[Data | Close] = []
    while stream:
        room = opener.room()
        count = min(len(room), len(stream), 700)
        room[:count], stream = stream[:count], stream[count:]
        opener.took(count)
        while not isinstance(event := opener.next_event(), frames.NeedData):
            found.append(event)
    assert found == [data(b"first"), data(bytes(9000)), Close()]


def test_large_payloads_use_the_same_memory_again_once_it_is_given_back() -> None:
    opener = FrameOpener(KEY, sealed=True, buffers=(pool := Buffers(frames.BUFFER_BYTES)))
    one, two, three = frames_of([bytes([n]) * 50_000 for n in range(3)], sealed=True, close=False)
    (first,) = events(opener, one)
    (second,) = events(opener, two)
    assert isinstance(first, Data)
    assert isinstance(second, Data)
    assert first.payload.obj is not second.payload.obj
    pool.give(first.payload)
    (third,) = events(opener, three)
    assert isinstance(third, Data)
    assert third.payload.obj is first.payload.obj
    assert second == data(bytes([1]) * 50_000)


def test_a_sealed_frame_shows_nothing_of_its_payload_and_a_readable_one_does() -> None:
    secret = b"what is written on the disk"
    assert secret in frames_of([secret], sealed=False)[0]
    first, second, _ = frames_of([secret, secret], sealed=True)
    assert secret not in first
    body = slice(HEAD_BYTES, HEAD_BYTES + len(secret))
    assert first[body] != second[body]
    assert len(first) == HEAD_BYTES + len(secret) + SEAL_BYTES


def test_a_sealed_direction_changes_its_key_and_both_sides_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payloads = [b"%d" % n for n in range(10)]
    one_key = frames_of(payloads, sealed=True)
    monkeypatch.setattr(frames, "FRAMES_PER_KEY", 4)
    many_keys = frames_of(payloads, sealed=True)
    assert [a == b for a, b in zip(one_key, many_keys, strict=True)] == [True] * 4 + [False] * 7
    found = events(FrameOpener(KEY, sealed=True), b"".join(many_keys))
    assert found == [*map(data, payloads), Close()]
    monkeypatch.setattr(frames, "FRAMES_PER_KEY", 1 << 18)
    found = refused(b"".join(many_keys), sealed=True)[0]  # who does not change it reads no further
    assert found == [*map(data, payloads[:4])]


def test_the_key_is_changed_long_before_its_bound() -> None:
    """2^34.5 blocks of AES leave an attacker an advantage of 2^-57 (RFC 8446, 5.5)."""
    blocks = frames.FRAMES_PER_KEY * (PAYLOAD_BYTES_MAX // 16 + 2)
    assert blocks < 2**34.5


@both_suites
@pytest.mark.parametrize("size", [0, PAYLOAD_BYTES_MAX + 1])
def test_a_payload_out_of_bounds_is_not_sealed(sealed: bool, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        FrameSealer(KEY, sealed=sealed).seal(bytes(size))


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


@both_suites
@pytest.mark.parametrize(
    "header",
    [
        b"\x00\x12\x00\x01\x01",  # the greatest and a byte
        b"\xff\xff\xff\xff\x01",
        b"\x00\x00\x00\x00\x01",  # data without bytes: no progress
        b"\x00\x00\x00\x01\x02",  # close with a body
        b"\x00\x00\x00\x01\x00",
        b"\x00\x00\x00\x01\x03",
        b"RPLW\x04",  # an alert of the handshake
    ],
)
def test_a_header_out_of_bounds_is_refused_before_its_payload_is_waited_for(
    sealed: bool, header: bytes
) -> None:
    assert refused(header, sealed=sealed)[0] == []


@both_suites
def test_every_turned_bit_is_found_before_anything_of_its_frame_is_handed_up(sealed: bool) -> None:
    pieces = frames_of([b"first", b"second"], sealed=sealed)
    stream = b"".join(pieces)
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    good: list[Data | Close] = [data(b"first"), data(b"second"), Close()]
    for bit in range(len(stream) * 8):
        turned = bytearray(stream)
        turned[bit // 8] ^= 1 << bit % 8
        before = sum(bit // 8 >= end for end in ends)
        found: list[Data | Close] = []
        # Either it is refused, or (a greater length) still waited for; then the end of bytes is.
        with pytest.raises((FrameError, CutError)):
            collect(FrameOpener(KEY, sealed=sealed), bytes(turned), found)
        assert found == good[:before]


@both_suites
def test_a_stream_cut_at_any_byte_is_a_cut(sealed: bool) -> None:
    stream = b"".join(frames_of([b"first", b"second"], sealed=sealed))
    for cut in range(len(stream)):
        opener = FrameOpener(KEY, sealed=sealed)
        found = events(opener, stream[:cut])
        assert found == [data(b"first"), data(b"second")][: len(found)]
        with pytest.raises(CutError):
            opener.receive_eof()
        with pytest.raises(CutError):
            opener.next_event()


@both_suites
def test_frames_swapped_repeated_left_out_or_put_in_are_refused(sealed: bool) -> None:
    one, two, three, close = frames_of([b"same", b"same", b"other"], sealed=sealed)
    first: list[Data | Close] = [data(b"same")]
    assert refused(two + one, sealed=sealed)[0] == []
    assert refused(one + one, sealed=sealed)[0] == first
    assert refused(one + three, sealed=sealed)[0] == first
    assert refused(one + close, sealed=sealed)[0] == first
    foreign = frames_of([b"x", b"y"], sealed=sealed, key=OTHER_KEY)[1]
    assert refused(one + foreign, sealed=sealed)[0] == first


@both_suites
def test_frames_of_the_other_direction_or_another_session_are_refused(sealed: bool) -> None:
    for payloads in ([b"reflected"], []):
        foreign = frames_of(payloads, sealed=sealed, key=OTHER_KEY)[0]
        assert refused(foreign, sealed=sealed)[0] == []


@both_suites
def test_frames_of_the_other_suite_are_refused(sealed: bool) -> None:
    payload = bytes(SEAL_BYTES + MAC_BYTES)
    stream = b"".join(frames_of([payload] * 2, sealed=not sealed))
    assert refused(stream, sealed=sealed)[0] == []


@both_suites
def test_bytes_after_the_close_are_refused(sealed: bool) -> None:
    stream = b"".join(frames_of([], sealed=sealed)) + b"x"
    assert refused(stream, sealed=sealed)[0] == [Close()]


@both_suites
def test_the_last_frame_number_is_used_and_none_after_it(
    monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    # A session of 2**64 frames cannot be made; the bound is brought near instead.
    many = frames_of([b"1", b"2"], sealed=sealed)
    monkeypatch.setattr(frames, "SEQUENCE_MAX", 1)
    sealer = FrameSealer(KEY, sealed=sealed)
    assert [bytes(sealer.seal(b"1")), bytes(sealer.seal(b"2"))] == many[:2]
    with pytest.raises(WireError, match="used up"):
        sealer.seal(b"3")
    found, error = refused(b"".join(many), sealed=sealed)
    assert found == [data(b"1"), data(b"2")]
    assert "used up" in str(error)


def test_the_bound_on_frame_numbers_is_what_the_field_holds() -> None:
    assert frames.SEQUENCE_MAX == 2**64 - 1


@both_suites
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
    sealed: bool, honest: list[bytes], pieces: list[bytes]
) -> None:
    opener = FrameOpener(KEY, sealed=sealed)
    start = b"".join(frames_of(honest, sealed=sealed, close=False))
    assert len(events(opener, start)) == len(honest)
    fed = 0
    try:
        for piece in pieces:
            fed += len(piece)
            opener.receive_data(piece)
            assert opener.next_event() is NEED_DATA
            assert opener.buffered_bytes <= min(fed, HEAD_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES)
    except FrameError:
        assert opener.buffered_bytes == 0
