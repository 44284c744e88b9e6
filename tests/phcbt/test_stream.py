# SPDX-License-Identifier: AGPL-3.0-or-later
"""Encoding and decoding undo each other, however the bytes arrive."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.disk import Extent
from replicator.errors import PhcbtError
from replicator.phcbt import (
    NEED_DATA,
    Algorithm,
    Counts,
    DataRecord,
    Decoder,
    End,
    Header,
    IndexRecord,
    StreamWriter,
    ZeroRecord,
    encode_chunk,
    encode_data,
    split_chunk,
    zero_record,
)
from replicator.phcbt.format import Codec
from tests.phcbt.support import (
    CHUNK,
    GRAIN,
    Change,
    apply,
    changed_disk,
    changes,
    content,
    events_of,
    levels,
    make_header,
    records_of,
    sizes,
    write_stream,
)

few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(sizes, changes, changes, levels, st.sampled_from(list(Algorithm)))
def test_what_goes_in_comes_out(
    size: int, first: list[Change], then: list[Change], level: int | None, algorithm: Algorithm
) -> None:
    before, touched = changed_disk(b"", size, first)
    full = make_header(size, algorithm=algorithm)
    disk = bytearray()
    apply(disk, write_stream(full, records_of(full, before, touched, level)))
    assert disk == before

    after, touched = changed_disk(before, size, then)
    delta = make_header(size, algorithm=algorithm, base=1, target=2)
    assert apply(disk, write_stream(delta, records_of(delta, after, touched, level))) == delta
    assert disk == after


@few
@given(sizes, changes, levels, st.lists(st.integers(0, 4000), max_size=12))
def test_arrival_in_any_pieces_gives_the_same_events(
    size: int, change_set: list[Change], level: int | None, cuts: list[int]
) -> None:
    disk, touched = changed_disk(b"", size, change_set)
    header = make_header(size)
    data = write_stream(header, records_of(header, disk, touched, level))
    whole = events_of(data)
    assert events_of(data, [cut * len(data) // 4000 for cut in cuts]) == whole
    assert b"".join(event.raw for event in whole) == data


def test_byte_by_byte_gives_the_same_events_and_position_is_the_record_boundary() -> None:
    header = make_header()
    plain = content(1, 1, 0) + bytes(5 * GRAIN)
    data = write_stream(header, encode_chunk(header, 0, plain[:CHUNK], 3))
    decoder = Decoder()
    events = []
    boundary = 0
    for at in range(len(data)):
        decoder.receive_data(bytearray(data[at : at + 1]))
        event = decoder.next_event()
        if event is not NEED_DATA:
            events.append(event)
            boundary = at + 1
            assert decoder.next_event() is NEED_DATA
        assert decoder.position == boundary
        assert decoder.buffered == at + 1 - boundary
    decoder.close()
    assert decoder.ended
    assert events == events_of(data)


def test_a_stream_of_nothing_is_a_header_and_an_end() -> None:
    header = make_header()
    events = events_of(write_stream(header, []))
    assert [type(event) for event in events] == [Header, End]
    end = events[1]
    assert isinstance(end, End)
    assert end.counts == Counts()
    assert end.root == hashlib.sha256(b"PHCBT01 stream\0" + header.encode()).digest()


@pytest.mark.parametrize("blocks", [1023, 1024, 1025, 2048, 2049])
def test_an_index_comes_after_every_1024_blocks_and_before_the_end(blocks: int) -> None:
    header = make_header(3000 * GRAIN)
    records = [zero_record(header, grain * GRAIN, GRAIN) for grain in range(blocks)]
    events = events_of(write_stream(header, records))
    indexes = [event.entries for event in events if isinstance(event, IndexRecord)]
    full, rest = divmod(blocks, 1024)
    assert indexes == [1024] * full + ([rest] if rest else [])
    end = events[-1]
    assert isinstance(end, End)
    assert end.counts == Counts(zero_records=blocks, zero_bytes=blocks * GRAIN)


def test_the_root_is_over_header_heads_and_digests_and_the_writer_knows_it() -> None:
    header = make_header()
    records = [encode_data(header, 0, b"x" * GRAIN, 3), zero_record(header, GRAIN, GRAIN)]
    writer = StreamWriter(header)
    writer.start()
    expected = hashlib.sha256(b"PHCBT01 stream\0" + header.encode())
    for record in records:
        writer.add(record)
        expected.update(record.skeleton)
    assert writer.root == expected.digest()
    assert writer.disk_end == 2 * GRAIN
    end = events_of(write_stream(header, records))[-1]
    assert isinstance(end, End)
    assert end.root == writer.root
    assert end.counts == writer.counts


def test_runs_give_the_digests_of_data_and_none_for_zeros() -> None:
    header = make_header()
    plain = content(2, 1, 0) + bytes(GRAIN)
    data = write_stream(
        header, [encode_data(header, GRAIN, plain, None), zero_record(header, CHUNK, CHUNK)]
    )
    _, first, second, _, _ = events_of(data)
    assert isinstance(first, DataRecord)
    assert isinstance(second, ZeroRecord)
    run = first.run(header)
    digests = Algorithm.XXH3_128.digest_grains(plain, GRAIN)
    assert (run.first, run.count, run.digests) == (1, 2, digests)
    assert digests.endswith(bytes(16))
    zeros = second.run(header)
    assert (zeros.first, zeros.count, zeros.digests) == (4, 4, None)
    assert (second.offset, second.length) == (CHUNK, CHUNK)


def test_text_is_compressed_and_noise_goes_plain() -> None:
    header = make_header()
    text = encode_data(header, 0, content(1, 1, 0), 1)
    noise = encode_data(header, 0, content(2, 1, 0), 1)
    plain = encode_data(header, 0, content(1, 1, 0), None)
    assert text.head.codec is Codec.ZSTD
    assert len(text.payload) < GRAIN // 2
    assert {noise.head.codec, plain.head.codec} == {Codec.NONE}
    assert bytes(noise.payload) == content(2, 1, 0)
    assert text.digests == plain.digests
    assert text.size == 40 + 16 + len(text.payload)


@few
@given(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, GRAIN))
def test_a_chunk_is_cut_where_four_grains_or_all_are_zeros(kinds: list[int], last: int) -> None:
    header = make_header()
    plain = b"".join(content(kind, 1, at) for at, kind in enumerate(kinds))
    plain = plain[: len(plain) - GRAIN + last]
    extents = split_chunk(memoryview(plain), 8 * GRAIN, header)
    assert extents == split_chunk(plain, 8 * GRAIN, header)
    at = 8 * GRAIN
    for extent, following in zip(extents, [*extents[1:], None], strict=True):
        assert extent.offset == at
        at = extent.end
        piece = plain[extent.offset - 8 * GRAIN : extent.end - 8 * GRAIN]
        if extent.zero:
            assert not any(piece)
            assert extent.length > 3 * GRAIN or len(extents) == 1
        else:
            # No grain-wise run of four zero grains is left inside data, nor is all of it zeros.
            assert any(piece)
            assert "0000" not in "".join(
                "1" if any(piece[g : g + GRAIN]) else "0" for g in range(0, len(piece), GRAIN)
            )
        assert following is None or following.zero != extent.zero
    assert at == 8 * GRAIN + len(plain)


def test_short_zero_runs_stay_inside_data() -> None:
    header = make_header()
    data, zeros = content(1, 1, 1), bytes(GRAIN)
    assert split_chunk(data + zeros * 3 + data, 0, header) == [Extent(0, 5 * GRAIN)]
    assert split_chunk(zeros * 3 + data, 0, header) == [Extent(0, 4 * GRAIN)]
    assert split_chunk(zeros, 0, header) == [Extent(0, GRAIN, zero=True)]
    assert split_chunk(data + zeros * 4, 0, header) == [
        Extent(0, GRAIN),
        Extent(GRAIN, 4 * GRAIN, zero=True),
    ]


def test_a_writer_refuses_calls_out_of_turn_and_blocks_out_of_order() -> None:
    header = make_header()
    writer = StreamWriter(header)
    assert writer.position == 0
    with pytest.raises(ValueError, match="not been started"):
        writer.finish()
    writer.start()
    with pytest.raises(ValueError, match="has been started"):
        writer.start()
    writer.add(zero_record(header, GRAIN, GRAIN))
    before = writer.position
    with pytest.raises(PhcbtError, match="after one up to"):
        writer.add(zero_record(header, 0, GRAIN))
    assert writer.position == before
    states = [writer.finished]
    writer.finish()
    states.append(writer.finished)
    assert states == [False, True]
    with pytest.raises(ValueError, match="finished"):
        writer.add(zero_record(header, CHUNK, GRAIN))


@pytest.mark.parametrize(
    ("offset", "length"), [(1, GRAIN), (0, CHUNK + GRAIN), (0, 100), (64 * GRAIN, GRAIN)]
)
def test_a_record_that_the_format_does_not_allow_is_not_made(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="block"):
        encode_data(make_header(), offset, b"x" * length, None)
    with pytest.raises(ValueError, match="block"):
        zero_record(make_header(), offset, length)


def test_a_reverse_delta_leads_from_the_later_point_to_the_earlier_one() -> None:
    header = make_header(base=8, target=7)
    first = events_of(write_stream(header, []))[0]
    assert isinstance(first, Header)
    assert (first.header.base_point, first.header.target_point) == (8, 7)
