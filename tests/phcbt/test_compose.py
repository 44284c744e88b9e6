# SPDX-License-Identifier: AGPL-3.0-or-later
"""Composing deltas equals applying them in order."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import DamageError
from replicator.phcbt import (
    Algorithm,
    DataRecord,
    EncodedRecord,
    StoredDelta,
    StreamHeader,
    ZeroRecord,
    compose,
    encode_data,
    zero_record,
)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compose")


def save_all(folder: Path, streams: list[bytes]) -> list[StoredDelta]:
    deltas = []
    for number, data in enumerate(streams):
        path = folder / f"{number}.phcbt"
        path.write_bytes(data)
        deltas.append(StoredDelta(path))
        os.unlink(path)
    return deltas


def composed(
    folder: Path, streams: list[bytes], header: StreamHeader, level: int | None = 1
) -> bytes:
    deltas = save_all(folder, streams)
    try:
        return write_stream(header, compose(deltas, header, level))
    finally:
        for delta in deltas:
            delta.close()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(sizes, changes), min_size=1, max_size=4),
    levels,
    st.booleans(),
    st.sampled_from([GRAIN, CHUNK, 8 * GRAIN]),
)
def test_composing_equals_applying_in_order(
    folder: Path,
    steps: list[tuple[int, list[Change]]],
    level: int | None,
    full: bool,
    chunk: int,
) -> None:
    start = b"" if full else changed_disk(b"", steps[0][0], [Change(0, (2,) * 24, 9)])[0]
    disk, size, streams = start, len(start), []
    touched_at_all: set[int] = set()
    for number, (new_size, change_set) in enumerate(steps):
        size = max(size, new_size)
        disk, touched = changed_disk(disk, size, change_set)
        header = make_header(size, base=number if full else number + 1, target=number + 2)
        streams.append(write_stream(header, records_of(header, disk, touched, level)))
        touched_at_all |= touched
    target = make_header(size, base=0 if full else 1, target=len(steps) + 1, chunk=chunk)
    data = composed(folder, streams, target, level)

    one_by_one, at_once = bytearray(start), bytearray(start)
    for stream in streams:
        apply(one_by_one, stream)
    apply(at_once, data)
    assert at_once == one_by_one == disk
    covered: set[int] = set()
    for event in events_of(data):
        if isinstance(event, DataRecord | ZeroRecord):
            run = event.run(target)
            covered |= set(range(run.first, run.first + run.count))
    assert covered == touched_at_all


def blocks(data: bytes) -> list[EncodedRecord]:
    return [e.record for e in events_of(data) if isinstance(e, DataRecord | ZeroRecord)]


def test_whole_blocks_are_relayed_as_stored_and_parts_are_cut(folder: Path) -> None:
    old, new = make_header(base=1, target=2), make_header(base=2, target=3)
    target = make_header(base=1, target=3)
    text = b"".join(content(1, 1, grain) for grain in range(4))
    first = [
        encode_data(old, 0, text, 19),
        encode_data(old, CHUNK, text, 19),
        zero_record(old, 2 * CHUNK, CHUNK),
    ]
    second = [
        encode_data(new, CHUNK + GRAIN, content(2, 1, 0), None),
        zero_record(new, 3 * CHUNK - GRAIN, GRAIN),
        encode_data(new, 4 * CHUNK, text, 19),
    ]
    result = blocks(
        composed(folder, [write_stream(old, first), write_stream(new, second)], target, None)
    )
    spans = [(record.offset // GRAIN, record.length // GRAIN) for record in result]
    assert spans == [(0, 4), (4, 1), (5, 1), (6, 2), (8, 3), (11, 1), (16, 4)]
    assert [record.is_zero for record in result] == [False] * 4 + [True, True, False]
    for relayed, source in [(result[0], first[0]), (result[2], second[0]), (result[6], second[2])]:
        assert relayed.head == source.head
        assert relayed.payload == source.payload
    assert result[1].payload == text[:GRAIN]
    assert result[3].payload == text[2 * GRAIN :]


def test_a_disk_that_grew_inside_a_grain_keeps_that_grains_digest(folder: Path) -> None:
    old = make_header(GRAIN + 100, base=1, target=2)
    new = make_header(4 * GRAIN, base=2, target=3)
    streams = [
        write_stream(old, [encode_data(old, GRAIN, b"x" * 100, None)]),
        write_stream(new, [zero_record(new, 3 * GRAIN, GRAIN)]),
    ]
    target = make_header(4 * GRAIN, base=1, target=3)
    first, second = blocks(composed(folder, streams, target))
    assert (first.offset, first.length, second.offset) == (GRAIN, GRAIN, 3 * GRAIN)
    assert first.digests == blocks(streams[0])[0].digests


def test_a_full_stream_hides_what_is_older(folder: Path) -> None:
    old, full = make_header(), make_header(target=5)
    streams = [
        write_stream(old, [encode_data(old, 0, content(1, 1, 0), None)]),
        write_stream(full, [encode_data(full, CHUNK, content(1, 2, 0), None)]),
    ]
    assert [record.offset for record in blocks(composed(folder, streams, full))] == [CHUNK]


def test_damage_in_a_block_that_must_be_cut_is_not_covered_up(folder: Path) -> None:
    header = make_header(base=1, target=2)
    plain = content(2, 1, 0) + content(2, 1, 1)
    damaged = bytearray(write_stream(header, [encode_data(header, 0, plain, None)]))
    damaged[112 + 40 + 32 + 5] ^= 1
    later = write_stream(header, [zero_record(header, GRAIN, GRAIN)])
    with pytest.raises(DamageError, match="grain 0"):
        composed(folder, [bytes(damaged), later], header)


DELTA = make_header(base=1, target=2)


@pytest.mark.parametrize(
    ("headers", "target", "reason"),
    [
        ([], DELTA, "nothing to compose"),
        ([make_header(algorithm=Algorithm.BLAKE3_256)], make_header(), "algorithm or grain"),
        ([make_header(GRAIN * 9), DELTA, make_header(GRAIN)], make_header(GRAIN), "not shrink"),
        ([DELTA], make_header(GRAIN, base=1, target=2), "for another size"),
        ([DELTA], make_header(), "full"),
        ([make_header(), DELTA], DELTA, "full"),
    ],
)
def test_deltas_that_do_not_belong_together_are_refused(
    folder: Path, headers: list[StreamHeader], target: StreamHeader, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        composed(folder, [write_stream(header, []) for header in headers], target)


def test_memory_is_a_few_chunks_however_much_is_composed(folder: Path) -> None:
    chunk = 1 << 20
    header = make_header(32 * chunk, base=1, target=2, chunk=chunk)
    noise = content(2, 3, 0) * (chunk // GRAIN)
    whole = write_stream(header, (encode_data(header, at * chunk, noise, None) for at in range(32)))
    holes = write_stream(
        header, (zero_record(header, at * chunk + 5 * GRAIN, GRAIN) for at in range(32))
    )
    deltas = save_all(folder, [whole, holes])
    del whole, holes
    tracemalloc.start()
    try:
        assert sum(record.length for record in compose(deltas, header)) == 32 * chunk
        assert tracemalloc.get_traced_memory()[1] < 6 * chunk
    finally:
        tracemalloc.stop()
        for delta in deltas:
            delta.close()
