# SPDX-License-Identifier: AGPL-3.0-or-later
"""A stored delta reads back what was written, and says what is damaged, not more and not less."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.disk import Extent
from replicator.errors import DamageError, PhcbtError
from replicator.phcbt import (
    Algorithm,
    DataRecord,
    EncodedRecord,
    Finding,
    IndexRecord,
    StoredDelta,
    StreamHeader,
    ZeroRecord,
    encode_data,
    verify_file,
    zero_record,
)
from replicator.phcbt.format import Codec, IndexEntry, Kind, RecordHead
from tests.phcbt.support import (
    CHUNK,
    GRAIN,
    Change,
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

few = settings(max_examples=40, deadline=None, derandomize=True)
Save = Callable[[bytes], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def make(data: bytes) -> Path:
        path = tmp_path / "disk-0.phcbt"
        path.write_bytes(data)
        return path

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phcbt")


def blocks_of(data: bytes) -> list[DataRecord | ZeroRecord]:
    return [event for event in events_of(data) if isinstance(event, DataRecord | ZeroRecord)]


@few
@given(sizes, changes, levels, st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999))))
def test_every_range_reads_back_what_was_written_there(
    folder: Path,
    size: int,
    change_set: list[Change],
    level: int | None,
    ranges: list[tuple[int, int]],
) -> None:
    disk, touched = changed_disk(b"", size, change_set)
    header = make_header(size)
    path = folder / "delta"
    path.write_bytes(write_stream(header, records_of(header, disk, touched, level)))
    with StoredDelta(path) as delta:
        assert delta.header == header
        for one, other in [(0, 999), *ranges]:
            start, stop = sorted((one * size // 999, other * size // 999))
            covered = bytearray(stop - start)
            for offset, piece in delta.read(start, stop - start):
                plain = bytes(piece) if isinstance(piece, int) else piece
                assert start <= offset
                assert offset + len(plain) <= stop
                assert plain == disk[offset : offset + len(plain)]
                covered[offset - start : offset - start + len(plain)] = b"\1" * len(plain)
            expected = bytes((start + at) // GRAIN in touched for at in range(stop - start))
            assert covered == expected
        for grain in range(header.grains(size)):
            digest = delta.digests(grain)
            piece = disk[grain * GRAIN : (grain + 1) * GRAIN]
            want = header.algorithm.digest_grains(piece, GRAIN) if grain in touched else None
            assert digest == want
        assert list(delta.verify()) == []


def big_stream(level: int | None = None) -> tuple[StreamHeader, bytes]:
    """2100 blocks of every sort with gaps between them: two whole index records and a short one."""
    header = make_header(6400 * GRAIN, base=3, target=4)

    def records() -> Any:
        for number in range(2100):
            offset = number * 3 * GRAIN
            if number % 4 == 1:
                yield zero_record(header, offset, 2 * GRAIN)
            else:
                yield encode_data(header, offset, struct.pack(">Q", number) * 1024, level)

    return header, write_stream(header, records())


@pytest.fixture(scope="module")
def big() -> tuple[StreamHeader, bytes]:
    return big_stream(1)


def check_look_ups(delta: StoredDelta, blocks: list[DataRecord | ZeroRecord]) -> None:
    numbers = [0, 1, 2, 700, 1022, 1023, 1024, 1025, 2047, 2048, 2049, 2098, 2099]
    for number in numbers:
        block = blocks[number]
        entry = delta.find(block.offset + 2 * GRAIN - 1)
        assert entry is not None
        assert (entry.offset, entry.length, entry.position, entry.end) == (
            block.offset,
            block.length,
            block.position,
            block.offset + block.length,
        )
        in_gap = block.offset + 2 * GRAIN
        assert delta.find(in_gap) is None
        assert delta.digests(in_gap // GRAIN) is None
        following = delta.find_next(in_gap)
        if number == 2099:
            assert following is None
        else:
            assert following is not None
            assert following.offset == blocks[number + 1].offset
        assert delta.record(entry).head == block.record.head


def test_look_ups_around_index_records(save: Save, big: tuple[StreamHeader, bytes]) -> None:
    header, data = big
    blocks = blocks_of(data)
    with StoredDelta(save(data)) as delta:
        check_look_ups(delta, blocks)
        assert delta.index_damage is None
        assert [entry.position for entry in delta.entries()] == [b.position for b in blocks]
        assert list(delta.extents()) == [
            Extent(b.offset, b.length, isinstance(b, ZeroRecord)) for b in blocks
        ]
        assert list(delta.runs()) == [block.run(header) for block in blocks]
        assert delta.root == delta.end.root
        entry = delta.find(0)
        assert entry is not None
        assert delta.plain(entry) == bytes(8192)
        assert delta.read(5, 0) == []
    delta.close()


def test_a_delta_of_nothing_covers_nothing(save: Save) -> None:
    with StoredDelta(save(write_stream(make_header(), []))) as delta:
        assert delta.find_next(0) is None
        assert delta.find(5) is None
        assert delta.read(0, 64 * GRAIN) == []
        assert list(delta.runs()) == []
        assert list(delta.entries()) == []
        assert list(delta.verify()) == []


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (64 * GRAIN, 1)])
def test_a_range_outside_of_the_disk_is_a_mistake(save: Save, offset: int, length: int) -> None:
    path = save(write_stream(make_header(), []))
    with StoredDelta(path) as delta, pytest.raises(ValueError, match="on a disk of"):
        delta.read(offset, length)


@pytest.mark.parametrize("level", [None, 1])
def test_reading_damaged_grains_names_them_and_the_others_are_fine(
    save: Save, level: int | None
) -> None:
    header = make_header()
    plain = b"".join(content(2 if level is None else 1, 5, grain) for grain in range(4))
    record = encode_data(header, CHUNK, plain, level)
    data = bytearray(write_stream(header, [record]))
    payload_at = len(header.encode()) + 40 + 64
    at = payload_at + (2 * GRAIN + 17 if level is None else len(record.payload) - 3)
    data[at] ^= 0x10
    path = save(bytes(data))
    with StoredDelta(path) as delta:
        if level is None:
            assert delta.read(CHUNK + 10, GRAIN) == [(CHUNK + 10, plain[10 : GRAIN + 10])]
            text = f"{path}: record at stream byte 112: .*grain 6 .disk byte {6 * GRAIN}"
            with pytest.raises(DamageError, match=text):
                delta.read(CHUNK + 2 * GRAIN, 1)
        else:
            with pytest.raises((DamageError, PhcbtError), match=f"{path}: "):
                delta.read(CHUNK, 1)
        # Heads and digests are whole, so the map can be made from them.
        assert [run.digests for run in delta.runs()] == [record.digests]
    found = list(verify_file(path))
    assert [finding.stream_offset for finding in found] == [112]
    if level is None:
        assert found[0] == Finding(
            str(path), 112, 6 * GRAIN, GRAIN, "1 grain(s) from grain 6 on do not have their digest"
        )


def test_neighbouring_damaged_grains_are_one_finding(save: Save) -> None:
    header = make_header(3 * GRAIN + 50)
    plain = b"".join(content(2, 5, grain) for grain in range(4))[: 3 * GRAIN + 50]
    data = bytearray(write_stream(header, [encode_data(header, 0, plain, None)]))
    for grain in (0, 2, 3):
        data[112 + 40 + 64 + grain * GRAIN] ^= 1
    found = [(finding.disk_offset, finding.length) for finding in verify_file(save(bytes(data)))]
    assert found == [(0, GRAIN), (2 * GRAIN, GRAIN + 50)]


def index_places(data: bytes) -> list[int]:
    return [event.position for event in events_of(data) if isinstance(event, IndexRecord)]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 12, 20, 33, 40, 40 + 24 * 51, 40 + 24 * 51 + 20])
def test_a_damaged_index_costs_nothing_but_itself(
    save: Save, big: tuple[StreamHeader, bytes], which: int, at: int
) -> None:
    header, data = big
    damaged = bytearray(data)
    place = index_places(data)[which]
    damaged[place + at] ^= 0x81
    path = save(bytes(damaged))
    blocks = blocks_of(data)
    with StoredDelta(path) as delta:
        assert delta.index_damage is not None
        assert delta.index_damage.offset == place
        check_look_ups(delta, blocks)
        assert list(delta.runs()) == [block.run(header) for block in blocks]
    found = list(verify_file(path))
    assert [(finding.stream_offset, finding.disk_offset) for finding in found] == [(place, None)]


def test_an_index_that_is_damaged_after_opening_costs_nothing_either(
    save: Save, big: tuple[StreamHeader, bytes]
) -> None:
    _, data = big
    path = save(data)
    with StoredDelta(path) as delta:
        with path.open("r+b") as file:
            for place in index_places(data):
                file.seek(place + 20)
                file.write(b"\xff\xff\xff\xff")
        check_look_ups(delta, blocks_of(data))
        assert delta.index_damage is not None


@pytest.mark.parametrize("number", [0, 1, 1023, 1024, 1500, 2048, 2099])
@pytest.mark.parametrize("at", [0, 4, 8, 20, 33])
def test_a_damaged_head_costs_one_block(
    save: Save, big: tuple[StreamHeader, bytes], number: int, at: int
) -> None:
    _, data = big
    blocks = blocks_of(data)
    block = blocks[number]
    damaged = bytearray(data)
    damaged[block.position + at] ^= 0x02
    path = save(bytes(damaged))
    with StoredDelta(path) as delta:
        if isinstance(block, ZeroRecord):
            # The index, which has a check of its own, is enough to say that these are zeros.
            assert delta.read(block.offset, 5) == [(block.offset, 5)]
        else:
            with pytest.raises(PhcbtError) as caught:
                delta.read(block.offset, 1)
            assert caught.value.offset == block.position
            assert str(path) in str(caught.value)
        for other in {(number - 1) % 2100, (number + 1) % 2100}:
            assert len(delta.read(blocks[other].offset, GRAIN)) == 1
        with pytest.raises(PhcbtError, match=str(path)):
            list(delta.runs())
    found = list(verify_file(path))
    assert [(f.stream_offset, f.disk_offset, f.length) for f in found] == [
        (block.position, block.offset, block.length)
    ]


def test_verify_goes_on_past_many_damages(save: Save, big: tuple[StreamHeader, bytes]) -> None:
    _, data = big
    blocks = blocks_of(data)
    damaged = bytearray(data)
    heads = [3, 4, 1100, 2090]
    for number in heads:
        damaged[blocks[number].position + 8] ^= 1
    damaged[blocks[1200].position + 40 + 32] ^= 1  # the magic of a payload's frame
    found = list(verify_file(save(bytes(damaged))))
    assert [(finding.stream_offset, finding.disk_offset, finding.length) for finding in found] == [
        (blocks[number].position, blocks[number].offset, 2 * GRAIN)
        for number in [3, 4, 1100, 1200, 2090]
    ]


def test_verify_goes_on_after_the_group_when_its_index_is_damaged_as_well(
    save: Save, big: tuple[StreamHeader, bytes]
) -> None:
    _, data = big
    blocks = blocks_of(data)
    damaged = bytearray(data)
    for position in (blocks[1100].position, index_places(data)[1] + 10, blocks[2099].position):
        damaged[position + 8] ^= 1
    path = save(bytes(damaged))
    found = list(verify_file(path))
    assert [(finding.stream_offset, finding.disk_offset) for finding in found] == [
        (blocks[1100].position, None),
        (blocks[2099].position, blocks[2099].offset),
    ]
    assert "goes on at" in found[0].reason
    # And what cannot be said for certain is not read from.
    with pytest.raises(PhcbtError, match=str(path)):
        StoredDelta(path)


def test_verify_of_a_cut_or_overwritten_file(save: Save, big: tuple[StreamHeader, bytes]) -> None:
    _, data = big
    blocks = blocks_of(data)
    cut = blocks[1500].position + 5
    path = save(data[:cut])
    found = list(verify_file(path))
    assert [finding.stream_offset for finding in found] == [cut, blocks[1500].position]
    assert "no end record" in found[0].reason
    assert "not known" in found[1].reason
    with pytest.raises(PhcbtError, match=str(path)):
        StoredDelta(path)

    found = list(verify_file(save(data[: blocks[1500].position])))
    assert [finding.reason.split(":")[0] for finding in found] == ["end"]

    found = list(verify_file(save(data[:50])))
    assert [finding.reason for finding in found] == ["header: the file ends inside the header"]

    found = list(verify_file(save(b"")))
    assert "magic" in found[0].reason

    header = make_header()
    path = save(header.encode())
    assert [finding.stream_offset for finding in verify_file(path)] == [112]
    with pytest.raises(PhcbtError, match="before its end record"):
        StoredDelta(path)
    with pytest.raises(FileNotFoundError):
        StoredDelta(path.with_name("other"))


def test_verify_finds_a_last_index_gone_with_a_head_before_it(
    save: Save, big: tuple[StreamHeader, bytes]
) -> None:
    _, data = big
    blocks = blocks_of(data)
    damaged = bytearray(data)
    last = index_places(data)[-1]
    damaged[blocks[2060].position] ^= 0x40
    damaged[last + 10] ^= 1
    found = list(verify_file(save(bytes(damaged))))
    assert [finding.stream_offset for finding in found] == [blocks[2060].position, last]


def test_an_end_that_fits_itself_but_not_the_stream_is_found(save: Save) -> None:
    header = make_header()
    one = write_stream(header, [zero_record(header, 0, GRAIN)])
    other = write_stream(header, [zero_record(header, GRAIN, GRAIN)])
    path = save(one[:-120] + other[-120:])
    found = list(verify_file(path))
    assert [finding.reason for finding in found] == [
        "end record does not fit the records before it"
    ]
    with StoredDelta(path) as delta:
        runs = delta.runs()
        assert next(runs).count == 1
        with pytest.raises(PhcbtError, match="does not have the root"):
            next(runs)


def rebuilt(
    header: StreamHeader, records: list[EncodedRecord], entries: list[IndexEntry] | None = None
) -> tuple[bytes, int]:
    """A stream, and another with right checks in which the (only) index lists other entries."""
    data = write_stream(header, records)
    place = index_places(data)[0]
    if entries is None:
        return data, place
    payload = b"".join(entry.encode() for entry in entries)
    head = RecordHead.build(
        Kind.INDEX, Codec.NONE, len(payload), offset=0, length=len(entries), guarded=payload
    )
    return data[:place] + head.raw + payload + data[-120:], place


def test_an_index_with_right_checks_that_lies_is_not_believed(save: Save) -> None:
    header = make_header()
    records = [encode_data(header, 0, b"a" * GRAIN, None), zero_record(header, GRAIN, GRAIN)]
    right = [
        IndexEntry(0, 112, GRAIN, Kind.DATA, Codec.NONE),
        IndexEntry(GRAIN, 112 + 56 + GRAIN, GRAIN, Kind.ZERO, Codec.NONE),
    ]
    data, place = rebuilt(header, records, right)
    assert data == rebuilt(header, records)[0]

    wrong = IndexEntry(0, 112, 2 * GRAIN, Kind.DATA, Codec.NONE)
    path = save(rebuilt(header, records, [wrong, right[1]])[0])
    with StoredDelta(path) as delta, pytest.raises(PhcbtError, match="not what the index says"):
        delta.read(0, 1)
    assert [finding.stream_offset for finding in verify_file(path)] == [place]

    wrong = IndexEntry(0, 1 << 60, GRAIN, Kind.DATA, Codec.NONE)
    with (
        StoredDelta(save(rebuilt(header, records, [wrong, right[1]])[0])) as delta,
        pytest.raises(PhcbtError, match="record's head"),
    ):
        delta.read(0, 1)

    # One entry too few: neither the index nor the blocks lead from the header to the end.
    with pytest.raises(PhcbtError, match="do not lead to the end record"):
        StoredDelta(save(rebuilt(header, records, right[:1])[0]))


def test_a_medium_that_cannot_be_read_is_damage(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header()
    path = save(write_stream(header, [encode_data(header, 0, content(2, 1, 0), None)]))
    real = os.pread

    def failing(fd: int, length: int, position: int) -> bytes:
        if position <= 112 + 56 < position + length or position == 112 + 56:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, position)

    with StoredDelta(path) as delta:
        monkeypatch.setattr("os.pread", failing)
        with pytest.raises(DamageError, match=f"{path} cannot be read: Input/output error"):
            delta.read(0, 1)
    found = list(verify_file(path))
    assert [finding.reason for finding in found] == ["header: cannot be read: Input/output error"]


def test_counts_that_lie_are_refused_before_anything_is_read(save: Save) -> None:
    header = make_header()
    payload = struct.pack(">QQQQQQ32s", 1 << 60, 0, 0, 0, 0, 0, bytes(32))
    head = RecordHead.build(Kind.END, Codec.NONE, 80, offset=0, length=0, guarded=payload)
    with pytest.raises(PhcbtError, match="records in"):
        StoredDelta(save(header.encode() + head.raw + payload))


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_verify_finds_every_flipped_bit_of_a_small_delta(save: Save, algorithm: Algorithm) -> None:
    header = make_header(8 * GRAIN + 30, algorithm=algorithm)
    data = write_stream(
        header,
        [zero_record(header, GRAIN, GRAIN), encode_data(header, 8 * GRAIN, b"x" * 30, None)],
    )
    path = save(data)
    assert list(verify_file(path)) == []
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = list(verify_file(path))
        assert found, f"bit {bit}"
        assert len(found) <= 2


def test_the_checks_are_xxh3_of_head_and_what_it_guards() -> None:
    record = encode_data(make_header(), 0, b"a" * GRAIN, None)
    raw = record.head.raw
    assert raw[32:] == xxhash.xxh3_64_digest(raw[:32] + record.digests)
