# SPDX-License-Identifier: AGPL-3.0-or-later
"""Walking stored records by their heads, payloads skipped. Blocking: for worker threads.

What was read is checked here as in the decoder; OSError from the file passes through.
"""

from __future__ import annotations

import os

from replicator.errors import PhcbtError
from replicator.phcbt.format import HEAD_SIZE, HEADER_MAX, Kind, RecordHead, StreamHeader
from replicator.phcbt.format import header_length as length_of_header
from replicator.phcbt.track import StreamState, index_fault


def pread_exact(fd: int, length: int, position: int) -> bytes:
    """``length`` bytes at ``position``, a length that was checked. PhcbtError if the file ends
    before.
    """
    data = os.pread(fd, length, position)
    while len(data) < length:
        more = os.pread(fd, length - len(data), position + len(data))
        if not more:
            raise PhcbtError(position, f"the file ends {length - len(data)} bytes too early")
        data += more
    return data


def read_header(fd: int, size: int) -> StreamHeader:
    """The header at the start of a file of ``size`` bytes. Raises PhcbtError."""
    prefix = os.pread(fd, min(HEADER_MAX, size), 0)
    length = length_of_header(prefix[:12])
    if len(prefix) < length:
        raise PhcbtError(0, "the file ends inside the header")
    return StreamHeader.decode(prefix[:length])


def read_block(
    fd: int, limit: int, header: StreamHeader, position: int
) -> tuple[RecordHead, bytes]:
    """Head and digests of the block at ``position``, checked; its payload lies before ``limit``.
    PhcbtError.
    """
    raw = os.pread(fd, min(_block_start_size(header), max(limit - position, 0)), position)
    head = _head(raw, position)
    if head.kind not in (Kind.DATA, Kind.ZERO):
        raise PhcbtError(position, f"{head.kind.name.lower()} record where a block should be")
    fault = head.block_fault(header)
    if fault is not None:
        raise PhcbtError(position, fault)
    return head, _digests(raw, head, header, limit, position)


def read_index(fd: int, limit: int, position: int) -> tuple[RecordHead, bytes]:
    """Head and entries of the index record at ``position``, its own check verified; it lies before
    ``limit``. PhcbtError.
    """
    head = _head(os.pread(fd, min(HEAD_SIZE, max(limit - position, 0)), position), position)
    if head.kind is not Kind.INDEX:
        raise PhcbtError(position, f"{head.kind.name.lower()} record where an index should be")
    fault = index_fault(head)
    if fault is not None:
        raise PhcbtError(position, fault)
    if position + HEAD_SIZE + head.payload_length > limit:
        raise PhcbtError(position, "the file ends inside an index record")
    entries = pread_exact(fd, head.payload_length, position + HEAD_SIZE)
    head.check_guard(entries, position)
    return head, entries


def step(fd: int, size: int, state: StreamState) -> tuple[RecordHead, bytes]:
    """Take ``state`` past the record at its position, in a file of ``size`` bytes; payloads are not
    looked at.

    Returns head and digests. PhcbtError if the record is not whole or not right: then the state is
    as it was.
    """
    position = state.position
    raw = os.pread(fd, min(_block_start_size(state.header), size - position), position)
    head = _head(raw, position)
    state.check(head)
    if head.kind in (Kind.DATA, Kind.ZERO):
        digests = _digests(raw, head, state.header, size, position)
        state.add_block(head, digests)
        return head, digests
    expected = state.index_record() if head.kind is Kind.INDEX else state.end_record()
    if position + len(expected) > size:
        raise PhcbtError(position, "the file ends inside a record")
    if pread_exact(fd, len(expected), position) != expected:
        raise PhcbtError(position, f"{head.kind.name.lower()} record does not fit the blocks")
    if head.kind is Kind.INDEX:
        state.add_index()
    else:
        state.add_end()
    return head, b""


def _block_start_size(header: StreamHeader) -> int:
    return HEAD_SIZE + header.grains(header.chunk) * header.digest_size


def _head(raw: bytes, position: int) -> RecordHead:
    if len(raw) < HEAD_SIZE:
        raise PhcbtError(position, "the file ends inside a record's head")
    return RecordHead.decode(raw[:HEAD_SIZE], position)


def _digests(
    raw: bytes, head: RecordHead, header: StreamHeader, limit: int, position: int
) -> bytes:
    """The digests after a head, when check and bounds are right."""
    start_size = HEAD_SIZE + head.digests_size(header)
    if position + start_size + head.payload_length > limit or len(raw) < start_size:
        raise PhcbtError(position, "the file ends inside a record")
    digests = raw[HEAD_SIZE:start_size]
    head.check_guard(digests, position)
    return digests
