# SPDX-License-Identifier: AGPL-3.0-or-later
"""Going on with a stream after a crash: the receiver from its partial file, the source from its
skeleton.

Both walk from the start, O(records) in time and O(1) in memory. Blocking: for worker threads.
OSError passes through.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from replicator.errors import PhcbtError
from replicator.phcbt.decode import Decoder, Limits
from replicator.phcbt.encode import StreamWriter
from replicator.phcbt.format import (
    HEAD_SIZE,
    GrainRun,
    Kind,
    RecordHead,
    StreamHeader,
    grain_run,
)
from replicator.phcbt.scan import read_header, step
from replicator.phcbt.track import StreamState

_WINDOW = 1 << 18


def resume_partial(fd: int, size: int, limits: Limits | None = None) -> tuple[Decoder, int]:
    """A decoder that stands at the last boundary of a partial file's first ``size`` bytes, and that
    boundary.

    A torn or damaged record ends the walk: the caller truncates the file to the boundary and asks
    for the rest from there. Payloads are not looked at, so ``size`` must be what is known to be
    durable (the watermark), not what the file happens to have. With no whole header the boundary is
    0. Raises PhcbtError if the header asks for more than ``limits``.
    """
    # A file that lost its tail below the watermark is only as long as it is.
    size = min(size, os.fstat(fd).st_size)
    try:
        state = StreamState(read_header(fd, size))
    except PhcbtError:
        return Decoder(limits), 0
    decoder = Decoder.at(state, limits)
    try:
        while not state.ended and state.position < size:
            step(fd, size, state)
    except PhcbtError:
        # The torn tail: this is what the walk is for. The state stands before it.
        return decoder, state.position
    return decoder, state.position


@dataclass(frozen=True, slots=True)
class SkeletonRecord:
    """A block as the source's spool has it.

    ``position`` is its place in the stream; ``end`` the stream position after it and the index that
    it made due, where sending can go on; ``skeleton_end`` the position after it in the skeleton
    file.
    """

    head: RecordHead
    digests: bytes = field(repr=False)
    position: int
    end: int
    skeleton_end: int


@dataclass(frozen=True, slots=True)
class SkeletonCut:
    """Where sending goes on: ``writer.position`` in the stream, ``skeleton_position`` in the
    skeleton.

    Both files are to be truncated there. If ``writer.position`` is 0 the writer is new and wants
    ``start``; then ``skeleton_position`` is 0 too.
    """

    writer: StreamWriter
    skeleton_position: int


class SkeletonReader:
    """Reads a skeleton: header, then each block's head and digests. A torn or damaged tail is as if
    not there.

    Raises PhcbtError if not even the header is whole: then nothing can be resumed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.header: StreamHeader = read_header(fd, os.fstat(fd).st_size)
        self._start = len(self.header.encode())

    def records(self) -> Iterator[SkeletonRecord]:
        """Every whole block, in order."""
        state = StreamState(self.header)
        at = self._start
        window, window_start = b"", at
        start_size = HEAD_SIZE + self.header.grains(self.header.chunk) * self.header.digest_size
        while True:
            if at + start_size > window_start + len(window):
                window, window_start = os.pread(self._fd, _WINDOW + start_size, at), at
            raw = window[at - window_start : at - window_start + start_size]
            found = _block_of(raw, state)
            if found is None:
                return
            head, digests = found
            position = state.position
            state.add_block(head, digests)
            if state.index_due:
                state.add_index()
            at += HEAD_SIZE + len(digests)
            yield SkeletonRecord(head, digests, position, state.position, at)

    def resume(self, watermark: int) -> SkeletonCut:
        """The last place at or below the stream position ``watermark`` where sending can go on.

        ``watermark`` is the receiver's boundary; the skeleton may be behind it or ahead. A place is
        just after the header, or after a block with the index that it made due.
        """
        if watermark < self._start:
            return SkeletonCut(StreamWriter(self.header), 0)
        skeleton_position = self._start

        def blocks() -> Iterator[tuple[RecordHead, bytes]]:
            nonlocal skeleton_position
            for record in takewhile(lambda record: record.end <= watermark, self.records()):
                skeleton_position = record.skeleton_end
                yield record.head, record.digests

        writer = StreamWriter.resume(self.header, blocks())
        return SkeletonCut(writer, skeleton_position)

    def runs(self, records: int | None = None) -> Iterator[GrainRun]:
        """The grains that the blocks set, ascending.

        With ``records`` (``StreamWriter.counts.records`` of the finished stream), PhcbtError if the
        skeleton has fewer or more.
        """
        found = 0
        at = self._start
        for record in self.records():
            found += 1
            at = record.skeleton_end
            yield grain_run(record.head, record.digests, self.header)
        if records is not None and found != records:
            raise PhcbtError(at, f"skeleton with {found} whole blocks instead of {records}")


def _block_of(raw: bytes, state: StreamState) -> tuple[RecordHead, bytes] | None:
    """The block whose head and digests ``raw`` starts with, or None if it is torn or damaged."""
    if len(raw) < HEAD_SIZE:
        return None
    try:
        head = RecordHead.decode(raw[:HEAD_SIZE], state.position)
        state.check(head)
        digests = raw[HEAD_SIZE : HEAD_SIZE + head.digests_size(state.header)]
        head.check_guard(digests, state.position)
    except PhcbtError:
        return None
    return (head, digests) if head.kind in (Kind.DATA, Kind.ZERO) else None
