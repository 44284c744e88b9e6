# SPDX-License-Identifier: AGPL-3.0-or-later
"""Authenticated frames, one direction each: bytes in, events out (docs/wire.md, section 3.1).

A frame's MAC covers its place in the direction's sequence, so that a frame that is altered, moved,
repeated, left out, reflected or taken from another session is refused before one byte of it is
handed up.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from replicator.errors import WireError

PAYLOAD_BYTES_MAX: Final = 1 << 20
MAC_BYTES: Final = 32
HEAD_BYTES: Final = 5 + MAC_BYTES
SEQUENCE_MAX: Final = (1 << 64) - 1

_HEADER: Final = struct.Struct(">IB")
_MACED: Final = struct.Struct(">QIB")


class FrameType(IntEnum):
    """What a frame is."""

    DATA = 1
    CLOSE = 2


class FrameError(WireError):
    """A frame that the other side cannot have sent just so: damaged, forged, or out of place."""


class CutError(WireError):
    """The bytes ended without the other side's authenticated close."""


class NeedData(Enum):
    """The type of :data:`NEED_DATA`."""

    NEED_DATA = "need data"


NEED_DATA: Final = NeedData.NEED_DATA
"""All that was fed has been used; feed more."""


@dataclass(frozen=True, slots=True)
class Data:
    """Authenticated bytes, 1 byte to 1 MiB. The buffer is the caller's own from now on."""

    payload: bytearray


@dataclass(frozen=True, slots=True)
class Close:
    """The other side ended the stream on purpose: what came before is all that it sent."""


class FrameSealer:
    """Makes the frames of one direction. A key is for one sealer, ever."""

    def __init__(self, key: bytes) -> None:
        self._mac: Final = hmac.new(key, digestmod="sha256")
        self._sequence = 0
        self._closed = False

    def seal(self, payload: bytes | bytearray | memoryview) -> bytes:
        """The 37 bytes that must precede ``payload`` (1 byte to 1 MiB, copied nowhere) on the wire.

        Every head must be sent, in order, with its payload. Raises :class:`ValueError` for a
        payload out of bounds and :class:`RuntimeError` after :meth:`seal_close`.
        """
        if not 1 <= len(payload) <= PAYLOAD_BYTES_MAX:
            raise ValueError(f"a frame of {len(payload)} bytes")
        return self._seal(FrameType.DATA, payload)

    def seal_close(self) -> bytes:
        """The whole close frame. Nothing can be sealed after it."""
        frame = self._seal(FrameType.CLOSE, b"")
        self._closed = True
        return frame

    def _seal(self, kind: FrameType, payload: bytes | bytearray | memoryview) -> bytes:
        if self._closed:
            raise RuntimeError("the direction has been closed")
        if self._sequence > SEQUENCE_MAX:
            raise WireError("the session has used up its frame numbers; open another")
        mac = self._mac.copy()
        mac.update(_MACED.pack(self._sequence, len(payload), kind))
        mac.update(payload)
        self._sequence += 1
        return _HEADER.pack(len(payload), kind) + mac.digest()


class FrameOpener:
    """Checks the frames of one direction. After an error it raises that error for ever.

    Work and memory are linear in the bytes fed, however they are split: at most one payload
    (1 MiB) is kept besides the piece last fed, and it grows with what has come, not with what
    its length field says.
    """

    def __init__(self, key: bytes) -> None:
        self._key_mac: Final = hmac.new(key, digestmod="sha256")
        self._sequence = 0
        self._input = memoryview(b"")
        self._head = bytearray()
        self._payload = bytearray()
        self._payload_bytes = 0
        self._mac: hmac.HMAC | None = None
        self._kind = FrameType.DATA
        self._closed = False
        self._error: WireError | None = None

    @property
    def inside_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return bool(self._head)

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept at present, the unread rest of the piece last fed included."""
        return len(self._head) + len(self._payload) + len(self._input)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Feed bytes, uncopied. Those fed before must be used up (:data:`NEED_DATA`)."""
        if self._input:
            raise RuntimeError("take the events of the bytes fed before feeding more")
        self._input = memoryview(data)

    def receive_eof(self) -> None:
        """Say that no more bytes will come. Raises :class:`CutError` unless a close frame came."""
        if not self._closed:
            raise self._fail(CutError("the connection was cut: no authenticated close came"))

    def next_event(self) -> Data | Close | NeedData:
        """The next event. Raises :class:`FrameError`; of a frame at fault nothing is handed up."""
        if self._error is not None:
            raise self._error
        if self._closed and self._input:
            raise self._fail(FrameError("bytes after the close frame"))
        if self._mac is None:
            self._mac = self._begin_frame()
            if self._mac is None:
                return NEED_DATA
        piece = self._take(self._payload_bytes - len(self._payload))
        self._mac.update(piece)
        self._payload += piece
        if len(self._payload) < self._payload_bytes:
            return NEED_DATA
        return self._finish_frame(self._mac)

    def _take(self, count: int) -> memoryview:
        piece, self._input = self._input[:count], self._input[count:]
        return piece

    def _begin_frame(self) -> hmac.HMAC | None:
        self._head += self._take(HEAD_BYTES - len(self._head))
        if len(self._head) < HEAD_BYTES:
            return None
        length, kind = _HEADER.unpack_from(self._head)
        # Not authenticated yet, so only bounds: they decide how much may be waited for.
        if not (
            (kind == FrameType.DATA and 1 <= length <= PAYLOAD_BYTES_MAX)
            or (kind == FrameType.CLOSE and length == 0)
        ):
            raise self._fail(FrameError(f"a frame of type {kind} and {length} bytes"))
        if self._sequence > SEQUENCE_MAX:
            raise self._fail(FrameError("the session has used up its frame numbers"))
        self._payload_bytes, self._kind = length, FrameType(kind)
        mac = self._key_mac.copy()
        mac.update(_MACED.pack(self._sequence, length, kind))
        return mac

    def _finish_frame(self, mac: hmac.HMAC) -> Data | Close:
        if not hmac.compare_digest(mac.digest(), self._head[_HEADER.size :]):
            raise self._fail(FrameError(f"frame {self._sequence} is not what was sent"))
        payload, self._payload = self._payload, bytearray()
        self._head.clear()
        self._mac = None
        self._sequence += 1
        if self._kind is FrameType.DATA:
            return Data(payload)
        self._closed = True
        return Close()

    def _fail(self, error: WireError) -> WireError:
        self._error = error
        self._input = memoryview(b"")
        self._payload = bytearray()
        return error
