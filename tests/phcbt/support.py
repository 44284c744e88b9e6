# SPDX-License-Identifier: AGPL-3.0-or-later
"""Small streams, disks to make them from, and blocks that break one rule, their check in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

import hypothesis.strategies as st

from replicator.phcbt import (
    NEED_DATA,
    Algorithm,
    DataRecord,
    Decoder,
    EncodedRecord,
    End,
    Event,
    Header,
    IndexRecord,
    StreamHeader,
    StreamWriter,
    encode_chunk,
)
from replicator.phcbt.format import Codec, Kind, RecordHead

GRAIN = 4096
CHUNK = 4 * GRAIN


def make_header(
    disk_size: int = 64 * GRAIN,
    *,
    algorithm: Algorithm = Algorithm.XXH3_128,
    base: int = 0,
    target: int = 1,
    chunk: int = CHUNK,
) -> StreamHeader:
    return StreamHeader(
        algorithm=algorithm,
        grain=GRAIN,
        chunk=chunk,
        disk_size=disk_size,
        vm=UUID("00112233-4455-6677-8899-aabbccddeeff"),
        base_point=base,
        target_point=target,
        base_root=bytes(32) if base == 0 else b"\x07" * 32,
        disk_id="disk-0",
    )


def write_stream(header: StreamHeader, records: Iterable[EncodedRecord]) -> bytes:
    writer = StreamWriter(header)
    pieces: list[bytes | memoryview] = [writer.start()]
    for record in records:
        pieces += writer.add(record)
    pieces.append(writer.finish())
    data = b"".join(pieces)
    assert writer.position == len(data)
    return data


def events_of(data: bytes, cuts: Iterable[int] = ()) -> list[Event]:
    """Decode a whole stream that arrives cut at the given positions."""
    decoder = Decoder()
    events: list[Event] = []
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        decoder.receive_data(data[at:cut])
        at = cut
        while True:
            event = decoder.next_event()
            if event is NEED_DATA:
                break
            events.append(event)
    decoder.close()
    return events


def apply(disk: bytearray, data: bytes) -> StreamHeader:
    """Apply a stream to a disk image, which grows as needed."""
    header: StreamHeader | None = None
    for event in events_of(data):
        if isinstance(event, Header):
            header = event.header
            disk.extend(bytes(header.disk_size - len(disk)))
        elif not isinstance(event, (IndexRecord, End)):
            assert header is not None
            plain = event.plain(header) if isinstance(event, DataRecord) else bytes(event.length)
            disk[event.offset : event.offset + event.length] = plain
    assert header is not None
    return header


@dataclass(frozen=True)
class Change:
    """New contents for each grain from ``first`` on: 0 zeros, 1 text, 2 noise."""

    first: int
    kinds: tuple[int, ...]
    seed: int


def content(kind: int, seed: int, grain: int) -> bytes:
    if kind == 0:
        return bytes(GRAIN)
    if kind == 1:
        return (b"grain %d of %d. " % (grain, seed) * GRAIN)[:GRAIN]
    state = seed * 1_000_003 + grain + 1
    noise = bytearray()
    while len(noise) < GRAIN:
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        noise += (state >> 24).to_bytes(5, "big")
    return bytes(noise[:GRAIN])


changes = st.lists(
    st.builds(
        Change,
        st.integers(0, 23),
        st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple),
        st.integers(0, 3),
    ),
    max_size=4,
)
sizes = st.integers(1, 24 * GRAIN)
levels = st.sampled_from([None, -5, 1, 3])


def changed_disk(disk: bytes, size: int, change_set: Iterable[Change]) -> tuple[bytes, set[int]]:
    """The disk after the changes, at its new size, and the grains that they touched."""
    image = bytearray(disk) + bytes(size - len(disk))
    grains = -(-size // GRAIN)
    touched: set[int] = set()
    for change in change_set:
        for grain, kind in enumerate(change.kinds, change.first):
            if grain < grains:
                start = grain * GRAIN
                piece = content(kind, change.seed, grain)[: size - start]
                image[start : start + len(piece)] = piece
                touched.add(grain)
    return bytes(image), touched


def records_of(
    header: StreamHeader, disk: bytes, touched: Iterable[int], level: int | None
) -> Iterator[EncodedRecord]:
    """What a source sends for these grains: runs of them, cut at chunk borders."""
    run: list[int] = []
    per_chunk = header.chunk // GRAIN
    for grain in [*sorted(touched), -1]:
        if run and (grain != run[-1] + 1 or grain % per_chunk == 0):
            start = run[0] * GRAIN
            yield from encode_chunk(header, start, disk[start : (run[-1] + 1) * GRAIN], level)
            run = []
        run.append(grain)


def raw_block(
    header: StreamHeader,
    offset: int,
    length: int,
    *,
    kind: Kind = Kind.DATA,
    codec: Codec = Codec.NONE,
    payload: bytes | None = None,
    payload_length: int | None = None,
    digests: bytes | None = None,
) -> bytes:
    """A block with a right check, whatever else is wrong with it."""
    if payload is None:
        payload = b"" if kind is Kind.ZERO else b"x" * min(length, 1 << 16)
    if digests is None:
        digests = b"" if kind is Kind.ZERO else header.algorithm.digest_grains(payload, GRAIN)
    head = RecordHead.build(
        kind,
        codec,
        len(payload) if payload_length is None else payload_length,
        offset=offset,
        length=length,
        guarded=digests,
    )
    return head.raw + digests + payload
