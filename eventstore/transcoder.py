# SPDX-License-Identifier: AGPL-3.0-or-later
"""Values as MessagePack, for the library's own mapper and for what stands beside the events. Knows nothing of events.

What can be stored: None, booleans, integers of 64 bits, floats, text, bytes, lists, dictionaries of these, and times
with a zone, which MessagePack's own time stamp keeps as integers since the epoch in UTC, to the microsecond.
"""

from __future__ import annotations

from typing import Any

import msgspec
from eventsourcing.persistence import DataError, MapperDeserialisationError, Transcoder

#: What msgspec raises for a value that has no MessagePack form.
ENCODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
#: What it raises for bytes that are no MessagePack, or not of the type asked for.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)

_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder()


class MsgpackTranscoder(Transcoder):
    """The library's transcoder, as MessagePack: what comes back is equal to what was given, or nothing is stored."""

    def encode(self, obj: Any) -> bytes:
        """The bytes of a value. Raises DataError for one that would not come back as it is: no UUID, tuple or time
        without a zone becomes a text or a list unnoticed.
        """
        try:
            data = _encoder.encode(obj)
            same = _decoder.decode(data) == obj
        except ENCODE_ERRORS as error:
            raise DataError(f"a value cannot be stored: {error}") from error
        if not same:
            raise DataError(
                f"a value cannot be stored: {_culprit(obj)} does not come back as it is"
            )
        return data

    def decode(self, data: bytes) -> Any:
        """The value of its bytes. Raises MapperDeserialisationError if they are none."""
        try:
            return _decoder.decode(data)
        except DECODE_ERRORS as error:
            raise MapperDeserialisationError(f"no MessagePack: {error}") from error


def _culprit(obj: Any) -> str:
    """The kind of the innermost value that changes on its way."""
    inner: list[Any] = []
    if type(obj) is dict:
        inner = [*obj.keys(), *obj.values()]
    elif type(obj) is list:
        inner = obj
    for value in inner:
        if _decoder.decode(_encoder.encode(value)) != value:
            return _culprit(value)
    return f"{type(obj).__name__} {obj!r}"[:200]


__all__ = ["DECODE_ERRORS", "ENCODE_ERRORS", "MsgpackTranscoder"]
