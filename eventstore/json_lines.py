# SPDX-License-Identifier: AGPL-3.0-or-later
"""Records as JSON lines, an open format that any tool reads. Knows nothing of where the records come from or go to.

One object a line, in the order of nids: ``nid``, ``id`` (text), ``id_type`` (uuid or text), ``version``, ``topic``, ``state``
(the stored bytes in base64); and, only for people, ``fields`` (the event as the mapper reads it: bytes in base64, times in
ISO 8601) or ``unreadable`` (why it cannot). Who reads lines back goes by the state alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal
from uuid import UUID

import msgspec
from eventsourcing.persistence import DataError, Mapper, MapperDeserialisationError, StoredEvent

from eventstore.records import (
    STATE_BYTES_MAX,
    TOPIC_BYTES_MAX,
    VERSION_MAX,
    originator_id,
    originator_key,
)
from eventstore.segment_reader import Segment
from eventstore.segment_records import CanonicalParts

#: A state of the greatest size in base64, and as much again and more for its fields.
LINE_BYTES_MAX = 6 * STATE_BYTES_MAX


class _Line(msgspec.Struct, omit_defaults=True):
    nid: int
    id: str
    id_type: Literal["uuid", "text"]
    version: int
    topic: str
    state: bytes
    fields: Any = None
    unreadable: str | None = None


class _Wanted(msgspec.Struct):
    """What is read of a line; the rest of it is for people."""

    nid: int
    id: str
    id_type: Literal["uuid", "text"]
    version: int
    topic: str
    state: bytes


def export_json_lines(
    source: Segment | Iterable[CanonicalParts],
    file: IO[bytes],
    mapper: Mapper[Any] | None = None,
) -> int:
    """Write every record as a line; returns how many. What a mapper cannot read is exported all the same, and says so.

    Raises what the source and the file raise, DataError for a line over 96 MiB. Making it durable is the caller's.
    """
    records = source.records() if isinstance(source, Segment) else source
    count = 0
    for parts in records:
        name = originator_id(parts.key)
        line = _Line(
            nid=parts.nid,
            id=str(name),
            id_type="uuid" if isinstance(name, UUID) else "text",
            version=parts.version,
            topic=parts.topic,
            state=parts.state,
        )
        if mapper is not None:
            line.fields, line.unreadable = _fields(mapper, parts, name)
        data = msgspec.json.encode(line) + b"\n"
        if len(data) > LINE_BYTES_MAX:
            raise DataError(f"record {parts.nid} makes a line of {len(data)} bytes")
        file.write(data)
        count += 1
    return count


def read_json_lines(file: IO[bytes]) -> Iterator[CanonicalParts]:
    """The records of exported lines, which must have neighbouring nids. Raises DataError naming the line that is none.

    A file that was cut off between two lines cannot be told from a shorter one here: its caller compares the last nid,
    or better the root, with a checkpoint.
    """
    number, expected = 0, 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if not line.endswith(b"\n"):
            raise DataError(f"line {number} is cut off or over {LINE_BYTES_MAX} bytes")
        try:
            parts = _parts(msgspec.json.decode(line, type=_Wanted))
        except (msgspec.MsgspecError, ValueError, DataError, RecursionError) as error:
            raise DataError(f"line {number} is no record: {error}") from error
        if expected and parts.nid != expected:
            raise DataError(f"line {number} is record {parts.nid} where {expected} belongs")
        expected = parts.nid + 1
        yield parts


def _parts(line: _Wanted) -> CanonicalParts:
    name: UUID | str = line.id
    if line.id_type == "uuid":
        name = UUID(line.id)
        if str(name) != line.id:
            raise DataError(f"id {line.id!r:.50} is not written as a UUID is")
    if not 1 <= line.nid <= VERSION_MAX or not 0 <= line.version <= VERSION_MAX:
        raise DataError("nid or version is out of range")
    if not 1 <= len(line.topic.encode()) <= TOPIC_BYTES_MAX or len(line.state) > STATE_BYTES_MAX:
        raise DataError("topic or state is too long, or there is no topic")
    return CanonicalParts(line.nid, originator_key(name), line.version, line.topic, line.state)


def _fields(
    mapper: Mapper[Any], parts: CanonicalParts, name: UUID | str
) -> tuple[dict[str, Any] | None, str | None]:
    stored = StoredEvent(name, parts.version, parts.topic, parts.state)
    try:
        event = mapper.to_domain_event(stored)
        shown = {
            key: value
            for key, value in vars(event).items()
            if key not in {"originator_id", "originator_version"}
        }
        return msgspec.to_builtins(shown, str_keys=True), None
    except (MapperDeserialisationError, TypeError, ValueError, OverflowError) as error:
        return None, str(error)


__all__ = ["LINE_BYTES_MAX", "export_json_lines", "read_json_lines"]
