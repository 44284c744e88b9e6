# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a payload to verified plain bytes: the expensive part of reading, for worker threads."""

from __future__ import annotations

import threading  # noqa: TID251  a cache for each thread; no thread is made here

import zstandard

from replicator.errors import DamageError, PhcbtError
from replicator.phcbt.format import CHUNK_MAX, Buffer, Codec, EncodedRecord, StreamHeader


class _Decompressors(threading.local):
    """One decompressor for each thread: contexts are dear to make and not thread-safe."""

    def __init__(self) -> None:
        self.context = zstandard.ZstdDecompressor(max_window_size=CHUNK_MAX)


_decompressors = _Decompressors()
#: Bits of a zstd frame header descriptor (RFC 8878, 3.1.1.1.1) that must be clear: unused,
#: reserved, checksum, dictionary.
_DESCRIPTOR_REFUSED = 0x1F
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def plain_bytes(header: StreamHeader, record: EncodedRecord, position: int) -> bytes | memoryview:
    """A block's plain bytes, every grain verified. CPU-bound: about 1 ms for 1 MiB.

    What zstd makes is bounded before it starts. Raises PhcbtError at ``position`` if the payload
    does not decompress to what the head says, DamageError if a grain does not have its digest.
    """
    plain = unpack(record, position)
    if record.is_zero:
        return plain
    first = record.offset // header.grain
    verify_grains(header, plain, record.digests, first, position)
    return plain


def unpack(record: EncodedRecord, position: int) -> bytes | memoryview:
    """A block's plain bytes, not held against the digests. Raises PhcbtError at ``position``."""
    if record.is_zero:
        return bytes(record.length)
    if record.head.codec is Codec.NONE:
        return record.payload
    _check_frame(record, position)
    try:
        plain = _decompressors.context.decompress(
            record.payload, max_output_size=record.length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise PhcbtError(position, f"payload does not decompress: {error}") from error
    # zstd holds a frame to the content size that it states, and that is the record's length.
    assert len(plain) == record.length
    return plain


def _check_frame(record: EncodedRecord, position: int) -> None:
    """Raise PhcbtError unless the payload is a zstd frame that claims the record's length."""
    payload = record.payload
    if bytes(payload[:4]) != _ZSTD_MAGIC or len(payload) < 6:
        raise PhcbtError(position, "payload is not a zstd frame")
    if payload[4] & _DESCRIPTOR_REFUSED:
        raise PhcbtError(position, "zstd frame header has bits that are not allowed")
    try:
        frame = zstandard.get_frame_parameters(payload)
    except zstandard.ZstdError as error:
        raise PhcbtError(position, f"zstd frame header: {error}") from error
    if frame.content_size != record.length:
        raise PhcbtError(position, f"zstd frame of {frame.content_size} bytes for {record.length}")
    if frame.window_size > CHUNK_MAX:
        raise PhcbtError(position, f"zstd frame with a window of {frame.window_size} bytes")


def verify_grains(
    header: StreamHeader, plain: Buffer, digests: bytes, first: int, position: int
) -> None:
    """Raise DamageError naming the first grain of ``plain`` (grain ``first`` on) that does not have
    its digest.
    """
    found = header.algorithm.digest_grains(plain, header.grain)
    if found == digests:
        return
    bad = damaged_grains(header, found, digests)
    raise DamageError(
        f"record at stream byte {position}: {len(bad)} grain(s) do not have their digest, "
        f"the first is grain {first + bad[0]} (disk byte {(first + bad[0]) * header.grain})"
    )


def damaged_grains(header: StreamHeader, found: bytes, digests: bytes) -> list[int]:
    """Which of the digests differ, counted from 0."""
    size = header.digest_size
    return [
        at // size
        for at in range(0, len(digests), size)
        if found[at : at + size] != digests[at : at + size]
    ]
