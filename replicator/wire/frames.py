# SPDX-License-Identifier: AGPL-3.0-or-later
"""Frames, one direction each: bytes in, events out (docs/wire.md, section 3.1).

A frame's tag covers its place in the direction's sequence, so that a frame that is altered, moved, repeated, left out,
reflected or taken from another session is refused before one byte of it is handed up. Sealed frames are encrypted as well.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from replicator.errors import WireError
from replicator.wire.buffers import Buffers

PAYLOAD_BYTES_MAX: Final = (1 << 20) + (128 << 10)
HEAD_BYTES: Final = 5
MAC_BYTES: Final = 32
SEAL_BYTES: Final = 16
SEQUENCE_MAX: Final = (1 << 64) - 1
#: A sealed direction takes its next key after so many frames: 2^18 frames are at most 2^34.2 blocks of AES under one key.
FRAMES_PER_KEY: Final = 1 << 18

_HEADER: Final = struct.Struct(">IB")
_PLACE: Final = struct.Struct(">QIB")
_NONCE: Final = struct.Struct(">IQ")
_NEXT_KEY: Final = b"replctl wire v1 next frame key"
#: A cipher asks for so much more room than it fills.
_SLACK: Final = 15
#: Frames up to this size are not worth a buffer of a pool.
_SMALL: Final = 4096

BUFFER_BYTES: Final = HEAD_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES + _SLACK

Piece = bytes | bytearray | memoryview


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
    """Authenticated bytes, 1 byte to ``PAYLOAD_BYTES_MAX``. The memory is the caller's until it gives it back to the pool."""

    payload: memoryview


@dataclass(frozen=True, slots=True)
class Close:
    """The other side ended the stream on purpose: what came before is all that it sent."""


class _Guard(Protocol):
    """What makes and checks the tags of one direction."""

    tag_bytes: int

    def seal(self, number: int, place: bytes, pieces: Sequence[Piece], room: memoryview) -> int:
        """Write payload and tag into ``room``; how many bytes."""
        ...

    def open(self, number: int, place: bytes, body: memoryview) -> bool:
        """Whether ``body`` (payload and tag) is what was sealed; the payload is readable in its place then."""
        ...


class _Readable:
    """HMAC-SHA256; the payload goes as it is."""

    tag_bytes = MAC_BYTES

    def __init__(self, key: bytes) -> None:
        self._mac: Final = hmac.new(key, digestmod="sha256")

    def seal(self, number: int, place: bytes, pieces: Sequence[Piece], room: memoryview) -> int:
        del number  # it stands in the place
        end = 0
        for piece in pieces:
            start, end = end, end + len(piece)
            room[start:end] = piece
        mac = self._mac.copy()
        mac.update(place)
        mac.update(room[:end])
        room[end : end + MAC_BYTES] = mac.digest()
        return end + MAC_BYTES

    def open(self, number: int, place: bytes, body: memoryview) -> bool:
        del number
        mac = self._mac.copy()
        mac.update(place)
        mac.update(body[:-MAC_BYTES])
        return hmac.compare_digest(mac.digest(), body[-MAC_BYTES:])


class _Sealed:
    """AES-256-GCM. The nonce is the frame's number, and each key makes the next one: no pair comes twice."""

    tag_bytes = SEAL_BYTES

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = algorithms.AES(key)

    def _of(self, number: int) -> Cipher[modes.GCM]:
        if number and number % FRAMES_PER_KEY == 0:
            self._key = HKDFExpand(SHA256(), len(self._key), _NEXT_KEY).derive(self._key)
            self._cipher = algorithms.AES(self._key)
        return Cipher(self._cipher, modes.GCM(_NONCE.pack(0, number)))

    def seal(self, number: int, place: bytes, pieces: Sequence[Piece], room: memoryview) -> int:
        encryptor = self._of(number).encryptor()
        encryptor.authenticate_additional_data(place)
        end = 0
        for piece in pieces:
            end += encryptor.update_into(piece, room[end:])
        encryptor.finalize()
        room[end : end + SEAL_BYTES] = encryptor.tag
        return end + SEAL_BYTES

    def open(self, number: int, place: bytes, body: memoryview) -> bool:
        end = len(body) - SEAL_BYTES
        decryptor = self._of(number).decryptor()
        decryptor.authenticate_additional_data(place)
        decryptor.update_into(body[:end], body)
        try:
            decryptor.finalize_with_tag(bytes(body[end:]))
        except InvalidTag:
            return False
        return True


def _guard(key: bytes, sealed: bool) -> _Guard:
    return _Sealed(key) if sealed else _Readable(key)


class FrameSealer:
    """Makes the frames of one direction. A key is for one sealer, ever. ``sealed``: encrypted, else readable."""

    def __init__(self, key: bytes, *, sealed: bool = False) -> None:
        self._guard = _guard(key, sealed)
        self._sequence = 0
        self._closed = False
        self._room: memoryview | None = None

    def seal(self, *pieces: Piece) -> memoryview:
        """The whole frame whose payload is the pieces in order (1 byte to ``PAYLOAD_BYTES_MAX`` in all), ready to be sent.

        It is overwritten by the next call: frames must be sent in order, each before the next is made. Raises
        :class:`ValueError` for a payload out of bounds and :class:`RuntimeError` after :meth:`seal_close`.
        """
        length = sum(map(len, pieces))
        if not 1 <= length <= PAYLOAD_BYTES_MAX:
            raise ValueError(f"a frame of {length} bytes")
        return self._seal(FrameType.DATA, length, pieces)

    def seal_close(self) -> memoryview:
        """The close frame. Nothing can be sealed after it."""
        frame = self._seal(FrameType.CLOSE, 0, ())
        self._closed = True
        return frame

    def _seal(self, kind: FrameType, length: int, pieces: Sequence[Piece]) -> memoryview:
        if self._closed:
            raise RuntimeError("the direction has been closed")
        if self._sequence > SEQUENCE_MAX:
            raise WireError("the session has used up its frame numbers; open another")
        room = self._space(HEAD_BYTES + length + self._guard.tag_bytes + _SLACK)
        _HEADER.pack_into(room, 0, length, kind)
        place = _PLACE.pack(self._sequence, length, kind)
        end = HEAD_BYTES + self._guard.seal(self._sequence, place, pieces, room[HEAD_BYTES:])
        self._sequence += 1
        return room[:end]

    def _space(self, size: int) -> memoryview:
        if size <= _SMALL:
            return memoryview(bytearray(size))
        if self._room is None:
            self._room = memoryview(bytearray(BUFFER_BYTES))
        return self._room


class FrameOpener:
    """Checks the frames of one direction. After an error it raises that error for ever.

    Bytes come in by ``receive_data``, or are put into ``room`` and told by ``took``. Work is linear in the bytes that came,
    however they are split. Memory: one frame, in a buffer of the pool if it is large.
    """

    def __init__(self, key: bytes, *, sealed: bool = False, buffers: Buffers | None = None) -> None:
        self._guard = _guard(key, sealed)
        self._buffers = Buffers(BUFFER_BYTES) if buffers is None else buffers
        self._sequence = 0
        self._input = memoryview(b"")
        self._head: Final = bytearray(HEAD_BYTES)
        self._head_view: Final = memoryview(self._head)
        self._body: memoryview | None = None  # of the frame that has begun, once its head is whole
        self._have = 0  # bytes of the head or of the body
        self._length = 0
        self._kind = FrameType.DATA
        self._closed = False
        self._error: WireError | None = None

    @property
    def inside_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return self._body is not None or self._have > 0

    @property
    def buffered_bytes(self) -> int:
        """Received bytes kept at present, the unread rest of the piece last fed included."""
        head = HEAD_BYTES if self._body is not None else 0
        return head + self._have + len(self._input)

    def room(self) -> memoryview:
        """Where the next bytes belong; never empty. Fill some of it and say so with ``took``.

        Take every event before asking.
        """
        target = self._head_view if self._body is None else self._body
        return target[self._have :]

    def took(self, count: int) -> None:
        """``count`` bytes were put into ``room``."""
        self._have += count

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Feed bytes. Those fed before must be used up (:data:`NEED_DATA`)."""
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
        while True:
            if self._closed and (self._input or self._have):
                raise self._fail(FrameError("bytes after the close frame"))
            self._take_input()
            if self._body is None:
                if self._have < HEAD_BYTES:
                    return NEED_DATA
                self._begin_frame()
                continue
            if self._have == len(self._body):
                return self._finish_frame(self._body)
            if not self._input:
                return NEED_DATA

    def _take_input(self) -> None:
        if self._input:
            room = self.room()
            count = min(len(room), len(self._input))
            room[:count] = self._input[:count]
            self._have += count
            self._input = self._input[count:]

    def _begin_frame(self) -> None:
        length, kind = _HEADER.unpack_from(self._head)
        # Not authenticated yet, so only bounds: they decide how much may be waited for.
        if not (
            (kind == FrameType.DATA and 1 <= length <= PAYLOAD_BYTES_MAX)
            or (kind == FrameType.CLOSE and length == 0)
        ):
            raise self._fail(FrameError(f"a frame of type {kind} and {length} bytes"))
        if self._sequence > SEQUENCE_MAX:
            raise self._fail(FrameError("the session has used up its frame numbers"))
        size = length + self._guard.tag_bytes
        whole = memoryview(bytearray(size)) if size <= _SMALL else self._buffers.take()
        self._body, self._have = whole[:size], 0
        self._length, self._kind = length, FrameType(kind)

    def _finish_frame(self, body: memoryview) -> Data | Close:
        place = _PLACE.pack(self._sequence, self._length, self._kind)
        if not self._guard.open(self._sequence, place, body):
            raise self._fail(FrameError(f"frame {self._sequence} is not what was sent"))
        self._sequence += 1
        self._body, self._have = None, 0
        if self._kind is FrameType.DATA:
            return Data(body[: self._length])
        self._closed = True
        return Close()

    def _fail(self, error: WireError) -> WireError:
        self._error = error
        self._input = memoryview(b"")
        self._body, self._have = None, 0
        return error
