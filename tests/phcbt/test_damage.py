# SPDX-License-Identifier: AGPL-3.0-or-later
"""What breaks the format is a typed error with its place, never a wrong byte, at no memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
import zstandard

from replicator.errors import DamageError, PhcbtError
from replicator.phcbt import (
    NEED_DATA,
    Algorithm,
    DataRecord,
    Decoder,
    Header,
    Limits,
    StreamHeader,
    StreamWriter,
    encode_data,
    zero_record,
)
from replicator.phcbt.format import CHUNK_MAX, Codec, Kind, RecordHead
from tests.phcbt.support import (
    CHUNK,
    GRAIN,
    content,
    events_of,
    make_header,
    raw_block,
    write_stream,
)


def read_all(data: bytes) -> list[tuple[int, bytes]]:
    """Everything that a stream says of a disk, all of it verified."""
    result = []
    header: StreamHeader | None = None
    for event in events_of(data):
        if isinstance(event, Header):
            header = event.header
            result.append((-1, header.encode()))
        elif isinstance(event, DataRecord):
            assert header is not None
            result.append((event.offset, bytes(event.plain(header))))
        else:
            result.append((event.position, bytes(event.raw)))
    return result


def small_stream(algorithm: Algorithm = Algorithm.XXH3_128) -> bytes:
    """Compressed data with a grain of zeros, a zero record, plain data that ends inside a grain."""
    header = make_header(9 * GRAIN + 100, algorithm=algorithm)
    return write_stream(
        header,
        [
            encode_data(header, 0, content(1, 0, 0) + bytes(GRAIN), 3),
            zero_record(header, 3 * GRAIN, GRAIN),
            encode_data(header, 9 * GRAIN, content(2, 1, 0)[:100], 3),
        ],
    )


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_every_flipped_bit_is_found(algorithm: Algorithm) -> None:
    """Or, in bits of a zstd frame that have no meaning, changes no plain byte."""
    data = small_stream(algorithm)
    want = read_all(data)
    harmless = 0
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            got = read_all(bytes(damaged))
        except (PhcbtError, DamageError):
            continue
        assert got == want, f"bit {bit}"
        harmless += 1
    # A few bits of the compressed frame: all else has a check or a digest.
    assert harmless <= 8, harmless


@pytest.mark.parametrize("codec_level", [None, 3])
def test_a_flipped_payload_byte_names_record_and_grain(codec_level: int | None) -> None:
    header = make_header()
    record = encode_data(header, CHUNK, content(1, 1, 0) * 3, codec_level)
    data = bytearray(write_stream(header, [record]))
    position = len(header.encode())
    if codec_level is None:
        data[position + 40 + 3 * 16 + GRAIN] ^= 1
        text = f"record at stream byte {position}: 1 grain.*grain 5 .disk byte {5 * GRAIN}"
        with pytest.raises(DamageError, match=text):
            read_all(bytes(data))
    else:
        data[position + 40 + 3 * 16] ^= 1
        with pytest.raises(PhcbtError, match="not a zstd frame") as caught:
            read_all(bytes(data))
        assert caught.value.offset == position


def test_cut_at_every_byte_is_truncated() -> None:
    data = small_stream()
    for length in range(len(data)):
        decoder = Decoder()
        decoder.receive_data(data[:length])
        while decoder.next_event() is not NEED_DATA:
            pass
        with pytest.raises(PhcbtError, match="ends before its end record") as caught:
            decoder.close()
        assert caught.value.offset == length
        with pytest.raises(PhcbtError, match="ends before"):
            decoder.receive_data(b"x")


def test_nothing_may_follow_the_end_in_the_same_block_or_the_next() -> None:
    data = small_stream()
    with pytest.raises(PhcbtError, match="after the end") as caught:
        events_of(data + b"x")
    assert caught.value.offset == len(data)
    decoder = Decoder()
    decoder.receive_data(data)
    while decoder.next_event() is not NEED_DATA:
        pass
    decoder.receive_data(b"")
    with pytest.raises(PhcbtError, match="after the end") as caught:
        decoder.receive_data(b"x")
    assert caught.value.offset == len(data)


def test_a_dead_decoder_stays_dead() -> None:
    decoder = Decoder()
    decoder.receive_data(b"PHCBT02\n" + bytes(100))
    for call in (decoder.next_event, decoder.close, decoder.next_event):
        with pytest.raises(PhcbtError, match="magic"):
            call()
    assert decoder.buffered == 0


def test_more_data_is_refused_while_events_wait() -> None:
    decoder = Decoder()
    assert decoder.next_event() is NEED_DATA
    decoder.receive_data(small_stream())
    with pytest.raises(ValueError, match="take every event"):
        decoder.receive_data(b"x")
    assert isinstance(decoder.next_event(), Header)


FIELDS: dict[str, tuple[str, int]] = {
    "length": (">I", 8),
    "version": (">H", 12),
    "algorithm": (">B", 14),
    "reserved": (">B", 15),
    "grain": (">I", 16),
    "chunk": (">I", 20),
    "disk_size": (">Q", 24),
    "base_point": (">Q", 48),
    "target_point": (">Q", 56),
    "base_root": (">Q", 64),
    "disk_id_length": (">H", 96),
    "disk_id": (">B", 98),
}


@pytest.mark.parametrize(
    ("name", "value", "offset", "reason"),
    [
        ("length", 106, 8, "header length 106"),
        ("length", 171, 8, "header length 171"),
        ("length", 1 << 31, 8, "header length"),
        ("version", 2, 12, "version 2"),
        ("algorithm", 3, 14, "algorithm 3"),
        ("reserved", 1, 15, "reserved"),
        ("grain", 2048, 0, "grain of 2048"),
        ("grain", 3 * 4096, 0, "grain of 12288"),
        ("grain", 1 << 21, 0, "grain of 2097152"),
        ("chunk", 2048, 0, "chunk of 2048"),
        ("chunk", GRAIN + 1, 0, "chunk of 4097"),
        ("chunk", CHUNK_MAX + GRAIN, 0, "chunk of"),
        ("disk_size", 0, 0, "disk of 0 bytes"),
        ("disk_size", (1 << 50) + 1, 0, "disk of"),
        ("base_point", 1, 0, "point 1 on base 1"),
        ("target_point", 0, 0, "point 0 on base 0"),
        ("base_root", 1, 0, "base root"),
        ("disk_id_length", 5, 96, "disk id of 5 bytes"),
        ("disk_id", ord("."), 0, "disk id"),
        ("disk_id", ord("/"), 0, "disk id"),
        ("disk_id", 0xFF, 0, "disk id is not ASCII"),
    ],
)
def test_a_header_out_of_bounds_is_refused(name: str, value: int, offset: int, reason: str) -> None:
    body = bytearray(make_header().encode()[:-8])
    layout, at = FIELDS[name]
    struct.pack_into(layout, body, at, value)
    decoder = Decoder()
    decoder.receive_data(bytes(body) + xxhash.xxh3_64_digest(body))
    with pytest.raises(PhcbtError, match=reason) as caught:
        decoder.next_event()
    assert caught.value.offset == offset


def test_header_bytes_must_be_the_headers_length() -> None:
    encoded = make_header().encode()
    with pytest.raises(PhcbtError, match="header of 112 bytes in 113"):
        StreamHeader.decode(encoded + b"x")
    with pytest.raises(PhcbtError, match="inside the header"):
        StreamHeader.decode(encoded[:11])


@pytest.mark.parametrize(
    ("limits", "reason", "offset"),
    [
        (Limits(chunk_max=CHUNK - 1), "chunk of", 20),
        (Limits(disk_size_max=64 * GRAIN - 1), "disk of", 24),
    ],
)
def test_a_reader_may_set_lower_limits(limits: Limits, reason: str, offset: int) -> None:
    decoder = Decoder(limits)
    decoder.receive_data(make_header().encode())
    with pytest.raises(PhcbtError, match=reason) as caught:
        decoder.next_event()
    assert caught.value.offset == offset


def head_with(kind: int = 1, codec: int = 0, reserved: int = 0, reserved_too: int = 0) -> bytes:
    raw = struct.pack(">BBHIQQQ", kind, codec, reserved, 0, 0, GRAIN, reserved_too)
    return raw + xxhash.xxh3_64_digest(raw)


def index_head(length: int, offset: int, payload: bytes) -> bytes:
    head = RecordHead.build(
        Kind.INDEX, Codec.NONE, len(payload), offset=offset, length=length, guarded=payload
    )
    return head.raw + payload


def end_with(**changes: int) -> bytes:
    payload = bytes(changes.pop("payload", 80))
    fields = {"offset": 0, "length": 0, **changes}
    return RecordHead.build(Kind.END, Codec.NONE, len(payload), guarded=payload, **fields).raw


H = make_header()
SHORT = make_header(GRAIN + 100)
ZEROS = zero_record(H, 4 * GRAIN, GRAIN)


@pytest.mark.parametrize(
    ("header", "before", "crafted", "reason"),
    [
        (H, [], head_with(kind=0), "unknown record kind 0"),
        (H, [], head_with(kind=5), "unknown record kind 5"),
        (H, [], head_with(codec=2), "codec 2"),
        (H, [], head_with(kind=2, codec=1), "codec 1 in a record of kind 2"),
        (H, [], head_with(reserved=1), "reserved"),
        (H, [], head_with(reserved_too=1), "reserved"),
        (H, [], head_with(kind=2)[:-1] + b"\0", "check of the zero record"),
        (H, [], raw_block(H, 1, GRAIN), "at disk byte 1"),
        (H, [], raw_block(H, 0, 0), "block of 0 bytes"),
        (H, [], raw_block(H, 0, CHUNK + GRAIN), f"block of {CHUNK + GRAIN}"),
        (H, [], raw_block(H, 0, (1 << 64) - GRAIN, kind=Kind.ZERO), "block of"),
        (H, [], raw_block(H, 64 * GRAIN, GRAIN), "on a disk of"),
        (H, [], raw_block(H, (1 << 64) - GRAIN, GRAIN, kind=Kind.ZERO), "on a disk of"),
        (H, [], raw_block(H, 63 * GRAIN, 2 * GRAIN), "on a disk of"),
        (H, [], raw_block(H, 0, 100), "ends inside a grain"),
        (SHORT, [], raw_block(SHORT, 0, GRAIN + 101), "on a disk of"),
        (SHORT, [], raw_block(SHORT, GRAIN, 99), "ends inside a grain"),
        (H, [], raw_block(H, 0, GRAIN, payload=b"x" * (GRAIN - 1)), "payload of"),
        (H, [], raw_block(H, 0, GRAIN, codec=Codec.ZSTD), "payload of"),
        (H, [], raw_block(H, 0, GRAIN, codec=Codec.ZSTD, payload=b""), "payload of 0"),
        (H, [], raw_block(H, 0, GRAIN, kind=Kind.ZERO, payload=b"x"), "payload of 1"),
        (H, [], raw_block(H, 0, GRAIN)[:40] + bytes(16), "check of the data record"),
        (H, [ZEROS], raw_block(H, 4 * GRAIN, GRAIN), "after one up to"),
        (H, [ZEROS], raw_block(H, 3 * GRAIN, 2 * GRAIN), "after one up to"),
        (H, [ZEROS], raw_block(H, 0, GRAIN, kind=Kind.ZERO), "after one up to"),
        (H, [ZEROS], end_with(), "end record where an index is due"),
        (H, [], end_with(offset=1), "another shape"),
        (H, [], end_with(length=1), "another shape"),
        (H, [], end_with(payload=79), "another shape"),
        (H, [], index_head(0, 0, b""), "index of 0 entries in 0 bytes"),
        (H, [ZEROS], index_head(2, 0, bytes(48)), "index of 2 entries after 1"),
        (H, [ZEROS], index_head(1, 1, bytes(24)), "index of 1 entries after 1"),
        (H, [ZEROS], index_head(1, 0, bytes(25)), "in 25 bytes"),
        (H, [ZEROS], index_head(1, 0, bytes(24)), "does not list the blocks"),
        (H, [ZEROS], index_head(1, 0, bytes(24))[:-1] + b"x", "check of the index record"),
    ],
)
def test_records_with_right_checks_and_wrong_content_are_refused(
    header: StreamHeader, before: list[Any], crafted: bytes, reason: str
) -> None:
    writer = StreamWriter(header)
    data = writer.start() + b"".join(piece for record in before for piece in writer.add(record))
    with pytest.raises(PhcbtError, match=reason) as caught:
        events_of(data + crafted)
    assert caught.value.offset == len(data)


def test_an_end_that_states_other_counts_is_refused() -> None:
    header = make_header()
    one = write_stream(header, [zero_record(header, 0, GRAIN)])
    other = write_stream(header, [zero_record(header, 0, 2 * GRAIN)])
    with pytest.raises(PhcbtError, match="end record does not fit") as caught:
        events_of(one[:-120] + other[-120:])
    assert caught.value.offset == len(one) - 120


def test_an_index_is_due_after_1024_blocks_and_only_the_end_follows_a_short_one() -> None:
    header = make_header(2000 * GRAIN)
    blocks = [zero_record(header, grain * GRAIN, GRAIN) for grain in range(1025)]
    start = header.encode()
    with pytest.raises(PhcbtError, match="block where an index is due") as caught:
        events_of(start + b"".join(block.head.raw for block in blocks))
    assert caught.value.offset == len(start) + 1024 * 40
    short = write_stream(header, blocks[:1])[:-120]
    with pytest.raises(PhcbtError, match="after a short index") as caught:
        events_of(short + blocks[1].head.raw)
    assert caught.value.offset == len(short)


def frame(plain: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)  # type: ignore[arg-type]


TEXT = content(1, 1, 0)
BOMB = frame(bytes(1 << 26))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"x", "not a zstd frame"),
        (b"\x28\xb5\x2f\xfd\x20", "not a zstd frame"),
        (b"\x50\x2a\x4d\x18\x01\0\0\0x", "not a zstd frame"),  # a skippable frame
        (frame(TEXT + b"x"), f"zstd frame of {GRAIN + 1} bytes for {GRAIN}"),
        (BOMB[: GRAIN - 1], f"zstd frame of {1 << 26} bytes"),
        (frame(TEXT, write_content_size=False), "zstd frame of"),
        (frame(TEXT, write_checksum=True), "bits that are not allowed"),
        (frame(TEXT)[:-1], "does not decompress"),
        (frame(TEXT) + b"x", "does not decompress"),
        (frame(TEXT) + frame(TEXT), "does not decompress"),
        (b"\x28\xb5\x2f\xfd\x80\xff", "zstd frame header"),
        # A window of 32 MiB with the right content size.
        (b"\x28\xb5\x2f\xfd\x40\x78\x00\x0f\x01\x00\x00x", f"window of {1 << 25}"),
    ],
)
def test_a_payload_that_is_not_one_right_zstd_frame_is_refused(payload: bytes, reason: str) -> None:
    header = make_header()
    digests = header.algorithm.digest_grains(TEXT, GRAIN)
    crafted = raw_block(header, 0, GRAIN, codec=Codec.ZSTD, payload=payload, digests=digests)
    decoder = Decoder()
    decoder.receive_data(header.encode() + crafted)
    decoder.next_event()
    event = decoder.next_event()
    assert isinstance(event, DataRecord)
    tracemalloc.start()
    try:
        with pytest.raises(PhcbtError, match=reason) as caught:
            event.plain(header)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()
    assert caught.value.offset == len(header.encode())


def test_a_zero_digest_over_bytes_that_are_not_zeros_is_damage() -> None:
    header = make_header()
    for payload in (b"x" * GRAIN, bytes(GRAIN - 1) + b"x"):
        crafted = raw_block(header, 0, GRAIN, payload=payload, digests=bytes(16))
        decoder = Decoder()
        decoder.receive_data(header.encode() + crafted)
        decoder.next_event()
        event = decoder.next_event()
        assert isinstance(event, DataRecord)
        with pytest.raises(DamageError, match="grain 0"):
            event.plain(header)


def lying_data(header: StreamHeader) -> bytes:
    digests = bytes(header.grains(header.chunk) * 16)
    return raw_block(
        header, 0, header.chunk, payload=b"", payload_length=header.chunk, digests=digests
    )


@pytest.mark.parametrize(
    "tail",
    [
        lying_data,
        lambda header: lying_data(header)[:60],
        lambda _: index_head(1024, 0, bytes(1024 * 24))[:100],
    ],
)
def test_lengths_that_lie_allocate_nothing(tail: Callable[[StreamHeader], bytes]) -> None:
    header = make_header(1 << 50, chunk=CHUNK_MAX)
    data = header.encode() + tail(header)
    tracemalloc.start()
    try:
        decoder = Decoder()
        for at in range(0, len(data), 1000):
            decoder.receive_data(data[at : at + 1000])
            try:
                while decoder.next_event() is not NEED_DATA:
                    pass
            except PhcbtError:
                break
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (1 << 18)
    finally:
        tracemalloc.stop()


def test_a_decoder_holds_one_record_and_one_block_however_long_the_stream() -> None:
    header = make_header(1 << 40, chunk=1 << 18)
    noise = content(2, 1, 0) * 64
    blocks = b"".join(
        b"".join(StreamWriter.add(writer, encode_data(header, number << 18, noise, None)))
        for writer in [StreamWriter(header)]
        if writer.start()
        for number in range(64)
    )
    data = header.encode() + blocks
    view = memoryview(data)
    decoder = Decoder()
    tracemalloc.start()
    try:
        for at in range(0, len(data), 5000):
            decoder.receive_data(view[at : at + 5000])
            while decoder.next_event() is not NEED_DATA:
                pass
        assert tracemalloc.get_traced_memory()[1] < 4 << 18
    finally:
        tracemalloc.stop()
    assert decoder.counts.data_records == 64
    assert decoder.disk_end == 64 << 18
    assert decoder.header == header
