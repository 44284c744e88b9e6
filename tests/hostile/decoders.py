# SPDX-License-Identifier: AGPL-3.0-or-later
"""What eats a peer's bytes, each under one invariant: **parsed, or an error that blames the peer; nothing else; memory bounded;
and what comes of the bytes does not depend on how they are split.**

A decoder is a function from pieces of bytes to what came of them. Hypothesis (``test_fuzz.py``) and the coverage-guided
fuzzer (`scripts/fuzz`) call ``check`` with bytes of their own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from bacula_adapter.backend.attributes import parse_stat, parse_tstamp
from bacula_adapter.backend.dialogue import Dialogue, Word
from bacula_adapter.backend.dialogue import State as Turn
from bacula_adapter.backend.packets import PacketReader
from replicator.errors import DamageError, PhcbtError, WireError
from replicator.phcbt import NEED_DATA, DataRecord, Decoder, Header
from replicator.phcbt.decode import Limits
from replicator.phcbt.format import HEADER_MAX
from replicator.wire import frames
from replicator.wire import messages as m
from replicator.wire.frames import FrameOpener
from replicator.wire.framing import MESSAGE_HEAD_BYTES, MessageParser
from replicator.wire.handshake import (
    MESSAGE_BYTES_MAX,
    SUITE_NAMES,
    ClientHandshake,
    Ephemeral,
    Offer,
    ServerHandshake,
    State,
)
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.session import Session

KEY: Final = PreSharedKey.from_hex(hashlib.sha256(b"key").hexdigest())
FRAME_KEY: Final = hashlib.sha256(b"a direction of a session").digest()
#: One for all: what it does with a key that it does not know is random, and must be the same for all ways to split.
_KEYRING: Final = Keyring([KEY])
SUITES: Final = tuple(SUITE_NAMES)
#: What a stream may ask for here: small, so that the bounds are reached by small inputs.
LIMITS: Final = Limits(chunk_max=1 << 16, disk_size_max=1 << 30)
#: A chunk, the digests of its grains of 4 KiB (32 bytes each at most), and a head.
RECORD_MAX: Final = (1 << 16) + 16 * 32 + 40

#: The errors that a peer's bytes may cause. Anything else is a defect.
BLAMES_THE_PEER: Final = (WireError, PhcbtError, DamageError)

Outcome = list[Any]
Feed = Callable[[Iterator[bytes]], Iterator[Any]]


def ephemeral(seed: bytes) -> Ephemeral:
    """Randomness of the handshake that is the same in each run."""
    digest = hashlib.sha256(seed).digest()
    return Ephemeral(X25519PrivateKey.from_private_bytes(digest), digest)


def client() -> ClientHandshake:
    """A source at the start of its handshake; its hello is always the same."""
    return ClientHandshake(KEY, offer=Offer(suites=SUITES), ephemeral=ephemeral(b"client"))


def server() -> ServerHandshake:
    """A receiver likewise."""
    return ServerHandshake(_KEYRING, suites=SUITES, ephemeral=ephemeral(b"server"))


def _handshake(party: ClientHandshake | ServerHandshake, pieces: Iterator[bytes]) -> Iterator[Any]:
    # What is sent back counts if the handshake goes on: a proof that came with the hello, before it could be made, is refused
    # before the hello is answered.
    reply = b""
    for piece in pieces:
        reply += party.receive_data(piece)
        if party.state is State.DONE:
            break
        assert len(party._buffer) <= MESSAGE_BYTES_MAX
    yield reply
    if party.state is State.DONE:
        assert party.session is not None
        yield party.session.session_id, party.session.suite
        yield party.trailing_data
        yield from pieces


def eat_as_server(pieces: Iterator[bytes]) -> Iterator[Any]:
    """The receiver's side of the handshake."""
    return _handshake(server(), pieces)


def eat_as_client(pieces: Iterator[bytes]) -> Iterator[Any]:
    """The source's side."""
    party = client()
    party.start()
    return _handshake(party, pieces)


def _frames(sealed: bool, pieces: Iterator[bytes]) -> Iterator[Any]:
    opener, fed = FrameOpener(FRAME_KEY, sealed=sealed), 0
    for piece in pieces:
        opener.receive_data(piece)
        fed += len(piece)
        while not isinstance(event := opener.next_event(), frames.NeedData):
            yield event if isinstance(event, frames.Close) else ("data", bytes(event.payload))
        assert opener.buffered_bytes <= min(fed, frames.BUFFER_BYTES)
    opener.receive_eof()


def eat_readable_frames(pieces: Iterator[bytes]) -> Iterator[Any]:
    """Frames with HMAC."""
    return _frames(False, pieces)


def eat_sealed_frames(pieces: Iterator[bytes]) -> Iterator[Any]:
    """Frames with AES-GCM."""
    return _frames(True, pieces)


def eat_frames_in_place(pieces: Iterator[bytes]) -> Iterator[Any]:
    """Sealed frames whose bytes are put straight into the opener's own memory, as from a socket."""
    opener = FrameOpener(FRAME_KEY, sealed=True)
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            room = opener.room()
            count = min(len(room), len(rest))
            assert count
            room[:count] = rest[:count]
            rest = rest[count:]
            opener.took(count)
            while not isinstance(event := opener.next_event(), frames.NeedData):
                yield event if isinstance(event, frames.Close) else ("data", bytes(event.payload))
    opener.receive_eof()


def eat_messages(pieces: Iterator[bytes]) -> Iterator[Any]:
    """Messages of the push protocol, with its bounds; bodies are not looked into."""
    parser, fed = MessageParser(m.LIMITS), 0
    longest = max(m.LIMITS.body_bytes_max(kind) for kind in range(256))
    for piece in pieces:
        parser.receive_data(piece)
        fed += len(piece)
        while (message := parser.next_message()) is not None:
            yield message[0], bytes(message[1])
        assert parser.buffered_bytes <= min(fed, MESSAGE_HEAD_BYTES + longest)
    parser.receive_eof()


def eat_session_of_source(pieces: Iterator[bytes]) -> Iterator[Any]:
    """All that a receiver decodes of an authenticated source: messages, their order, the first disk's stream."""
    parser, session, stream = MessageParser(m.LIMITS), Session(), Decoder(LIMITS)
    for piece in pieces:
        parser.receive_data(piece)
        while (message := parser.next_message()) is not None:
            kind, body = message
            if kind == m.CONTROL:
                control = m.decode_from_source(body)
                session.message(control)
                yield control
                _answer(session, control)
            elif kind == m.DATA:
                data = m.decode_data(body)
                session.message(data)
                yield data.disk, data.offset
                if data.disk == 0:
                    yield from _stream_events(stream, bytes(data.payload))
            else:
                raise WireError(f"message of kind {kind}")
    parser.receive_eof()


def _answer(session: Session, message: m.FromSource) -> None:
    """The receiver answers: yes to what asks for something."""
    answers: dict[type, m.Message] = {
        m.Query: m.VmState(None, 1, None),
        m.Abandon: m.VmState(None, 1, None),
        m.Open: m.Ready("1" * 16, (0,)),
        m.Finish: m.Committed("1" * 16, 1, bytes(32), 1, 1),
        m.Compare: m.ReceiverHead("key+1+x", "head", (), 0),
        m.SourceHead: m.Signed("head"),
        m.Doubt: m.VmState(None, 1, None),
        m.AskPages: m.PagesEnd(),
    }
    answer = answers.get(type(message))
    if answer is not None:
        session.message(answer)


def eat_session_of_receiver(pieces: Iterator[bytes]) -> Iterator[Any]:
    """All that a source decodes of an authenticated receiver, once it has asked."""
    parser, session = MessageParser(m.LIMITS), Session()
    session.message(m.Query("00000000-0000-4000-8000-000000000001", "web"))
    for piece in pieces:
        parser.receive_data(piece)
        while (message := parser.next_message()) is not None:
            kind, body = message
            if kind != m.CONTROL:
                raise WireError("the receiver sent data")
            answer = m.decode_from_receiver(body)
            session.message(answer)
            yield answer
    parser.receive_eof()


def _stream_events(decoder: Decoder, data: bytes) -> Iterator[Any]:
    decoder.receive_data(data)
    while (event := decoder.next_event()) is not NEED_DATA:
        assert decoder.buffered <= len(data) + RECORD_MAX
        if isinstance(event, DataRecord):
            assert decoder.header is not None
            yield event.position, event.offset, bytes(event.raw), bytes(event.plain(decoder.header))
        elif isinstance(event, Header):
            yield event.header
        else:
            yield type(event).__name__, event.position, bytes(event.raw)
    assert decoder.buffered <= max(RECORD_MAX, HEADER_MAX)


def eat_stream(pieces: Iterator[bytes]) -> Iterator[Any]:
    """A disk's stream (PHCBT01), payloads included."""
    decoder = Decoder(LIMITS)
    for piece in pieces:
        yield from _stream_events(decoder, piece)
    decoder.close()


#: What the backend says where it is its turn, at its shortest.
_BACKEND_SAYS: Final = {
    Turn.WELCOME: (Word.WELCOME,),
    Turn.JOB_TAKEN: (Word.DONE,),
    Turn.PARAMS_TAKEN: (Word.DONE,),
    Turn.BACKUP_OPENING: (Word.DONE, Word.DONE),
    Turn.CHECKING: (Word.SEEN,),
    Turn.LIST_OPENING: (Word.DONE, Word.DONE),
    Turn.QUERY_OPENING: (Word.DONE, Word.DONE),
    Turn.RESTORE_OPENING: (Word.DONE,),
    Turn.OBJECT_TAKING: (Word.SEND,),
    Turn.FILE_CREATING: (Word.SEND,),
    Turn.FILE_CLOSING: (Word.SEND,),
    Turn.FINISHING: (Word.DONE,),
    Turn.VERDICT: (Word.RESULT_OK,),
    Turn.ENDING: (Word.DONE,),
}


def eat_plugin(pieces: Iterator[bytes]) -> Iterator[Any]:
    """All that the Bacula backend decodes of a file daemon's plugin, which gets an answer at once."""
    reader, dialogue = PacketReader(), Dialogue()
    for piece in pieces:
        for packet in reader.feed(piece):
            said = dialogue.receive(packet)
            yield said.word, said.text, said.data
            if said.word is Word.STAT:
                yield parse_stat(said.text)
            elif said.word is Word.TSTAMP:
                yield parse_tstamp(said.text)
            for word in _BACKEND_SAYS.get(dialogue.state, ()):
                dialogue.say(word)
            assert not dialogue.state.ours


#: By name: the fuzzer takes one as its argument.
DECODERS: Final[dict[str, Feed]] = {
    eater.__name__.removeprefix("eat_"): eater
    for eater in (
        eat_as_server,
        eat_as_client,
        eat_readable_frames,
        eat_sealed_frames,
        eat_frames_in_place,
        eat_messages,
        eat_session_of_source,
        eat_session_of_receiver,
        eat_stream,
        eat_plugin,
    )
}


def outcome(eat: Feed, pieces: Sequence[bytes]) -> Outcome:
    """What came of the pieces: events in order, neighbouring bytes joined, and the error that it ended with, if one did."""
    found: Outcome = []
    try:
        for event in eat(iter(pieces)):
            if isinstance(event, bytes) and found and isinstance(found[-1], bytes):
                found[-1] += event
            elif event != b"":
                found.append(event)
    except BLAMES_THE_PEER as error:
        found.append((type(error).__name__, str(error)))
    assert FRAME_KEY.hex() not in repr(found[-1:])
    return found


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The data cut at these places; places outside it are none. Pieces may be empty."""
    marks = [0, *sorted(min(max(cut, 0), len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(marks)]


def check(eat: Feed, data: bytes, cuts: Sequence[int], *, bytewise: bool = True) -> Outcome:
    """Hold a decoder to the invariant over ``data``: whole, cut at ``cuts``, and byte by byte. Returns what came of it."""
    whole = outcome(eat, [data])
    assert outcome(eat, split(data, cuts)) == whole
    if bytewise:
        assert outcome(eat, [data[at : at + 1] for at in range(len(data))]) == whole
    return whole


__all__ = [
    "BLAMES_THE_PEER",
    "DECODERS",
    "FRAME_KEY",
    "KEY",
    "LIMITS",
    "check",
    "client",
    "outcome",
    "server",
    "split",
]
