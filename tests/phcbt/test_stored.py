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


@pytest.fixture(scope="module")
def big_blocks(big: tuple[StreamHeader, bytes]) -> list[DataRecord | ZeroRecord]:
    return blocks_of(big[1])


@pytest.fixture(scope="module")
def big_indexes(big: tuple[StreamHeader, bytes]) -> list[int]:
    return index_places(big[1])


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


def test_look_ups_around_index_records(
    save: Save, big: tuple[StreamHeader, bytes], big_blocks: list[DataRecord | ZeroRecord]
) -> None:
    header, data = big
    blocks = big_blocks
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


@pytest.mark.parametrize(
    "place_in",
    [(0, 0), (0, 12), (1, 12), (1, 20), (1, 40), (1, 1264), (1, 1284), (2, 33), (2, 40), (2, 1284)],
)
def test_a_damaged_index_costs_nothing_but_itself(
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    big_indexes: list[int],
    place_in: tuple[int, int],
) -> None:
    header, data = big
    damaged = bytearray(data)
    which, at = place_in
    place = big_indexes[which]
    damaged[place + at] ^= 0x81
    path = save(bytes(damaged))
    blocks = big_blocks
    with StoredDelta(path) as delta:
        assert delta.index_damage is not None
        assert delta.index_damage.offset == place
        check_look_ups(delta, blocks)
        assert list(delta.runs()) == [block.run(header) for block in blocks]
    found = list(verify_file(path))
    assert [(finding.stream_offset, finding.disk_offset) for finding in found] == [(place, None)]


def test_an_index_that_is_damaged_after_opening_costs_nothing_either(
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    big_indexes: list[int],
) -> None:
    _, data = big
    path = save(data)
    with StoredDelta(path) as delta:
        with path.open("r+b") as file:
            for place in big_indexes:
                file.seek(place + 20)
                file.write(b"\xff\xff\xff\xff")
        check_look_ups(delta, big_blocks)
        assert delta.index_damage is not None


def test_a_group_that_no_longer_leads_to_its_index_is_refused(save: Save) -> None:
    header = make_header()
    records = [zero_record(header, 0, GRAIN), encode_data(header, GRAIN, b"a" * GRAIN, None)]
    data = write_stream(header, records)
    place = index_places(data)[0]
    path = save(data)
    with StoredDelta(path) as delta:
        # Under the open file, the index becomes one of a single entry, and the data block a zero
        # block.
        entry = data[place + 40 : place + 64]
        head = RecordHead.build(Kind.INDEX, Codec.NONE, 24, offset=0, length=1, guarded=entry)
        zeros = zero_record(header, GRAIN, GRAIN).head.raw
        path.write_bytes(data[:152] + zeros + data[192:place] + head.raw + data[place + 40 :])
        with pytest.raises(PhcbtError, match="do not lead to their index"):
            delta.find(0)
        assert delta.index_damage is not None
        assert "index of 1 entries where 2 are due" in delta.index_damage.reason


@pytest.mark.parametrize("number", [0, 1, 1023, 1024, 1500, 2048, 2099])
@pytest.mark.parametrize("at", [0, 4, 8, 20, 33])
def test_a_damaged_head_costs_one_block(
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    number: int,
    at: int,
) -> None:
    _, data = big
    blocks = big_blocks
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


def test_verify_goes_on_past_many_damages(
    save: Save, big: tuple[StreamHeader, bytes], big_blocks: list[DataRecord | ZeroRecord]
) -> None:
    _, data = big
    blocks = big_blocks
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
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    big_indexes: list[int],
) -> None:
    _, data = big
    blocks = big_blocks
    damaged = bytearray(data)
    for position in (blocks[1100].position, big_indexes[1] + 10, blocks[2099].position):
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


def test_verify_of_a_cut_or_overwritten_file(
    save: Save, big: tuple[StreamHeader, bytes], big_blocks: list[DataRecord | ZeroRecord]
) -> None:
    _, data = big
    blocks = big_blocks
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
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    big_indexes: list[int],
) -> None:
    _, data = big
    blocks = big_blocks
    damaged = bytearray(data)
    last = big_indexes[-1]
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
        if position == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, position)

    text = "cannot be read: Input/output error"
    bad = 112 + 56
    with StoredDelta(path) as delta:
        monkeypatch.setattr("os.pread", failing)
        with pytest.raises(DamageError, match=f"{path} {text}"):
            delta.read(0, 1)
    assert list(verify_file(path)) == [Finding(str(path), 112, 0, GRAIN, text)]
    bad = 112 + 56 + GRAIN
    assert list(verify_file(path)) == [Finding(str(path), bad, None, 0, f"index record: {text}")]
    bad = 0
    assert list(verify_file(path)) == [Finding(str(path), 0, None, 0, f"header: {text}")]


def test_a_read_that_comes_in_parts_is_whole(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    header = make_header()
    plain = content(2, 1, 0)
    path = save(write_stream(header, [encode_data(header, 0, plain, None)]))
    real = os.pread
    monkeypatch.setattr("os.pread", lambda fd, n, at: real(fd, min(n, 1000), at))
    with StoredDelta(path) as delta:
        assert delta.read(0, GRAIN) == [(0, plain)]


def test_a_file_that_shrinks_while_open_is_damage(save: Save) -> None:
    header = make_header()
    path = save(write_stream(header, [encode_data(header, 0, content(2, 1, 0), None)]))
    with StoredDelta(path) as delta:
        os.truncate(path, 400)
        with pytest.raises(PhcbtError, match=f"{path}: the file ends"):
            delta.read(0, GRAIN)


def test_plain_bytes_of_a_zero_block_are_zeros(save: Save) -> None:
    header = make_header()
    with StoredDelta(save(write_stream(header, [zero_record(header, 0, GRAIN)]))) as delta:
        entry = delta.find(0)
        assert entry is not None
        assert delta.plain(entry) == bytes(GRAIN)


def end_of(data: bytes, last_index: int) -> bytes:
    """The stream with an end record that names another last index."""
    payload = data[-80:-40] + last_index.to_bytes(8, "big") + data[-32:]
    head = RecordHead.build(Kind.END, Codec.NONE, 80, offset=0, length=0, guarded=payload)
    return data[:-120] + head.raw + payload


def index_with(data: bytes, place: int, *, previous: int | None = None, first: int = 0) -> bytes:
    """The stream with an index record, its check right, that has another chain or first offset."""
    head = RecordHead.decode(data[place : place + 40], place)
    payload = bytearray(data[place + 40 : place + 40 + head.payload_length])
    if first:
        payload[:8] = first.to_bytes(8, "big")
    new = RecordHead.build(
        Kind.INDEX,
        Codec.NONE,
        len(payload),
        offset=head.offset if previous is None else previous,
        length=head.length,
        guarded=bytes(payload),
    )
    return data[:place] + new.raw + payload + data[place + 40 + len(payload) :]


def test_a_chain_with_right_checks_that_leads_astray_is_left_for_the_heads(
    save: Save,
    big: tuple[StreamHeader, bytes],
    big_blocks: list[DataRecord | ZeroRecord],
    big_indexes: list[int],
) -> None:
    _, data = big
    first, second, third = big_indexes
    too_long = RecordHead.build(
        Kind.INDEX, Codec.NONE, 24 * 1024, offset=second, length=1024, guarded=b""
    )
    for crafted, reason in [
        (end_of(data, 1 << 63), "leads nowhere"),
        (end_of(data, 0), "leads nowhere"),
        (end_of(data, second), "index of 1024 entries where 52 are due"),
        (end_of(data, big_blocks[2099].position), "record where an index should be"),
        (index_with(data, second, previous=third), "leads nowhere"),
        (index_with(data, first, previous=112), "longer than the stream"),
        (index_with(data, second, first=1 << 40), "do not ascend"),
        (data[:third] + too_long.raw + data[third + 40 :], "ends inside an index record"),
    ]:
        path = save(crafted)
        with StoredDelta(path) as delta:
            assert delta.index_damage is not None
            assert reason in delta.index_damage.reason
            if "ascend" not in reason:
                check_look_ups(delta, big_blocks)
        assert len(list(verify_file(path))) == 1


def test_an_index_entry_that_cannot_be_is_refused(save: Save) -> None:
    header = make_header()
    data = write_stream(header, [zero_record(header, 0, GRAIN)])
    place = index_places(data)[0]
    payload = bytearray(data[place + 40 : place + 64])
    payload[20] = 7
    head = RecordHead.build(Kind.INDEX, Codec.NONE, 24, offset=0, length=1, guarded=bytes(payload))
    path = save(data[:place] + head.raw + payload + data[-120:])
    with StoredDelta(path) as delta, pytest.raises(PhcbtError, match="entry of kind 7") as caught:
        delta.find(0)
    assert caught.value.offset == place
    assert [finding.stream_offset for finding in verify_file(path)] == [place]


def test_blocks_out_of_order_are_found_without_the_index_too(save: Save) -> None:
    header = make_header()
    one, two = zero_record(header, 0, GRAIN), zero_record(header, GRAIN, GRAIN)
    data = write_stream(header, [one, two])
    swapped = data[:112] + two.head.raw + one.head.raw + data[192:]
    found = list(verify_file(save(swapped)))
    assert [finding.stream_offset for finding in found] == [152]
    broken = bytearray(swapped)
    broken[192] ^= 1
    with pytest.raises(PhcbtError, match="after"):
        StoredDelta(save(bytes(broken)))


def test_a_stream_without_its_last_index_is_not_whole(save: Save) -> None:
    header = make_header()
    data = write_stream(header, [zero_record(header, 0, GRAIN)])
    path = save(end_of(data[:152] + data[-120:], 0))
    found = list(verify_file(path))
    assert [finding.reason for finding in found] == ["no index record before the end"]
    with pytest.raises(PhcbtError, match="do not lead to the end"):
        StoredDelta(path)
    # A cut just after a short index that is not right.
    cut = bytearray(data[:-120])
    cut[-1] ^= 1
    reasons = [finding.reason for finding in verify_file(save(bytes(cut)))]
    assert len(reasons) == 2
    assert "check of the index record" in reasons[1]
    # And one whose check is right but that lists something else.
    crafted = index_with(data[:-120], 152, first=GRAIN)
    reasons = [finding.reason for finding in verify_file(save(crafted))]
    assert "does not list the blocks" in reasons[1]


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
