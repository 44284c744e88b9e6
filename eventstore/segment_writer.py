# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a sealed segment: there is none, or a whole one that was read back in full. It never replaces a file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path

import zstandard
from eventsourcing.persistence import DataError, OperationalError

from eventstore.merkle import Frontier, leaf_hash
from eventstore.records import canonical_record, check_version
from eventstore.segment_format import (
    BLOCKS_MAX,
    CHECKPOINT_BYTES_MAX,
    DICTIONARY_BYTES_MAX,
    Block,
    Chunk,
    Header,
    IndexBuilder,
    Tail,
    chunked,
    footer_start,
    pack_footer,
    pack_header,
    pack_tail,
)
from eventstore.segment_reader import Segment, SegmentInfo
from eventstore.segment_records import (
    BLOCK_BYTES_MAX,
    CanonicalParts,
    block_ends,
    check_key,
    check_of,
    pack_block,
)

#: Of realistic events level 19 makes 5 % less than level 3, at half of its speed; 22 makes nothing less.
LEVEL_DEFAULT = 19
BUILDING = ".building"
#: What the dictionary is made of: the first records, up to as many bytes of states.
SAMPLE_RECORDS = 1 << 13
SAMPLE_BYTES = 16 << 20


def write_segment(
    path: str | os.PathLike[str],
    *,
    origin: str,
    label: str,
    first: int,
    last: int,
    frontier: Sequence[bytes],
    checkpoint: str,
    records: Iterable[CanonicalParts],
    root: bytes | None = None,
    level: int = LEVEL_DEFAULT,
) -> SegmentInfo:
    """Seal the records ``first``..``last``, which ``records`` gives in order, into a new file.

    ``frontier`` is the tree's of ``first - 1`` leaves, ``checkpoint`` any text of up to 64 KiB, ``level`` zstd's 1..22. It
    is written under its name with ``.building`` after it, made durable, verified by reading it back in full, renamed,
    and its folder made durable: when this returns, it is there for ever. After an error nothing is there, unless the
    error came from the last step; a crash can leave the ``.building`` file, which the next call replaces.

    Raises DataError (records missing, out of place or too many; they do not lead to ``root``; a text too long),
    OperationalError (the file is there already or is being written by another, the disk is full or fails), SegmentError
    (it does not read back), and whatever ``records`` raises. Blocks; holds one block and the index in memory.
    """
    target = Path(path)
    header = Header(first, last, tuple(frontier), origin, label)
    pack_header(header)  # to refuse it before there is a file
    text = _checked_checkpoint(checkpoint)
    try:
        with _building(target) as (fd, building):
            writer = _Writer(fd, header, level)
            writer.add_all(records)
            writer.finish(text, root)
            os.fsync(fd)
            # So that what is read back comes from the disk.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with Segment.open(building) as written:
                written.verify()
                info = written.info._replace(path=os.fspath(target))
            _refuse_existing(target)
            os.rename(building, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise OperationalError(f"segment {target}: {error.strerror or error}") from error
    return info


class _Writer:
    """The file while it grows."""

    def __init__(self, fd: int, header: Header, level: int) -> None:
        self._fd = fd
        self._header = header
        self._level = level
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._digest = sha256()
        self._offset = 0
        self._next = header.first
        self._frontier = Frontier(header.first - 1, header.frontier)
        self._index = IndexBuilder()
        self._blocks: list[Block] = []
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def add_all(self, records: Iterable[CanonicalParts]) -> None:
        """Take them all. The first ones are looked at twice: the dictionary is made of them."""
        rest = iter(records)
        sample: list[CanonicalParts] = []
        size = 0
        while len(sample) < SAMPLE_RECORDS and size < SAMPLE_BYTES:
            record = next(rest, None)
            if record is None:
                break
            sample.append(record)
            size += len(record.state)
        self._begin(_dictionary(sample))
        for record in chain(sample, rest):
            self._add(record)

    def _begin(self, dictionary: bytes) -> None:
        self._write(pack_header(self._header._replace(dictionary=dictionary)))
        self._compressor = zstandard.ZstdCompressor(
            level=self._level,
            dict_data=zstandard.ZstdCompressionDict(
                dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT
            ),
        )

    def _add(self, record: CanonicalParts) -> None:
        nid, key, version, topic, state = record
        if nid != self._next or nid > self._header.last:
            raise DataError(f"record {nid} came where {self._next} of {self._header.last} belongs")
        check_key(key)
        check_version(version)
        packed = canonical_record(nid, key, version, topic, state)
        if len(packed) > BLOCK_BYTES_MAX:
            raise DataError(f"record {nid} of {len(packed)} bytes is over {BLOCK_BYTES_MAX}")
        if block_ends(nid, len(self._pending), self._pending_bytes, len(packed)):
            self._close_block()
        self._pending.append(packed)
        self._pending_bytes += len(packed)
        self._index.add(key, version, len(self._blocks))
        self._next += 1

    def finish(self, checkpoint: str, root: bytes | None) -> None:
        if self._next != self._header.last + 1:
            raise DataError(f"the records end before {self._next}, not after {self._header.last}")
        self._close_block()
        found = self._frontier.root()
        if root is not None and root != found:
            raise DataError(
                f"records {self._header.first}..{self._header.last} do not lead to the root"
            )
        chunks = []
        for key, data in chunked(self._index.streams()):
            offset, stored = self._offset, self._compressor.compress(data)
            self._write(stored)
            chunks.append(Chunk(offset, len(data), len(stored), check_of(stored), key))
        tail = pack_tail(
            Tail(
                records=self._header.last - self._header.first + 1,
                record_bytes=sum(block.length for block in self._blocks),
                streams=len(self._index),
                root=found,
                checkpoint=checkpoint,
                blocks=tuple(self._blocks),
                chunks=tuple(chunks),
            )
        )
        offset = self._offset
        self._write(tail)
        self._digest.update(footer_start(offset, tail))
        self._write(pack_footer(offset, tail, self._digest.digest()))

    def _close_block(self) -> None:
        if len(self._blocks) == BLOCKS_MAX:
            raise DataError(f"a segment has at most {BLOCKS_MAX} blocks")
        leaves = [leaf_hash(record) for record in self._pending]
        alone = Frontier()
        alone.extend(leaves)
        self._frontier.extend(leaves)
        stored = self._compressor.compress(pack_block(self._pending))
        self._blocks.append(
            Block(
                offset=self._offset,
                first=self._next - len(leaves),
                records=len(leaves),
                length=self._pending_bytes,
                stored=len(stored),
                check=check_of(stored),
                tree_hash=alone.root(),
            )
        )
        self._write(stored)
        self._pending, self._pending_bytes = [], 0

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._offset += len(data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]


def _dictionary(sample: Iterable[CanonicalParts]) -> bytes:
    """The keys and topics of some records: within one block each key may stand only once, so zstd finds no other."""
    pieces: dict[bytes, None] = {}
    size = 0
    for record in sample:
        for piece in (record.key, record.topic.encode(errors="replace")):
            if piece not in pieces and size + len(piece) <= DICTIONARY_BYTES_MAX:
                pieces[piece] = None
                size += len(piece)
    return b"".join(pieces)


@contextmanager
def _building(target: Path) -> Iterator[tuple[int, Path]]:
    """An empty file beside ``target`` that this call alone writes; it is gone afterwards, by its rename or removed."""
    building = target.with_name(target.name + BUILDING)
    fd = os.open(building, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OperationalError(f"segment {target} is being written by another") from None
        # The one that held the lock until now may have renamed what was opened here.
        if not _is_at(fd, building):
            raise OperationalError(f"segment {target} has just been written by another")
        try:
            _refuse_existing(target)
            os.ftruncate(fd, 0)
            yield fd, building
        except BaseException:
            if _is_at(fd, building):
                with suppress(FileNotFoundError):
                    os.unlink(building)
            raise
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise OperationalError(f"segment {target} is there already")


def _checked_checkpoint(text: str) -> str:
    try:
        length = len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError("a segment's checkpoint is not valid text") from error
    if length > CHECKPOINT_BYTES_MAX:
        raise DataError(f"a segment's checkpoint has {length} bytes, over {CHECKPOINT_BYTES_MAX}")
    return text


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


__all__ = ["LEVEL_DEFAULT", "write_segment"]
