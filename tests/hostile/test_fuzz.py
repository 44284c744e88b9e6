# SPDX-License-Identifier: AGPL-3.0-or-later
"""Bytes of a peer, as they should not be, through everything that decodes them (see ``decoders.py`` for what must hold)."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import PhcbtError, WireError
from replicator.phcbt.format import StreamHeader, header_length
from replicator.wire import messages as m
from tests.hostile import valid as samples
from tests.hostile.decoders import DECODERS, LIMITS, check, outcome, split
from tests.hostile.mutate import cuts, lying_stream, mutated, mutated_message

VALID = samples.valid()
ERRORS = (
    "WireError",
    "FrameError",
    "CutError",
    "AuthenticationError",
    "PhcbtError",
    "DamageError",
    "ProtocolError",
)


def is_error(event: Any) -> bool:
    return isinstance(event, tuple) and event[0] in ERRORS


def test_every_decoder_has_valid_bytes() -> None:
    assert VALID.keys() == DECODERS.keys()


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_valid_is_parsed_however_it_is_split(name: str) -> None:
    for data in VALID[name]:
        found = check(DECODERS[name], data, range(0, len(data), 777))
        assert found
        if name != "session_of_receiver":  # of which the second breaks the order on purpose
            assert not any(map(is_error, found))


def test_the_order_of_a_receivers_answers_is_held() -> None:
    first, second = VALID["session_of_receiver"]
    assert not any(map(is_error, outcome(DECODERS["session_of_receiver"], [first])))
    assert is_error(outcome(DECODERS["session_of_receiver"], [second])[-1])


@pytest.mark.parametrize("name", DECODERS)
def test_bytes_that_were_valid_once(name: str) -> None:
    @settings(max_examples=150)
    @given(mutated(VALID[name]), cuts)
    def run(data: bytes, places: list[int]) -> None:
        check(DECODERS[name], data, places, bytewise=len(data) < 20_000)

    run()


@pytest.mark.parametrize("name", DECODERS)
def test_bytes_out_of_nothing(name: str) -> None:
    @given(st.binary(max_size=2000), cuts)
    def run(data: bytes, places: list[int]) -> None:
        check(DECODERS[name], data, places)

    run()


@pytest.mark.parametrize("name", DECODERS)
def test_valid_bytes_cut_anywhere(name: str) -> None:
    """An end in the wrong place is an error wherever it matters, and never another event."""
    for data in VALID[name]:
        whole = outcome(DECODERS[name], [data])
        for end in range(0, len(data), max(1, len(data) // 300)):
            found = outcome(DECODERS[name], [data[:end]])
            events = [event for event in found if not is_error(event)]
            if name.startswith("as_"):
                continue  # a handshake has no end of its own: its stream has (wire/stream.py)
            assert events == whole[: len(events)]


@given(st.data())
def test_a_stream_whose_author_lies_with_right_checks(data: st.DataObject) -> None:
    whole = VALID["stream"][0]
    header = StreamHeader.decode(whole[: header_length(whole[:12])])
    lie = data.draw(lying_stream(whole, header))
    found = check(DECODERS["stream"], lie, data.draw(cuts), bytewise=len(lie) < 5000)
    assert is_error(found[-1])


def _decodes(decode: Any, body: bytes | memoryview) -> Any:
    try:
        return decode(body)
    except WireError:
        return None


@settings(max_examples=400)
@given(mutated_message([m.encode(each) for each in samples.source_messages()]))
def test_a_sources_messages_with_other_values(body: bytes) -> None:
    """What passes is within its bounds: it can be said again, and is understood the same way."""
    found = _decodes(m.decode_from_source, body)
    assert found is None or m.decode_from_source(m.encode(found)) == found


@settings(max_examples=400)
@given(mutated_message([m.encode(each) for each in samples.receiver_answers()]))
def test_a_receivers_messages_with_other_values(body: bytes) -> None:
    found = _decodes(m.decode_from_receiver, body)
    assert found is None or m.decode_from_receiver(m.encode(found)) == found


@given(
    st.one_of(
        mutated([m.encode(each) for each in samples.source_messages()]), st.binary(max_size=300)
    )
)
def test_message_bodies_out_of_nothing(body: bytes) -> None:
    for decode in (m.decode_from_source, m.decode_from_receiver, m.decode_data):
        _decodes(decode, body)
        _decodes(decode, memoryview(bytearray(body)))


def test_no_message_is_missing_here() -> None:
    def names(union: Any) -> set[str]:
        return {kind.__name__ for kind in union.__args__}

    assert {type(each).__name__ for each in samples.source_messages()} == names(m.FromSource)
    assert {type(each).__name__ for each in samples.receiver_answers()} == names(m.FromReceiver)


@pytest.mark.parametrize("name", ["messages", "session_of_source", "session_of_receiver", "stream"])
def test_a_peer_that_never_comes_to_an_end_of_anything(name: str) -> None:
    """A great length and then a trickle: no more is kept than the protocol's bounds, and what came."""
    starts = {
        "stream": VALID["stream"][0][:200],
        "messages": m.LIMITS.body_bytes_max(m.DATA).to_bytes(4) + bytes([m.DATA]),
    }
    start = starts.get(name, starts["messages"])
    tracemalloc.start()
    try:
        outcome(DECODERS[name], [start, *split(bytes(300_000), range(0, 300_000, 1000))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * (m.DATA_MAX + LIMITS.chunk_max)


def test_a_stream_with_an_index_in_it() -> None:
    """1024 records and the index over them, and that index with each of its entries' fields turned in one place."""
    whole = samples.indexed_stream()
    assert not is_error(
        check(DECODERS["stream"], whole, range(0, len(whole), 4001), bytewise=False)[-1]
    )
    at = whole.index(b"\3", len(whole) - 24 * 1030)
    for place in range(at, at + 24 * 3):
        turned = bytearray(whole)
        turned[place] ^= 0x10
        with pytest.raises(PhcbtError):
            for _ in DECODERS["stream"](iter([bytes(turned)])):
                pass


def test_the_invariant_is_tested() -> None:
    """A decoder that looks at how bytes are split, one that fails in its own way, and one that is right."""
    with pytest.raises(AssertionError):
        check(lambda pieces: ((len(piece),) for piece in pieces), b"abc", [1])
    with pytest.raises(IndexError):
        check(lambda pieces: ((piece[99],) for piece in pieces), b"abc", [1])
    assert check(lambda pieces: (piece for piece in pieces), b"abc", [1]) == [b"abc"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode({"a": 1})) == {"a": 1}
