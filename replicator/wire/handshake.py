# SPDX-License-Identifier: AGPL-3.0-or-later
"""The handshake that opens a session: bytes in, bytes out (docs/wire.md, section 2).

Both sides prove that they hold the same pre-shared key over a hash of every byte of both hellos,
and derive fresh keys from that key and an ephemeral X25519 exchange. There is no socket and no
clock here, and no knowledge of what is sent afterwards.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replicator.errors import AuthenticationError, WireError
from replicator.wire.keys import HINT_BYTES, Keyring, PreSharedKey

__all__ = [
    "Alert",
    "ClientHandshake",
    "Ephemeral",
    "Event",
    "Keyring",
    "Offer",
    "PreSharedKey",
    "ServerHandshake",
    "Session",
    "State",
]

MAGIC: Final = b"RPLW"
VERSIONS: Final = (1,)
SUITE_READABLE: Final = 1
"""X25519, HKDF-SHA256, HMAC-SHA256: authenticated, not encrypted."""
SUITE_SEALED: Final = 2
"""X25519, HKDF-SHA256, AES-256-GCM: authenticated and encrypted."""
SUITES: Final = (SUITE_SEALED,)
"""What a side speaks unless it is told otherwise."""
SUITE_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {SUITE_READABLE: "none", SUITE_SEALED: "aes-256-gcm"}
)
"""Each suite as ``dr_cipher`` calls it."""

MESSAGE_BYTES_MAX: Final = 1024
NONCE_BYTES: Final = 32
PUBLIC_BYTES: Final = 32
MAC_BYTES: Final = 32
SESSION_ID_BYTES: Final = 16
OFFER_MAX: Final = 16

_HEAD: Final = struct.Struct(">4sBBH")
_CHOICE: Final = struct.Struct(">HH")
_SERVER_BODY_BYTES: Final = _CHOICE.size + NONCE_BYTES + PUBLIC_BYTES + MAC_BYTES
_CLIENT_FIXED_BYTES: Final = NONCE_BYTES + PUBLIC_BYTES + HINT_BYTES
_BODY_BYTES_MAX: Final = MESSAGE_BYTES_MAX - _HEAD.size

_LABEL_HELLOS: Final = b"replctl wire v1 hellos\0"
_LABEL_KEYS: Final = b"replctl wire v1 session keys"
_LABEL_SERVER: Final = b"replctl wire v1 server proof\0"
_LABEL_CLIENT: Final = b"replctl wire v1 client proof\0"

MISMATCH: Final = "token mismatch between source and receiver"


class State(Enum):
    """Where one side of a handshake stands."""

    CLIENT_START = "client start"
    CLIENT_WAITS_HELLO = "client waits for the server's hello"
    SERVER_WAITS_HELLO = "server waits for the client's hello"
    SERVER_WAITS_PROOF = "server waits for the client's proof"
    DONE = "done"
    FAILED = "failed"


class Event(IntEnum):
    """What can happen to a handshake; the values above zero are the message types on the wire."""

    START = 0
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    CLIENT_PROOF = 3
    ALERT = 4


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = MappingProxyType(
    {
        (State.CLIENT_START, Event.START): State.CLIENT_WAITS_HELLO,
        (State.CLIENT_WAITS_HELLO, Event.SERVER_HELLO): State.DONE,
        (State.CLIENT_WAITS_HELLO, Event.ALERT): State.FAILED,
        (State.SERVER_WAITS_HELLO, Event.CLIENT_HELLO): State.SERVER_WAITS_PROOF,
        (State.SERVER_WAITS_HELLO, Event.ALERT): State.FAILED,
        (State.SERVER_WAITS_PROOF, Event.CLIENT_PROOF): State.DONE,
        (State.SERVER_WAITS_PROOF, Event.ALERT): State.FAILED,
    }
)
"""The whole state machine. A pair that is not here is a protocol error and ends in ``FAILED``."""

_BODY_BYTES: Final[Mapping[Event, range]] = MappingProxyType(
    {
        Event.CLIENT_HELLO: range(1, _BODY_BYTES_MAX + 1),
        Event.SERVER_HELLO: range(_SERVER_BODY_BYTES, _SERVER_BODY_BYTES + 1),
        Event.CLIENT_PROOF: range(MAC_BYTES, MAC_BYTES + 1),
        Event.ALERT: range(1, 2),
    }
)


class Alert(IntEnum):
    """Why a side gave up, told in the clear. A hint for the operator: anybody can forge it."""

    AUTHENTICATION = 1
    NO_COMMON_VERSION = 2
    NO_COMMON_SUITE = 3
    MALFORMED = 4
    CERTIFICATE_WANTED = 5


_ALERT_TEXTS: Final[Mapping[int, str]] = MappingProxyType(
    {
        Alert.NO_COMMON_VERSION: "no protocol version in common",
        Alert.NO_COMMON_SUITE: "no cipher in common: dr_cipher differs on source and receiver",
        Alert.MALFORMED: "it did not understand the handshake",
        Alert.CERTIFICATE_WANTED: "it takes certificates only (dr_auth_cert, dr_auth_key, dr_ca_cert)",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """What a finished handshake leaves. ``session_id`` may be logged; the keys never are."""

    version: int
    suite: int
    session_id: bytes
    peer_key: PreSharedKey
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Ephemeral:
    """One side's fresh randomness. A parameter only so that test vectors can fix it."""

    private: X25519PrivateKey = field(repr=False)
    nonce: bytes

    @classmethod
    def generate(cls) -> Ephemeral:
        """Fresh randomness from the operating system."""
        return cls(X25519PrivateKey.generate(), secrets.token_bytes(NONCE_BYTES))

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self.private.public_key().public_bytes_raw()


@dataclass(frozen=True, slots=True)
class Offer:
    """The versions and suites that a client is ready to speak, best first; not empty."""

    versions: tuple[int, ...] = VERSIONS
    suites: tuple[int, ...] = SUITES


@dataclass(frozen=True, slots=True)
class _ClientHello:
    versions: tuple[int, ...]
    suites: tuple[int, ...]
    public: bytes
    hint: bytes


@dataclass(frozen=True, slots=True)
class _Secrets:
    server_proof: bytes = field(repr=False)
    client_proof: bytes = field(repr=False)
    to_server: bytes = field(repr=False)
    to_client: bytes = field(repr=False)
    session_id: bytes


class _Handshake:
    """What both roles share: the table, the buffer, the alert."""

    def __init__(self, state: State, ephemeral: Ephemeral | None) -> None:
        self._state = state
        self._ephemeral = Ephemeral.generate() if ephemeral is None else ephemeral
        self._buffer = bytearray()
        self._client_hello = b""
        self._alert = b""
        self._session: Session | None = None
        self._handlers: dict[Event, Callable[[bytes], bytes]] = {}

    @property
    def state(self) -> State:
        """The present state."""
        return self._state

    @property
    def session(self) -> Session | None:
        """The session, once the state is ``DONE``; else ``None``."""
        return self._session

    @property
    def alert(self) -> bytes:
        """After an error: the bytes to tell the other side why, before closing; may be empty."""
        return self._alert

    @property
    def trailing_data(self) -> bytes:
        """Bytes that came after the handshake's last message. They belong to the frames."""
        return bytes(self._buffer) if self._state is State.DONE else b""

    def receive_data(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the other side; return the bytes to send to it, perhaps none.

        Holds no more than ``MESSAGE_BYTES_MAX`` bytes of an unfinished message. Raises
        :class:`AuthenticationError` or :class:`WireError`; the handshake is over then, and
        :attr:`alert` should be sent before the connection is closed.
        """
        if self._state is State.FAILED:
            raise WireError("the handshake has already failed")
        if self._state is State.DONE:
            raise RuntimeError("the handshake is over; its bytes belong to the frames now")
        self._buffer += data
        reply = b""
        try:
            while (message := self._next_message()) is not None:
                event, whole = message
                reply += self._step(event, whole)
        except WireError:
            self._state = State.FAILED
            self._buffer.clear()
            raise
        return reply

    def _next_message(self) -> tuple[Event, bytes] | None:
        if self._state is State.DONE or len(self._buffer) < _HEAD.size:
            return None
        magic, kind, reserved, length = _HEAD.unpack_from(self._buffer)
        if magic != MAGIC or reserved != 0:
            self._refuse(Alert.MALFORMED, "the other side does not speak this protocol")
        # The table is asked before the body is waited for: no byte is buffered that has no use.
        if kind == Event.START or (self._state, kind) not in TRANSITIONS:
            self._refuse(Alert.MALFORMED, f"message type {kind} while the {self._state.value}")
        event = Event(kind)
        if length not in _BODY_BYTES[event]:
            self._refuse(Alert.MALFORMED, f"handshake message type {kind} of {length} bytes")
        if len(self._buffer) < _HEAD.size + length:
            return None
        whole = bytes(self._buffer[: _HEAD.size + length])
        del self._buffer[: _HEAD.size + length]
        return event, whole

    def _step(self, event: Event, whole: bytes) -> bytes:
        if event is Event.ALERT:
            self._raise_alert(whole[_HEAD.size])
        reply = self._handlers[event](whole)
        self._state = TRANSITIONS[self._state, event]
        return reply

    def _refuse(self, alert: Alert, reason: str) -> NoReturn:
        self._alert = alert_message(alert)
        if alert is Alert.AUTHENTICATION:
            raise AuthenticationError(reason)
        raise WireError(reason)

    def _raise_alert(self, code: int) -> NoReturn:
        # Not answered with an alert of ours, and not believed further than its text.
        if code == Alert.AUTHENTICATION:
            raise AuthenticationError(f"{MISMATCH} (so the other side says; not proven)")
        text = _ALERT_TEXTS.get(code, f"alert {code}")
        raise WireError(f"the other side ended the handshake: {text} (not proven)")

    def _exchange(self, public: bytes) -> bytes:
        try:
            return self._ephemeral.private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            # The library refuses an all-zero result (RFC 7748, section 6.1): a low-order point.
            self._refuse(Alert.MALFORMED, "the other side sent a weak public key")


class ClientHandshake(_Handshake):
    """The side that connects (the source). Call :meth:`start`, then feed what comes."""

    def __init__(
        self,
        key: PreSharedKey,
        *,
        offer: Offer = Offer(),
        ephemeral: Ephemeral | None = None,
    ) -> None:
        super().__init__(State.CLIENT_START, ephemeral)
        self._key = key
        self._offer = offer
        self._handlers = {Event.SERVER_HELLO: self._answer_hello}

    def start(self) -> bytes:
        """The client's hello, to be sent first. May be called once."""
        if (self._state, Event.START) not in TRANSITIONS:
            raise RuntimeError(f"start() while the {self._state.value}")
        body = b"".join(
            (
                _encode_list(self._offer.versions),
                _encode_list(self._offer.suites),
                self._ephemeral.nonce,
                self._ephemeral.public,
                self._key.hint,
            )
        )
        self._client_hello = _message(Event.CLIENT_HELLO, body)
        self._state = TRANSITIONS[self._state, Event.START]
        return self._client_hello

    def _answer_hello(self, whole: bytes) -> bytes:
        version, suite = _CHOICE.unpack_from(whole, _HEAD.size)
        if version not in self._offer.versions or suite not in self._offer.suites:
            self._refuse(
                Alert.MALFORMED,
                f"the other side chose version {version}, suite {suite}: not offered",
            )
        unsigned, proof = whole[:-MAC_BYTES], whole[-MAC_BYTES:]
        shared = self._exchange(unsigned[-PUBLIC_BYTES:])
        transcript = _transcript(self._client_hello, unsigned)
        keys = _derive(self._key, shared, transcript)
        if not hmac.compare_digest(proof, _server_proof(keys, transcript)):
            self._refuse(
                Alert.AUTHENTICATION, f"{MISMATCH}, or the handshake was altered on the way"
            )
        self._session = Session(
            version, suite, keys.session_id, self._key, keys.to_server, keys.to_client
        )
        return _message(Event.CLIENT_PROOF, _client_proof(keys, transcript, proof))


class ServerHandshake(_Handshake):
    """The side that accepts (the receiver). Feed what comes. ``suites``: those that it takes, best first."""

    def __init__(
        self,
        keyring: Keyring,
        *,
        suites: tuple[int, ...] = SUITES,
        ephemeral: Ephemeral | None = None,
    ) -> None:
        super().__init__(State.SERVER_WAITS_HELLO, ephemeral)
        self._keyring = keyring
        self._suites = suites
        self._pending: Session | None = None
        self._expected_proof = b""
        self._key_known = False
        self._handlers = {
            Event.CLIENT_HELLO: self._answer_hello,
            Event.CLIENT_PROOF: self._check_proof,
        }

    def _answer_hello(self, whole: bytes) -> bytes:
        try:
            hello = _decode_client_hello(whole[_HEAD.size :])
        except ValueError as error:
            self._refuse(Alert.MALFORMED, f"the client's hello is malformed: {error}")
        version = _choose(VERSIONS, hello.versions)
        if version is None:
            self._refuse(Alert.NO_COMMON_VERSION, "no protocol version in common with the client")
        suite = _choose(self._suites, hello.suites)
        if suite is None:
            self._refuse(
                Alert.NO_COMMON_SUITE,
                f"no cipher in common: dr_cipher is {_suite_names(hello.suites)} on the source"
                f" and {_suite_names(self._suites)} on the receiver",
            )
        shared = self._exchange(hello.public)
        key, self._key_known = self._keyring.find(hello.hint)
        unsigned = _message(
            Event.SERVER_HELLO,
            _CHOICE.pack(version, suite) + self._ephemeral.nonce + self._ephemeral.public,
            missing_bytes=MAC_BYTES,
        )
        transcript = _transcript(whole, unsigned)
        keys = _derive(key, shared, transcript)
        proof = _server_proof(keys, transcript)
        self._expected_proof = _client_proof(keys, transcript, proof)
        self._pending = Session(
            version, suite, keys.session_id, key, keys.to_client, keys.to_server
        )
        return unsigned + proof

    def _check_proof(self, whole: bytes) -> bytes:
        # Both are looked at, always: an unknown hint costs and answers what a wrong proof does.
        genuine = hmac.compare_digest(whole[_HEAD.size :], self._expected_proof)
        if not genuine & self._key_known:
            self._refuse(Alert.AUTHENTICATION, f"{MISMATCH}: the client proved no key known here")
        self._session = self._pending
        return b""


def alert_message(alert: Alert) -> bytes:
    """The bytes that tell the other side why no handshake will take place."""
    return _message(Event.ALERT, bytes([alert]))


def _suite_names(suites: tuple[int, ...]) -> str:
    return " or ".join(SUITE_NAMES.get(suite, f"suite {suite}") for suite in suites)


def _message(event: Event, body: bytes, *, missing_bytes: int = 0) -> bytes:
    """A message, or the start of one whose last ``missing_bytes`` the caller appends."""
    return _HEAD.pack(MAGIC, event, 0, len(body) + missing_bytes) + body


def _encode_list(values: tuple[int, ...]) -> bytes:
    return struct.pack(f">B{len(values)}H", len(values), *values)


def _decode_list(body: bytes, position: int) -> tuple[tuple[int, ...], int]:
    if position >= len(body):
        raise ValueError("a list is missing")
    count = body[position]
    if not 1 <= count <= OFFER_MAX:
        raise ValueError(f"a list of {count} entries")
    end = position + 1 + 2 * count
    if end > len(body):
        raise ValueError("a list is cut short")
    return struct.unpack(f">{count}H", body[position + 1 : end]), end


def _decode_client_hello(body: bytes) -> _ClientHello:
    versions, position = _decode_list(body, 0)
    suites, position = _decode_list(body, position)
    # What follows the fixed part is for later versions: not understood here, but in the transcript.
    if len(body) - position < _CLIENT_FIXED_BYTES:
        raise ValueError("it is too short")
    public_at = position + NONCE_BYTES
    hint_at = public_at + PUBLIC_BYTES
    return _ClientHello(
        versions, suites, body[public_at:hint_at], body[hint_at : hint_at + HINT_BYTES]
    )


def _choose(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int | None:
    return next((value for value in ours if value in theirs), None)


def _transcript(client_hello: bytes, server_unsigned: bytes) -> bytes:
    return hashlib.sha256(_LABEL_HELLOS + client_hello + server_unsigned).digest()


def _derive(key: PreSharedKey, shared: bytes, transcript: bytes) -> _Secrets:
    size = 4 * MAC_BYTES + SESSION_ID_BYTES
    kdf = HKDF(algorithm=SHA256(), length=size, salt=transcript, info=_LABEL_KEYS)
    okm = kdf.derive(struct.pack(">H", len(key.secret)) + key.secret + shared)
    return _Secrets(okm[:32], okm[32:64], okm[64:96], okm[96:128], okm[128:])


def _server_proof(keys: _Secrets, transcript: bytes) -> bytes:
    return hmac.digest(keys.server_proof, _LABEL_SERVER + transcript, "sha256")


def _client_proof(keys: _Secrets, transcript: bytes, server_proof: bytes) -> bytes:
    return hmac.digest(keys.client_proof, _LABEL_CLIENT + transcript + server_proof, "sha256")
