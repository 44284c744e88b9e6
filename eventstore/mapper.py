# SPDX-License-Identifier: AGPL-3.0-or-later
"""Domain events as small arrays of bytes, and back, for registered event types only; optionally encrypted.

It knows nothing of where the bytes are kept. A state is one of these; the first byte tells:

plain      a MessagePack array (0x90-0x9f, 0xdc, 0xdd): class version, time in microseconds since the epoch, then the
           fields of that version in the type's order. No names
map        a MessagePack map (0x80-0x8f, 0xde, 0xdf): what the library's own mapper stored through `MsgpackTranscoder`.
           It is read, and never written
encrypted  0xc1 (no MessagePack value begins so), key id u32, nonce of 96 bits, AES-256-GCM of one of the above with
           its tag of 16 bytes. Associated data: length u16 and index key of the id (so its kind too), version u64,
           length u16 and topic, 0xc1, key id u32. All integers are big-endian
"""

from __future__ import annotations

import itertools
import os
import struct
import types as builtin_types
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NoReturn, cast
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from eventsourcing.persistence import (
    Cipher,
    Compressor,
    DataError,
    Mapper,
    MapperDeserialisationError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
    Transcoder,
    find_id_convertor,
)

from eventstore.records import originator_key
from eventstore.transcoder import DECODE_ERRORS, ENCODE_ERRORS
from eventstore.types import EventType, EventTypes

ENCRYPTED = 0xC1
#: NIST SP 800-38D, 8.3: the bound of one key with random nonces of 96 bits.
EVENTS_PER_KEY_MAX = 1 << 32
KEY_BYTES = 32

_HEAD = struct.Struct(">BI")
_NONCE_BYTES = 12
_TAG_BYTES = 16
_OVERHEAD = _HEAD.size + _NONCE_BYTES + _TAG_BYTES
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
#: Where the class version stands, by the first byte of an array.
_VERSION_AT = {0x90 + count: 1 for count in range(16)} | {0xDC: 3, 0xDD: 5}
_MAP_HEADS = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})

_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decode_any = msgspec.msgpack.Decoder().decode


class EventCipher:
    """AES-256-GCM for events, under numbered keys: ``current`` encrypts, every key given still decrypts.

    A ciphertext is bound to its event's id (with its type, UUID or text), version and topic: moved elsewhere it does
    not decrypt. With random nonces one key is safe for 2^32 events (NIST SP 800-38D, 8.3); after that `encrypt`
    refuses. Events are counted in memory, per process and object: whoever knows how many were encrypted before passes
    ``encrypted``, and long before a log of that size a new key has to be made current.

    ``keys`` maps an id (u32) to 32 secret bytes. Raises ProgrammingError for bad ones. Usable from any thread.
    """

    def __init__(self, keys: Mapping[int, bytes], current: int, *, encrypted: int = 0) -> None:
        for key_id, key in keys.items():
            if not 0 <= key_id < 1 << 32 or len(key) != KEY_BYTES:
                raise ProgrammingError(
                    f"event key {key_id}: an id of 32 bits and 32 bytes are needed"
                )
        if current not in keys:
            raise ProgrammingError(f"there is no event key {current} to be the current one")
        self._keys = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._current = current
        self._count = itertools.count(encrypted)  # one `next` is atomic, so threads may share it

    def __repr__(self) -> str:
        return f"EventCipher(key ids {sorted(self._keys)}, current {self._current})"

    def encrypt(self, originator_id: UUID | str, version: int, topic: str, state: bytes) -> bytes:
        """The encrypted state of the event of that id, version and topic. Raises OperationalError when the current
        key has done its 2^32 events, DataError for an id or topic that cannot be stored.
        """
        if next(self._count) >= EVENTS_PER_KEY_MAX:
            raise OperationalError(
                f"event key {self._current} has encrypted {EVENTS_PER_KEY_MAX} events: make another current"
            )
        head = _HEAD.pack(ENCRYPTED, self._current)
        nonce = os.urandom(_NONCE_BYTES)
        bound = _associated(originator_id, version, topic, head)
        return head + nonce + self._keys[self._current].encrypt(nonce, state, bound)

    def decrypt(self, originator_id: UUID | str, version: int, topic: str, state: bytes) -> bytes:
        """The state that `encrypt` was given. Raises MapperDeserialisationError for an unknown key id, and for
        anything that this key did not encrypt for this id, version and topic.
        """
        if len(state) < _OVERHEAD or state[0] != ENCRYPTED:
            raise MapperDeserialisationError("it is no encrypted state")
        key_id = _HEAD.unpack_from(state)[1]
        key = self._keys.get(key_id)
        if key is None:
            raise MapperDeserialisationError(
                f"it is encrypted with key {key_id}, which is not here"
            )
        bound = _associated(originator_id, version, topic, state[: _HEAD.size])
        nonce = state[_HEAD.size : _HEAD.size + _NONCE_BYTES]
        try:
            return key.decrypt(nonce, state[_HEAD.size + _NONCE_BYTES :], bound)
        except InvalidTag:
            raise MapperDeserialisationError(
                f"key {key_id} did not encrypt it for this id, version and topic"
            ) from None


def _associated(originator_id: UUID | str, version: int, topic: str, head: bytes) -> bytes:
    key = originator_key(originator_id)
    try:
        text = topic.encode()
        return struct.pack(
            f">H{len(key)}sQH{len(text)}s5s", len(key), key, version, len(text), text, head
        )
    except (UnicodeEncodeError, struct.error) as error:
        raise DataError(
            f"no event can be encrypted under this version and topic: {error}"
        ) from error


class _Codec:
    """One event type with its decoders, by class version."""

    __slots__ = ("attributes", "cls", "decoders", "fields", "kind", "topic", "version")

    def __init__(self, kind: EventType) -> None:
        self.kind = kind
        self.cls = kind.cls
        self.topic = kind.topic
        self.version = kind.version
        self.fields = kind.fields
        self.attributes = len(kind.fields) + 3
        self.decoders: dict[int, Callable[[bytes], tuple[Any, ...]]] = {}
        for version, fields in kind.layouts.items():
            present = version == kind.version
            hints = kind.hints if present else (Any,) * len(fields)
            row: Any = builtin_types.GenericAlias(tuple, (int, int, *map(_decodable, hints)))
            self.decoders[version] = msgspec.msgpack.Decoder(row).decode


def _decodable(hint: Any) -> Any:
    """The type itself, or Any if msgspec cannot check it."""
    try:
        msgspec.msgpack.Decoder(hint)
    except TypeError:
        return Any
    return hint


class EventMapper(Mapper[Any]):
    """The library's mapper for registered event types: small states without names, checked both ways.

    Give it ``types``, or name a subclass with the class attribute ``event_types`` (and ``event_cipher``) in
    ``MAPPER_TOPIC``. It encodes, and with an `EventCipher` encrypts, by itself: the transcoder that the library hands
    over is not used, and a compressor or a cipher of the library's is a ProgrammingError. Plain and encrypted states
    may stand in one log, so encryption can begin at any time; that nobody replaced an encrypted state by a plain one
    is for the log's hash tree to show. Ids must come back from the recorder with the type that they were stored with.
    """

    event_types: ClassVar[EventTypes | None] = None
    event_cipher: ClassVar[EventCipher | None] = None

    def __init__(
        self,
        transcoder: Transcoder | None = None,
        compressor: Compressor | None = None,
        cipher: Cipher | EventCipher | None = None,
        *,
        types: EventTypes | None = None,
    ) -> None:
        types = types or self.event_types
        if types is None:
            raise ProgrammingError("an event mapper needs the types of its events")
        if compressor is not None or isinstance(cipher, Cipher):
            raise ProgrammingError("an event mapper takes no compressor and only an EventCipher")
        # The library's attributes are kept: its own mapper would use them, this one does not.
        super().__init__(transcoder=transcoder)  # type: ignore[arg-type]
        self.types = types
        self._cipher = cipher or self.event_cipher
        codecs = [_Codec(kind) for kind in types]
        self._by_class = {codec.cls: codec for codec in codecs}
        self._by_topic = {codec.topic: codec for codec in codecs}

    def to_stored_event(self, domain_event: Any) -> StoredEvent:
        """The stored form. Raises ProgrammingError for a class that is not registered, DataError (naming the field) for
        a value that would not come back as it is.
        """
        codec = self._by_class.get(type(domain_event))
        if codec is None:
            self.types.by_class(type(domain_event))  # raises
            raise AssertionError
        attributes = vars(domain_event)
        decode = codec.decoders[codec.version]
        state = b""
        try:
            time_us = (attributes["timestamp"] - _EPOCH) // _MICROSECOND
            row = (codec.version, time_us, *[attributes[name] for name in codec.fields])
            state = _encoder.encode(row)
            same = decode(state) == row and len(attributes) == codec.attributes
        except (KeyError, *ENCODE_ERRORS):
            same = False
        if not same:
            _refuse(domain_event, codec)
        originator_id, version = attributes["originator_id"], attributes["originator_version"]
        if self._cipher is not None:
            state = self._cipher.encrypt(originator_id, version, codec.topic, state)
        return StoredEvent(originator_id, version, codec.topic, state)

    def to_domain_event(self, stored_event: StoredEvent) -> Any:
        """The event. Raises MapperDeserialisationError naming topic, id and version: UnknownTopicError for a topic that
        is not registered (nothing is imported), itself for anything that is not an event of that topic.
        """
        codec = self._by_topic.get(stored_event.topic)
        if codec is None:
            self.types.by_topic(stored_event.topic)  # raises
            raise AssertionError
        try:
            attributes = self._attributes(codec, stored_event)
        except (MapperDeserialisationError, DataError, *DECODE_ERRORS) as error:
            raise _bad_state(stored_event, error) from error
        event = object.__new__(codec.cls)
        object.__setattr__(event, "__dict__", attributes)
        return event

    def _attributes(self, codec: _Codec, stored: StoredEvent) -> dict[str, Any]:
        state = stored.state
        key = stored.originator_id
        cls = cast("Hashable", codec.cls)
        if state[:1] == b"\xc1":
            if self._cipher is None:
                raise MapperDeserialisationError("it is encrypted, and there are no keys here")
            state = self._cipher.decrypt(key, stored.originator_version, codec.topic, state)
        attributes: dict[str, Any] = {
            "originator_id": find_id_convertor(cls, cast("Hashable", type(key)))(key),
            "originator_version": stored.originator_version,
        }
        _decode_into(attributes, codec, state)
        if codec.kind.aggregate_field is not None:
            # `mutate` resolves this one with the library's look-up, which imports.
            self.types.resolve_aggregate(attributes[codec.kind.aggregate_field])
        return attributes


def _decode_into(attributes: dict[str, Any], codec: _Codec, state: bytes) -> None:
    """Add the time and the fields of the present version."""
    at = _VERSION_AT.get(state[0]) if state else None
    if at is None:
        version = _decode_map_into(attributes, codec, state)
        _make_present(attributes, codec, version)
        return
    version = state[at] if at < len(state) else 0
    decode = codec.decoders.get(version)
    if decode is None:
        raise MapperDeserialisationError(
            f"it is of class version {version}, known are 1..{codec.version}"
        )
    _, time_us, *values = decode(state)
    attributes["timestamp"] = _EPOCH + timedelta(microseconds=time_us)
    attributes.update(zip(codec.kind.layouts[version], values, strict=True))
    if version != codec.version:
        _make_present(attributes, codec, version)


def _decode_map_into(attributes: dict[str, Any], codec: _Codec, state: bytes) -> int:
    """Add the time and the fields that the library's mapper stored through `MsgpackTranscoder`; their version."""
    if not state or state[0] not in _MAP_HEADS:
        raise MapperDeserialisationError(f"no state begins with {state[:1].hex() or 'nothing'}")
    found: dict[Any, Any] = _decode_any(state)
    version = found.pop("class_version", 1)
    layout = codec.kind.layouts.get(version) if type(version) is int else None
    if layout is None or found.keys() != {"timestamp", *layout}:
        raise MapperDeserialisationError(
            f"its fields are not those of class version {version!r:.20}"
        )
    if not isinstance(found["timestamp"], datetime):
        raise MapperDeserialisationError("its time is none")
    attributes.update(found)
    return int(version)


def _make_present(attributes: dict[str, Any], codec: _Codec, version: int) -> None:
    """Upcast the fields of an older version, and hold all to the present types."""
    for number in range(version, codec.version):
        upcast = getattr(codec.cls, f"upcast_v{number}_v{number + 1}")
        try:
            upcast(attributes)
        except Exception as error:
            raise MapperDeserialisationError(f"{upcast.__name__} failed: {error!r}") from error
    wanted = {"originator_id", "originator_version", "timestamp", *codec.fields}
    if attributes.keys() != wanted:
        wrong = ", ".join(sorted(map(str, attributes.keys() ^ wanted)))
        raise MapperDeserialisationError(f"its upcasts leave other fields: {wrong}")
    row = (codec.version, 0, *[attributes[name] for name in codec.fields])
    try:
        _, _, *values = codec.decoders[codec.version](_encoder.encode(row))
    except ENCODE_ERRORS as error:
        raise MapperDeserialisationError(f"its fields are not of their types: {error}") from error
    attributes.update(zip(codec.fields, values, strict=True))


def _bad_state(stored: StoredEvent, error: Exception) -> MapperDeserialisationError:
    # An unknown topic inside stays recognisable as one.
    kind = type(error) if isinstance(error, MapperDeserialisationError) else None
    return (kind or MapperDeserialisationError)(
        f"event {stored.topic!r} of {stored.originator_id} version {stored.originator_version}"
        f" cannot be read: {error}"
    )


def _refuse(event: Any, codec: _Codec) -> NoReturn:
    """Say which field cannot be stored, and why. Off the fast path, so it may look at each by itself."""
    what = f"event {codec.topic!r} of {event.originator_id} version {event.originator_version}"
    attributes = vars(event)
    known = {"originator_id", "originator_version", "timestamp", *codec.fields}
    if attributes.keys() != known:
        names = ", ".join(sorted(attributes.keys() ^ known))
        raise DataError(f"{what} cannot be stored: missing or undeclared fields {names}")
    stamp = attributes["timestamp"]
    if not isinstance(stamp, datetime) or stamp.tzinfo is None:
        raise DataError(f"{what} cannot be stored: its time {stamp!r} has no zone")
    for name, hint in zip(codec.fields, codec.kind.hints, strict=True):
        value = attributes[name]
        try:
            data = _encoder.encode(value)
            back = msgspec.msgpack.decode(data, type=_decodable(hint))
        except ENCODE_ERRORS as error:
            raise DataError(f"{what} cannot be stored: field {name}: {error}") from error
        if back != value:
            raise DataError(
                f"{what} cannot be stored: field {name} of {type(value).__name__}"
                f" would come back as {type(back).__name__} {back!r:.100}"
            )
    raise DataError(f"{what} cannot be stored")


__all__ = ["EVENTS_PER_KEY_MAX", "EventCipher", "EventMapper"]
