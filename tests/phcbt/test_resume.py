# SPDX-License-Identifier: AGPL-3.0-or-later
"""Both sides can go on from any record boundary, whatever the crash left of their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from replicator.errors import PhcbtError
from replicator.phcbt import (
    NEED_DATA,
    Decoder,
    EncodedRecord,
    End,
    GrainRun,
    Limits,
    SkeletonReader,
    StreamHeader,
    StreamWriter,
    encode_data,
    resume_partial,
    zero_record,
)
from tests.phcbt.support import GRAIN, content, events_of, make_header, write_stream

Stored = Callable[[bytes], int]


@pytest.fixture
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> Stored:
    """Write bytes to a file and give its descriptor, which is closed after the test."""

    def make(data: bytes) -> int:
        path = tmp_path / "file"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        path.unlink()  # the next call makes another file
        request.addfinalizer(lambda: os.close(fd))
        return fd

    return make


def small_records(header: StreamHeader) -> list[EncodedRecord]:
    return [
        encode_data(header, 0, content(1, 1, 0), 3),
        zero_record(header, 2 * GRAIN, GRAIN),
        encode_data(header, 60 * GRAIN, content(2, 1, 1)[:150], None),
    ]


SMALL = make_header(60 * GRAIN + 150)
SMALL_STREAM = write_stream(SMALL, small_records(SMALL))


def boundaries(data: bytes) -> list[int]:
    at, result = 0, []
    for event in events_of(data):
        at += len(event.raw)
        result.append(at)
    return result


def finish(decoder: Decoder, rest: bytes) -> End:
    last: object = None
    decoder.receive_data(rest)
    while (event := decoder.next_event()) is not NEED_DATA:
        last = event
    decoder.close()
    assert isinstance(last, End)
    return last


def test_a_receiver_goes_on_from_every_torn_length(stored: Stored) -> None:
    whole = events_of(SMALL_STREAM)
    places = boundaries(SMALL_STREAM)
    fd = stored(SMALL_STREAM)
    for size in range(len(SMALL_STREAM)):
        decoder, boundary = resume_partial(fd, size)
        assert boundary == max([0, *(place for place in places if place <= size)])
        assert decoder.position == boundary
        assert finish(decoder, SMALL_STREAM[boundary:]) == whole[-1]
    decoder, boundary = resume_partial(fd, len(SMALL_STREAM))
    assert (decoder.ended, boundary) == (True, len(SMALL_STREAM))
    decoder.close()
    assert decoder.next_event() is NEED_DATA


def test_a_damaged_tail_is_cut_off_like_a_torn_one(stored: Stored) -> None:
    places = boundaries(SMALL_STREAM)
    for start, end in pairwise(places):
        damaged = bytearray(SMALL_STREAM)
        damaged[start + 33] ^= 1  # in the check of the record that starts there
        _, boundary = resume_partial(stored(bytes(damaged)), len(damaged))
        assert boundary == start
        # A file that is shorter than the watermark ends at its last whole record.
        _, boundary = resume_partial(stored(SMALL_STREAM[: end - 1]), len(SMALL_STREAM))
        assert boundary == start


def test_a_partial_file_without_a_header_starts_over(stored: Stored) -> None:
    for data in (b"", b"PHCBT01\n", bytes(500)):
        decoder, boundary = resume_partial(stored(data), len(data))
        assert boundary == 0
        finish(decoder, SMALL_STREAM)


def test_limits_hold_for_a_resumed_stream_too(stored: Stored) -> None:
    limits = Limits(disk_size_max=GRAIN)
    with pytest.raises(PhcbtError, match="disk of"):
        resume_partial(stored(SMALL_STREAM), 300, limits)


LONG = make_header(5000 * GRAIN)


def long_records() -> list[EncodedRecord]:
    return [
        zero_record(LONG, grain * 2 * GRAIN, GRAIN)
        if grain % 3
        else encode_data(LONG, grain * 2 * GRAIN, b"%4d" % grain * 1024, 1)
        for grain in range(2060)
    ]


@pytest.fixture(scope="module")
def long_stream() -> tuple[list[EncodedRecord], bytes, bytes]:
    """Records, stream and skeleton over two full index records and a short one."""
    records = long_records()
    skeleton = LONG.encode() + b"".join(record.skeleton for record in records)
    return records, write_stream(LONG, records), skeleton


def rest_of(writer: StreamWriter, records: list[EncodedRecord]) -> bytes:
    pieces: list[bytes | memoryview] = []
    if writer.position == 0:
        pieces.append(writer.start())
    for record in records:
        if record.offset >= writer.disk_end:
            pieces += writer.add(record)
    return b"".join(pieces) + writer.finish()


def test_both_sides_resume_at_every_boundary_around_index_records(
    stored: Stored, long_stream: tuple[list[EncodedRecord], bytes, bytes]
) -> None:
    records, data, skeleton = long_stream
    places = boundaries(data)
    reader = SkeletonReader(stored(skeleton))
    partial = stored(data)
    chosen = [0, 1, 1023, 1024, 1025, 1026, 2049, 2050, 2051, 2063, 2064]
    for watermark in [places[number] for number in chosen if number < len(places)]:
        cut = reader.resume(watermark)
        place = cut.writer.position
        assert place <= watermark
        assert watermark - place < 25_000  # at most a block and an index record
        decoder, boundary = resume_partial(partial, place)
        assert boundary == place
        rest = rest_of(cut.writer, records)
        assert rest == data[place:]
        finish(decoder, rest)
        spooled = StreamWriter.resume(
            LONG,
            [
                (record.head, record.digests)
                for record in SkeletonReader(stored(skeleton[: cut.skeleton_position])).records()
            ],
        )
        assert spooled.position == place


def test_between_a_block_and_its_index_the_block_is_sent_again(
    stored: Stored, long_stream: tuple[list[EncodedRecord], bytes, bytes]
) -> None:
    records, data, skeleton = long_stream
    places = boundaries(data)
    before, after, with_index = places[1023], places[1024], places[1025]
    assert with_index - after == 40 + 1024 * 24
    reader = SkeletonReader(stored(skeleton))
    assert reader.resume(after).writer.position == before
    assert reader.resume(with_index - 1).writer.position == before
    cut = reader.resume(with_index)
    assert cut.writer.position == with_index
    assert cut.writer.disk_end == records[1023].head.end


def test_a_torn_skeleton_goes_on_from_its_last_whole_block(stored: Stored) -> None:
    records = small_records(SMALL)
    skeleton = SMALL.encode() + b"".join(record.skeleton for record in records)
    for size in range(len(skeleton) + 1):
        data = skeleton[:size]
        if size < len(SMALL.encode()):
            with pytest.raises(PhcbtError):
                SkeletonReader(stored(data))
            continue
        cut = SkeletonReader(stored(data)).resume(1 << 40)
        whole = [record for record in records if record.offset < cut.writer.disk_end]
        assert cut.skeleton_position == len(SMALL.encode()) + sum(
            len(record.skeleton) for record in whole
        )
        assert size - cut.skeleton_position < 56
        assert (
            rest_of(cut.writer, records)
            == SMALL_STREAM[-len(SMALL_STREAM) :][boundaries(SMALL_STREAM)[len(whole)] :]
        )


def test_a_damaged_skeleton_counts_up_to_the_damage(stored: Stored) -> None:
    records = small_records(SMALL)
    skeleton = bytearray(SMALL.encode() + b"".join(record.skeleton for record in records))
    start = len(SMALL.encode())
    skeleton[start + records[0].size - len(records[0].payload) + 35] ^= 1
    reader = SkeletonReader(stored(bytes(skeleton)))
    assert [record.head for record in reader.records()] == [records[0].head]
    # A foreign record in a skeleton is damage as well.
    end = SMALL.encode() + SMALL_STREAM[-120:]
    assert list(SkeletonReader(stored(end)).records()) == []
    assert list(SkeletonReader(stored(write_stream(SMALL, []))).records()) == []


def test_a_receiver_that_has_less_than_the_header_gets_a_new_writer(stored: Stored) -> None:
    records = small_records(SMALL)
    skeleton = SMALL.encode() + b"".join(record.skeleton for record in records)
    reader = SkeletonReader(stored(skeleton))
    for watermark in (0, len(SMALL.encode()) - 1):
        cut = reader.resume(watermark)
        assert (cut.writer.position, cut.skeleton_position) == (0, 0)
        assert rest_of(cut.writer, records) == SMALL_STREAM


def test_skeleton_records_say_where_they_stand(stored: Stored) -> None:
    records = small_records(SMALL)
    skeleton = SMALL.encode() + b"".join(record.skeleton for record in records)
    found = list(SkeletonReader(stored(skeleton)).records())
    places = boundaries(SMALL_STREAM)
    assert [record.position for record in found] == places[:3]
    assert [record.end for record in found] == places[1:4]
    assert found[-1].skeleton_end == len(skeleton)


def test_runs_of_a_skeleton_are_those_of_its_records(
    stored: Stored, long_stream: tuple[list[EncodedRecord], bytes, bytes]
) -> None:
    records, _, skeleton = long_stream
    reader = SkeletonReader(stored(skeleton))
    want: list[GrainRun] = [record.run(LONG) for record in records]
    assert list(reader.runs()) == want
    assert list(reader.runs(len(records))) == want
    torn = SkeletonReader(stored(skeleton[:-1]))
    runs = torn.runs(len(records))
    assert [next(runs) for _ in want[:-1]] == want[:-1]
    with pytest.raises(PhcbtError, match="2059 whole blocks instead of 2060"):
        next(runs)


def test_a_writer_resumes_only_from_blocks_that_fit() -> None:
    records = small_records(SMALL)
    pairs = [(record.head, record.digests) for record in records]
    assert StreamWriter.resume(SMALL, pairs).root == events_of(SMALL_STREAM)[-1].root  # type: ignore[union-attr]
    with pytest.raises(PhcbtError, match="after one up to"):
        StreamWriter.resume(SMALL, [pairs[1], pairs[0]])
    with pytest.raises(PhcbtError, match="something other than blocks"):
        StreamWriter.resume(SMALL, [(pairs[0][0], b"")])
    with pytest.raises(PhcbtError, match="check of the data record"):
        StreamWriter.resume(SMALL, [(pairs[0][0], bytes(16))])
