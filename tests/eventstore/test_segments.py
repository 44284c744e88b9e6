# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import base64
import errno
import fcntl
import io
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import zstandard
from eventsourcing.persistence import (
    DataError,
    InterfaceError,
    Notification,
    OperationalError,
    StoredEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore import segment_reader, segment_writer
from eventstore.mapper import EventMapper
from eventstore.merkle import Frontier, leaf_hash
from eventstore.records import canonical_record, originator_key
from eventstore.segment_format import (
    Block,
    Chunk,
    Header,
    Stream,
    Tail,
    chunked,
    footer_start,
    pack_footer,
    pack_header,
    pack_stream,
    pack_tail,
    unpack_header,
    unpack_streams,
)
from eventstore.segment_records import BLOCK_BYTES_MAX, decompress, pack_block
from eventstore.segments import (
    CanonicalParts,
    Segment,
    SegmentError,
    SegmentInfo,
    export_json_lines,
    read_json_lines,
    split_canonical,
    write_segment,
)
from tests.eventstore.accounts import ACCOUNT, STAMP, TYPES, Account

KEYS = [
    originator_key(UUID(int=1)),
    originator_key("text/ü"),
    originator_key(UUID(int=1 << 100)),
    originator_key("x" * 400),
]


def leaves_of(records: list[CanonicalParts]) -> list[bytes]:
    return [leaf_hash(canonical_record(*record)) for record in records]


def make(count: int, first: int = 1, seed: int = 5) -> list[CanonicalParts]:
    """Records of four streams that take turns, each with versions of its own."""
    luck = random.Random(seed)
    versions = dict.fromkeys(KEYS, 0)
    records = []
    for nid in range(first, first + count):
        key = KEYS[nid % len(KEYS)]
        versions[key] += 1
        state = luck.randbytes(luck.randrange(40))
        records.append(CanonicalParts(nid, key, versions[key], f"topic-{nid % 3}", state))
    return records


def seal(
    path: Path, records: Iterable[CanonicalParts], before: Frontier | None = None, **more: Any
) -> SegmentInfo:
    before = before or Frontier()
    arguments: dict[str, Any] = {
        "origin": "a.example/log",
        "label": "2026-03",
        "first": before.size + 1,
        "frontier": before.hashes,
        "checkpoint": "a.example/log\n3\nroot\n\n— signed ✓\n",
        "level": 3,
    }
    if "last" not in more:
        records = list(records)
        arguments["last"] = before.size + len(records)
    return write_segment(path, records=records, **arguments | more)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.seg"
    seal(path, make(5))
    return path


def read_everything(path: Path) -> tuple[Any, ...]:
    with Segment.open(path) as segment:
        return (
            segment.info._replace(path=""),
            list(segment.records()),
            [segment.stream(key) for key in KEYS],
            segment.leaf_hashes(segment.info.first, 5),
        )


# What goes in comes out


@st.composite
def histories(draw: st.DrawFn) -> tuple[Frontier, list[CanonicalParts]]:
    before = Frontier()
    before.extend([bytes([number & 255]) * 32 for number in range(draw(st.integers(0, 600)))])
    keys = draw(
        st.lists(
            st.uuids().map(originator_key) | st.text(min_size=1, max_size=50).map(originator_key),
            min_size=1,
            max_size=5,
        )
    )
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(keys),
                st.integers(0, (1 << 63) - 1),
                st.text(min_size=1, max_size=20),
                st.binary(max_size=60),
            ),
            min_size=1,
            max_size=40,
        )
    )
    rows *= draw(st.integers(1, 12))
    records = [CanonicalParts(before.size + n, *row) for n, row in enumerate(rows, 1)]
    return before, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("segments")


@settings(deadline=None, max_examples=40)
@given(history=histories(), low=st.integers(-5, 1100), high=st.integers(-5, 1100))
def test_what_is_sealed_is_read(
    folder: Path, history: tuple[Frontier, list[CanonicalParts]], low: int, high: int
) -> None:
    before, records = history
    path = folder / "history.seg"
    path.unlink(missing_ok=True)
    info = seal(path, records, before)
    with Segment.open(path) as segment:
        assert segment.info == info
        segment.verify()
        assert list(segment.records()) == records
        assert list(segment.records(low, high)) == [r for r in records if low <= r.nid <= high]
        assert segment.leaf_hashes(info.first, len(records)) == leaves_of(records)
        for key in {record.key for record in records}:
            versions = [record.version for record in records if record.key == key]
            middle = sorted(versions)[len(versions) // 2]
            found = segment.stream(key)
            assert [event.originator_version for event in found] == sorted(versions)
            upper = segment.stream(key, gt=middle)
            assert [e.originator_version for e in upper] == sorted(
                v for v in versions if v > middle
            )
            lower = segment.stream(key, lte=middle)
            assert [e.originator_version for e in lower] == sorted(
                v for v in versions if v <= middle
            )
    after = before.copy()
    after.extend(leaves_of(records))
    assert info.root == after.root()
    assert (info.size_before, info.frontier_before) == (before.size, before.hashes)


def test_it_says_what_it_holds(small: Path) -> None:
    info = Segment.open(small).info
    assert (info.origin, info.label, info.first, info.last) == ("a.example/log", "2026-03", 1, 5)
    assert info.checkpoint.endswith("signed ✓\n")
    assert (info.blocks, info.streams, info.path) == (1, 4, str(small))
    assert info.record_bytes == sum(len(canonical_record(*record)) for record in make(5))
    assert info.file_bytes == small.stat().st_size
    assert small.stat().st_mode & 0o777 == 0o600


def test_records_come_as_the_library_knows_them(small: Path) -> None:
    records = make(5)
    with Segment.open(small) as segment:
        notes = list(segment.notifications(2, 3))
        assert notes == [
            Notification(r.originator_id, r.version, r.topic, r.state, r.nid) for r in records[1:3]
        ]
        second = records[1]
        assert segment.stream(second.key) == [
            StoredEvent(second.originator_id, second.version, second.topic, second.state)
        ]
        assert segment.stream(originator_key("nobody")) == []
        assert segment.stream(b"") == []


def test_one_stream_is_read_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make(2000)
    rare = originator_key("rare")
    records[777] = records[777]._replace(key=rare)
    seal(tmp_path / "a.seg", records)
    lengths: list[int] = []

    def counted(stored: bytes, length: int, *rest: Any) -> bytes:
        lengths.append(length)
        return decompress(stored, length, *rest)

    with Segment.open(tmp_path / "a.seg") as segment:
        monkeypatch.setattr(segment_reader, "decompress", counted)
        assert [event.state for event in segment.stream(rare)] == [records[777].state]
        assert len(lengths) == 2  # its part of the index, its block
        assert segment.stream(rare, gt=records[777].version) == []
        assert len(lengths) == 3  # the index alone says so


def test_segments_that_follow_each_other_chain(tmp_path: Path) -> None:
    records = make(700)
    first = seal(tmp_path / "a.seg", records[:300])
    after = Frontier()
    after.extend(leaves_of(records[:300]))
    second = seal(tmp_path / "b.seg", records[300:], after)
    assert first.root == Frontier(second.size_before, second.frontier_before).root()
    after.extend(leaves_of(records[300:]))
    assert second.root == after.root()
    # Blocks keep to the tree's runs of 256 leaves: 301..512, 513..700.
    with Segment.open(tmp_path / "b.seg") as segment:
        assert [(block.first, block.records) for block in segment._tail.blocks] == [
            (301, 212),
            (513, 188),
        ]


def test_a_block_ends_early_where_it_would_be_too_large(tmp_path: Path) -> None:
    records = [CanonicalParts(n, KEYS[0], n, "t", bytes([n]) * (6 << 20)) for n in range(1, 5)]
    records.append(CanonicalParts(5, KEYS[0], 5, "t", bytes(16 << 20)))
    seal(tmp_path / "a.seg", records, level=1)
    with Segment.open(tmp_path / "a.seg") as segment:
        assert [block.records for block in segment._tail.blocks] == [2, 2, 1]
        assert (
            sha256(segment.stream(KEYS[0], gt=4)[0].state).digest()
            == sha256(bytes(16 << 20)).digest()
        )


def test_a_closed_segment_says_so(small: Path) -> None:
    segment = Segment.open(small)
    segment.close()
    segment.close()
    with pytest.raises(InterfaceError, match="is closed"):
        list(segment.records())


def test_leaf_hashes_only_of_what_is_here(small: Path) -> None:
    with Segment.open(small) as segment:
        assert segment.leaf_hashes(2, 0) == []
        for first, count in [(0, 1), (1, 6), (6, 1), (1, -1)]:
            with pytest.raises(SegmentError, match="are not all here"):
                segment.leaf_hashes(first, count)


# Damage


def test_every_flipped_bit_is_found(small: Path) -> None:
    good, whole = read_everything(small), small.read_bytes()
    found = 0
    for at, bit in itertools.product(range(len(whole)), range(8)):
        with small.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << bit]))
        try:
            assert read_everything(small) == good  # a part that none of these reads
        except SegmentError as error:
            assert error.reason  # noqa: PT017 - both outcomes are right
            found += 1
        else:
            with pytest.raises(SegmentError), Segment.open(small) as segment:
                segment.verify()
        small.write_bytes(whole)
    assert found > len(whole) * 7


def test_every_truncation_is_found(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(SegmentError):
            Segment.open(small)
    small.write_bytes(whole + b"\x00")
    with pytest.raises(SegmentError, match="cut off"):
        Segment.open(small)


def test_a_file_that_becomes_shorter_while_it_is_open_is_found(small: Path) -> None:
    with Segment.open(small) as segment:
        os.truncate(small, 200)
        with pytest.raises(SegmentError, match="shorter"):
            list(segment.records())


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SegmentError, match="no file"):
        Segment.open(tmp_path / "pipe")
    with pytest.raises(OperationalError, match="No such file"):
        Segment.open(tmp_path / "nothing")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (split_canonical, lambda data: list(unpack_streams(data, 5, 0)), unpack_header):
        with suppress(SegmentError):
            read(data)


# Forgeries: whoever makes a file makes its checks too


def forge(path: Path, change: Callable[[Tail], Tail]) -> None:
    """Put a tail of another kind at the end of a segment, with all checks right."""
    whole = path.read_bytes()
    with Segment.open(path) as segment:
        tail = change(segment._tail)
        offset = segment._tail.chunks[-1].offset + segment._tail.chunks[-1].stored
    packed = pack_tail(tail)
    start = whole[:offset] + packed + footer_start(offset, packed)
    path.write_bytes(whole[:offset] + packed + pack_footer(offset, packed, sha256(start).digest()))


def first_block(**changes: Any) -> Callable[[Tail], Tail]:
    return lambda tail: tail._replace(
        blocks=(tail.blocks[0]._replace(**changes), *tail.blocks[1:]),
        record_bytes=changes.get("length", tail.record_bytes),
    )


def first_chunk(**changes: Any) -> Callable[[Tail], Tail]:
    return lambda tail: tail._replace(chunks=(tail.chunks[0]._replace(**changes),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tail: tail._replace(root=bytes(32)), "do not lead from the frontier"),
        (lambda tail: tail._replace(streams=3), "number of streams"),
        (lambda tail: tail._replace(records=6), "totals"),
        (lambda tail: tail._replace(record_bytes=1), "totals"),
        (lambda tail: tail._replace(blocks=tail.blocks * 2), "block 1 cannot be|blocks end"),
        (lambda tail: tail._replace(chunks=()), "does not fit"),
        (lambda tail: tail._replace(chunks=tail.chunks * 2), "cannot be"),
        (first_block(tree_hash=bytes(32)), r"block 0, records 1\.\.5"),
        (first_block(records=4), "blocks end before record 5, not 6"),
        (first_block(records=0), "block 0 cannot be"),
        (first_block(records=257), "block 0 cannot be"),
        (first_block(length=BLOCK_BYTES_MAX + 1), "block 0 cannot be"),
        (first_block(length=BLOCK_BYTES_MAX), "a frame says"),
        (first_block(length=200), "a frame says"),
        (first_block(stored=(1 << 32) - 1), "does not fit"),
        (first_block(stored=0), "does not fit"),
        (first_chunk(length=(16 << 20) + 1), "cannot be"),
        (first_chunk(length=16 << 20), "a frame says"),
        (first_chunk(key=KEYS[1]), "begins with another"),
    ],
)
def test_a_forged_directory_is_refused(
    small: Path, change: Callable[[Tail], Tail], message: str
) -> None:
    forge(small, change)
    with pytest.raises(SegmentError, match=message), Segment.open(small) as segment:
        segment.verify()


def test_another_frontier_does_not_lead_to_the_root(tmp_path: Path) -> None:
    before = Frontier()
    before.extend([bytes(32)])
    seal(tmp_path / "a.seg", make(5, first=2), before)
    whole = (tmp_path / "a.seg").read_bytes()
    header, length = unpack_header(whole)
    forged = pack_header(header._replace(frontier=(bytes(31) + b"\x01",))) + whole[length:]
    (tmp_path / "a.seg").write_bytes(forged)
    forge(tmp_path / "a.seg", lambda tail: tail)
    with (
        Segment.open(tmp_path / "a.seg") as segment,
        pytest.raises(SegmentError, match="do not lead"),
    ):
        segment.verify()


def test_an_index_that_leaves_something_out_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(streams: Iterator[Stream]) -> Iterator[tuple[bytes, bytes]]:
        return chunked(stream._replace(events=2) for stream in streams)

    monkeypatch.setattr(segment_writer, "chunked", fewer)
    with pytest.raises(SegmentError, match="is not right"):
        seal(tmp_path / "a.seg", make(5))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Segment, "verify", lambda _: None)
    seal(tmp_path / "a.seg", make(5))
    message = "1 events of a stream, its index says 2"
    with Segment.open(tmp_path / "a.seg") as segment, pytest.raises(SegmentError, match=message):
        segment.stream(KEYS[0])


def test_bombs_do_not_go_off() -> None:
    context = zstandard.ZstdDecompressor()
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(64 << 20))
    # The frame's own word on its size, made to say 1000.
    lying = bomb.replace((64 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"), 1)
    assert zstandard.get_frame_parameters(lying).content_size == 1000
    for frame, message in [
        (bomb, "says 67108864 bytes, not 1000"),
        (unsized, "not 1000"),
        (lying, "does not decompress"),
        (b"", "does not decompress"),
        (zstandard.ZstdCompressor().compress(bytes(1000)) + b"\x00", "does not decompress"),
    ]:
        with pytest.raises(SegmentError, match=message):
            decompress(frame, 1000, 7, context)


def test_counts_in_the_index_are_not_believed() -> None:
    def entry(**changes: Any) -> bytes:
        good = Stream(KEYS[0], 3, 1, 3, (0, 2, 4))
        return pack_stream(good._replace(**changes))

    assert [s.blocks for s in unpack_streams(entry(), 5, 0)] == [(0, 2, 4)]
    huge = entry()[:39] + b"\xff\xff\xff\xff" + entry()[43:]
    for bad in [
        entry(blocks=(0, 2, 5)),
        entry(blocks=(2, 2)),
        entry(blocks=()),
        entry(events=2),
        entry(least=4),
        huge,
        entry() * 2,
        entry()[:-1],
        entry()[:-3] + b"\xff\xff\xff\xff\xff",
    ]:
        with pytest.raises(SegmentError):
            list(unpack_streams(bad, 5, 0))


@pytest.mark.parametrize(
    "record",
    [
        canonical_record(1, b"\x02" + bytes(16), 1, "t", b""),
        canonical_record(1, b"\x00" + bytes(15), 1, "t", b""),
        canonical_record(1, b"\x01\x00\x02x", 1, "t", b""),
        canonical_record(1, b"\x01\x00\x01\xff", 1, "t", b""),
        canonical_record(1, KEYS[0], 1 << 63, "t", b""),
        canonical_record(1, KEYS[0], 1, "t", b"") + b"x",
        canonical_record(1, KEYS[0], 1, "t", b"x")[:-1],
        canonical_record(1, KEYS[0], 1, "t", b"").replace(b"t", b"\xff"),
        b"\x02" + canonical_record(1, KEYS[0], 1, "t", b"")[1:],
    ],
)
def test_what_is_no_canonical_record_is_refused(record: bytes) -> None:
    with pytest.raises(SegmentError):
        split_canonical(record)


def test_a_canonical_record_comes_apart() -> None:
    for record in make(8):
        assert split_canonical(canonical_record(*record)) == record


# Writing: none or a whole one


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"records": make(4)}, "the records end before 5"),
        ({"records": make(6)}, "record 6 came where 6 of 5"),
        ({"records": make(5, first=2)}, "record 2 came where 1"),
        ({"records": [*make(2), *make(3)]}, "record 1 came where 3"),
        ({"records": [make(1)[0]._replace(version=-1)]}, "version -1"),
        ({"records": [make(1)[0]._replace(key=b"odd")]}, "no key"),
        ({"records": [make(1)[0]._replace(topic="")]}, "topic"),
        ({"root": bytes(32)}, "do not lead to the root"),
        ({"first": 0}, "cannot hold records"),
        ({"last": 0}, "cannot hold records"),
        ({"frontier": (bytes(32),)}, "no frontier"),
        ({"origin": "x" * 1025}, "origin has 1025 bytes"),
        ({"label": "\ud800"}, "label is not valid text"),
        ({"checkpoint": "x" * 65537}, "checkpoint has 65537"),
        ({"checkpoint": "\ud800"}, "checkpoint is not valid text"),
    ],
)
def test_what_cannot_be_sealed_leaves_nothing(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"records": make(5), "last": 5} | more
    with pytest.raises(DataError, match=message):
        seal(tmp_path / "a.seg", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[CanonicalParts]:
        yield from make(3)
        raise KeyError("the source")

    with pytest.raises(KeyError, match="the source"):
        seal(tmp_path / "a.seg", failing(), last=5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_never_replaced(small: Path) -> None:
    whole = small.read_bytes()
    with pytest.raises(OperationalError, match="is there already"):
        seal(small, make(4))
    assert small.read_bytes() == whole
    assert list(small.parent.iterdir()) == [small]


def test_only_one_writes_a_segment_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "a.seg.building").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OperationalError, match="is being written by another"):
            seal(tmp_path / "a.seg", make(5))
        assert (tmp_path / "a.seg.building").exists()
    seal(tmp_path / "a.seg", make(5))  # what a dead writer left is replaced


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_full_or_failing_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OperationalError, match=r"a\.seg: No space left on device"):
        seal(tmp_path / "a.seg", make(5))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_the_steps_come_in_the_durable_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_rename, real_verify = os.fsync, os.rename, Segment.verify

    def fsync(fd: int) -> None:
        steps.append("fsync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real_fsync(fd)

    def rename(old: Path, new: Path) -> None:
        steps.append(f"rename {old.name} {new.name}")
        real_rename(old, new)

    def verify(segment: Segment) -> None:
        steps.append("verify")
        real_verify(segment)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(Segment, "verify", verify)
    seal(tmp_path / "a.seg", make(5))
    assert steps == [
        "fsync a.seg.building",
        "verify",
        "rename a.seg.building a.seg",
        f"fsync {tmp_path.name}",
    ]


def test_a_kill_at_any_step_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    steps = ("write", "fsync", "posix_fadvise", "rename", "ftruncate")
    whole = 0
    for kill_at in itertools.count(1):
        path = tmp_path / f"{kill_at}.seg"
        child = os.fork()
        if not child:
            _die_at(kill_at, steps, path)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 7
        if path.exists():
            whole += 1
        else:
            seal(path, make(300))
        with Segment.open(path) as segment:
            segment.verify()
            assert list(segment.records()) == make(300)
    assert kill_at > 10
    assert whole == 1  # only the folder's own fsync comes after the rename


def _die_at(number: int, steps: tuple[str, ...], path: Path) -> None:
    """In the child: seal, and end without any cleaning up just before the step of that number."""
    count = itertools.count(1)

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            if next(count) == number:
                os._exit(7)
            return real(*args)

        return step

    try:
        for name in steps:
            setattr(os, name, dying(getattr(os, name)))
        seal(path, make(300))
    except BaseException:  # noqa: BLE001 - nothing of the test may go on in the child
        os._exit(8)
    os._exit(0)


# An open format


def test_json_lines_are_what_they_say() -> None:
    event: Any = Account.Credited
    mapper = EventMapper(types=TYPES)
    stored = mapper.to_stored_event(
        event(originator_id=ACCOUNT, originator_version=2, timestamp=STAMP, cents=5, reason="r")
    )
    records = [
        CanonicalParts(8, originator_key(ACCOUNT), 2, stored.topic, stored.state),
        CanonicalParts(9, originator_key("text/ü"), 1, "unknown", b"\x00\xff"),
    ]
    file = io.BytesIO()
    assert export_json_lines(records, file, mapper) == 2
    first, second = map(json.loads, file.getvalue().splitlines())
    assert first == {
        "nid": 8,
        "id": str(ACCOUNT),
        "id_type": "uuid",
        "version": 2,
        "topic": "test:account.credited",
        "state": base64.b64encode(stored.state).decode(),
        "fields": {"timestamp": "2026-03-04T05:06:07.890123Z", "cents": 5, "reason": "r"},
    }
    assert (second["id"], second["id_type"], second["state"]) == ("text/ü", "text", "AP8=")
    assert "'unknown' is not registered" in second["unreadable"]
    file.seek(0)
    assert list(read_json_lines(file)) == records


def test_a_segment_is_exported_and_sealed_again(small: Path) -> None:
    file = io.BytesIO()
    with Segment.open(small) as segment:
        assert export_json_lines(segment, file) == 5
    file.seek(0)
    again = small.with_name("again.seg")
    seal(again, read_json_lines(file))
    assert again.read_bytes() == small.read_bytes()


GOOD = b'{"nid":8,"id":"x","id_type":"text","version":1,"topic":"t","state":"AP8="}\n'


@pytest.mark.parametrize(
    "bad",
    [
        GOOD[:-1],
        b"\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        GOOD.replace(b'"nid":8', b'"nid":9'),
        GOOD.replace(b'"nid":8', b'"nid":0'),
        GOOD.replace(b'"nid":8', b'"nid":true'),
        GOOD.replace(b'"nid":8', b'"nid":1e99'),
        GOOD.replace(b'"nid":8,', b""),
        GOOD.replace(b'"version":1', b'"version":-1'),
        GOOD.replace(b"AP8=", b"AP8"),
        GOOD.replace(b'"text"', b'"uuid"'),
        GOOD.replace(b'"text"', b'"uuid"').replace(b'"x"', b'"{%s}"' % str(ACCOUNT).encode()),
        GOOD.replace(b'"text"', b'"other"'),
        GOOD.replace(b'"x"', b'""'),
        GOOD.replace(b'"t"', b'""'),
        GOOD.replace(b'"x"', b'"\xff"'),
    ],
)
def test_a_bad_line_is_named(bad: bytes) -> None:
    good = GOOD.replace(b'"nid":8', b'"nid":7')
    lines = read_json_lines(io.BytesIO(good + bad))
    assert next(lines).state == b"\x00\xff"
    with pytest.raises(DataError, match="line 2 is"):
        next(lines)


GOLDEN = [
    "f16b65853f86927c",
    "433081a7cb79398c",
    "0a4131e8a4f79226",
    "7d4fddf53bcd4c7d",
    "68f923eb035ba21e",
]


def test_the_format_is_what_it_always_was() -> None:
    """Segments are kept for ever. Frames are left out: another zstd may compress otherwise."""
    header = Header(2, 3, (bytes(range(32)),), "o", "l", b"dict")
    tail = Tail(
        records=2,
        record_bytes=90,
        streams=1,
        root=b"r" * 32,
        checkpoint="c",
        blocks=(Block(0, 2, 2, 90, 60, b"k" * 8, b"h" * 32),),
        chunks=(Chunk(60, 50, 40, b"i" * 8, b"key"),),
    )
    parts = [
        pack_header(header),
        pack_block([canonical_record(*record) for record in make(2)]),
        pack_stream(Stream(b"key", 300, 1, 300, (0, 200, 201))),
        pack_tail(tail),
        pack_footer(100, pack_tail(tail), bytes(32)),
    ]
    assert [sha256(part).hexdigest()[:16] for part in parts] == GOLDEN
