# SPDX-License-Identifier: AGPL-3.0-or-later
"""The client against servers that lie, die or say nothing: reply parsing without a socket, and a
scripted server.
"""

from __future__ import annotations

import errno
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from replicator.nbd import protocol
from replicator.nbd.client import NbdClient, open_nbd
from replicator.nbd.protocol import (
    Chunk,
    Command,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    Request,
)
from replicator.nbd.replies import Pending, ReplyParser

DONE = protocol.CHUNK_DONE
SIZE = 1 << 20


def chunk(kind: int, payload: bytes, *, cookie: int = 1, flags: int = DONE) -> bytes:
    magic = protocol.STRUCTURED_REPLY_MAGIC
    return protocol.CHUNK.pack(magic, flags, kind, cookie, len(payload)) + payload


def data(offset: int, content: bytes, *, cookie: int = 1, flags: int = DONE) -> bytes:
    payload = struct.pack(">Q", offset) + content
    return chunk(Chunk.OFFSET_DATA, payload, cookie=cookie, flags=flags)


def hole(offset: int, length: int, *, cookie: int = 1, flags: int = DONE) -> bytes:
    return chunk(Chunk.OFFSET_HOLE, struct.pack(">QI", offset, length), cookie=cookie, flags=flags)


def simple(code: int, *, cookie: int = 1) -> bytes:
    return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, code, cookie)


def status(*pieces: tuple[int, int], context: int = 1) -> bytes:
    body = b"".join(struct.pack(">II", length, flags) for length, flags in pieces)
    return chunk(Chunk.BLOCK_STATUS, struct.pack(">I", context) + body)


def reading(offset: int, length: int) -> Pending:
    # What the buffer held before must never show.
    return Pending(Command.READ, offset, length, buffer=memoryview(bytearray(b"?" * length)))


def feed(parser: ReplyParser, stream: bytes, step: int = 1 << 30) -> list[Pending]:
    """Feed bytes as a socket would: never more than fits the target, and at most ``step`` at once."""
    finished: list[Pending] = []
    at = 0
    while at < len(stream):
        target = parser.target()
        assert len(target)
        piece = stream[at : at + min(step, len(target))]
        target[: len(piece)] = piece
        finished += parser.received(len(piece))
        at += len(piece)
    return finished


@given(st.integers(1, 700), st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_replies_cut_anywhere_mean_the_same(step: int, lengths: list[int]) -> None:
    """Several reads, answered in reverse, each in two chunks: data and a hole."""
    pending: dict[int, Pending] = {}
    stream = b""
    for cookie, length in reversed(list(enumerate(lengths))):
        stream += hole(50, length, cookie=cookie, flags=0)
        stream += data(50 + length, bytes([cookie + 1]) * length, cookie=cookie)
    for cookie, length in enumerate(lengths):
        pending[cookie] = reading(50, 2 * length)
    asked = dict(pending)
    finished = feed(ReplyParser(pending), stream, step)
    assert finished == [asked[cookie] for cookie in reversed(range(len(lengths)))]
    assert pending == {}
    for cookie, length in enumerate(lengths):
        assert asked[cookie].done
        assert bytes(asked[cookie].buffer or b"") == bytes(length) + bytes([cookie + 1]) * length


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (bytes(64), "magic number"),
        (simple(0, cookie=2), "not made"),
        (simple(0), "simple reply"),
        (data(100, b"x" * 10, cookie=7), "not made"),
        (data(99, b"x" * 10), "not asked for"),
        (data(101, b"x" * 10), "not asked for"),
        (data(100, b"x" * 11), "not asked for"),
        (data(1 << 63, b"x"), "not asked for"),
        (data(100, b""), "without data"),
        (data(100, b"x" * 9), "9 bytes for a read of 10"),
        (data(100, b"x" * 10, flags=0) + data(100, b"x" * 10), "20 bytes for a read of 10"),
        (hole(100, 0), "not asked for"),
        (hole(100, 0xFFFFFFFF), "not asked for"),
        (chunk(Chunk.OFFSET_HOLE, b"short"), "hole chunk of 5"),
        (chunk(Chunk.NONE, b""), "0 bytes for a read of 10"),
        (chunk(Chunk.NONE, b"x"), "not empty"),
        (chunk(77, b""), "unknown kind 77"),
        (chunk(Chunk.ERROR, b"xy"), "error chunk of 2"),
        (chunk(Chunk.ERROR, struct.pack(">IH", 5, 100) + b"short"), "longer than its chunk"),
        (protocol.CHUNK.pack(protocol.STRUCTURED_REPLY_MAGIC, 1, 32769, 1, 1 << 31), "error chunk"),
        (protocol.CHUNK.pack(protocol.STRUCTURED_REPLY_MAGIC, 1, 5, 1, 1 << 31), "block status"),
        (status((10, 0)), "block status"),
    ],
)
def test_lies_in_answer_to_a_read(reply: bytes, words: str) -> None:
    parser = ReplyParser({1: reading(100, 10)})
    with pytest.raises(NbdProtocolError, match=words):
        feed(parser, reply)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(), "of 4 bytes"),
        (status((0, 0)), "covers nothing"),
        (status((10, 0), (1, 0)), "covers nothing"),
        (chunk(Chunk.BLOCK_STATUS, b"\0" * 13), "of 13 bytes"),
        (chunk(Chunk.NONE, b""), "without a status"),
        (status((10, 0))[:4] + b"\0\0" + status((10, 0))[6:] + status((10, 0)), "given twice"),
        (protocol.CHUNK.pack(protocol.STRUCTURED_REPLY_MAGIC, 1, 5, 1, 1 << 21), "block status"),
    ],
)
def test_lies_in_answer_to_block_status(reply: bytes, words: str) -> None:
    parser = ReplyParser({1: Pending(Command.BLOCK_STATUS, 100, 10, statuses={})})
    with pytest.raises(NbdProtocolError, match=words):
        feed(parser, reply)


def test_a_status_beyond_the_question_is_cut() -> None:
    pending = Pending(Command.BLOCK_STATUS, 100, 10, statuses={})
    feed(ReplyParser({1: pending}), status((4, 1), (4000, 3)))
    assert pending.statuses is not None
    assert [(e.offset, e.length, e.flags) for e in pending.statuses[1]] == [
        (100, 4, 1),
        (104, 6, 3),
    ]


def test_errors_are_the_requests_own() -> None:
    one, two = reading(0, 4), reading(8, 4)
    reply = chunk(Chunk.ERROR, struct.pack(">IH", errno.EIO, 4) + b"bad\n", cookie=1)
    reply += chunk(Chunk.ERROR_OFFSET, struct.pack(">IHQ", 0, 0, 8), cookie=2)
    feed(ReplyParser({1: one, 2: two}), reply)
    assert one.error is not None
    assert str(one.error) == "the NBD server failed READ of 4 bytes at 0: EIO (bad)"
    assert two.error is not None
    assert two.error.code == errno.EIO


# --- a scripted server ---

Script = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as folder:
        path = Path(folder) / "s"
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await sock.bind(str(path))
        sock.listen(1)

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await script(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handle, [trio.SocketListener(sock)])
            yield path
            nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    content = b""
    while len(content) < count:
        piece = await stream.receive_some(count - len(content))
        if not piece:
            raise trio.ClosedResourceError
        content += piece
    return content


GREETING = protocol.GREETING.pack(protocol.INIT_MAGIC, protocol.OPTION_MAGIC, 3)
EXPORT = struct.pack(">HQH", protocol.Info.EXPORT, SIZE, protocol.TransmissionFlag.HAS_FLAGS)


async def ready(stream: trio.SocketStream) -> None:
    """Negotiate honestly."""
    await stream.send_all(GREETING)
    await receive(stream, 4)
    for option in (protocol.Option.STRUCTURED_REPLY, protocol.Option.GO):
        head = await receive(stream, protocol.OPTION.size)
        await receive(stream, protocol.OPTION.unpack(head)[2])
        if option == protocol.Option.GO:
            await stream.send_all(protocol.encode_option_reply(option, protocol.Reply.INFO, EXPORT))
        await stream.send_all(protocol.encode_option_reply(option, protocol.Reply.ACK))


async def next_request(stream: trio.SocketStream) -> Request:
    return Request.decode(await receive(stream, protocol.REQUEST.size))


def answer_to(request: Request, content: bytes | None = None) -> bytes:
    body = content if content is not None else bytes([request.offset % 251]) * request.length
    return data(request.offset, body, cookie=request.cookie)


ACK = protocol.encode_option_reply(8, protocol.Reply.ACK)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"NBDMAGIC" + bytes(144), "not an NBD server"),
        (protocol.GREETING.pack(protocol.INIT_MAGIC, protocol.OPTION_MAGIC, 0), "too old"),
        (GREETING + bytes(20), "another question"),
        (GREETING + protocol.encode_option_reply(7, protocol.Reply.ACK), "another question"),
        (GREETING + protocol.encode_option_reply(8, protocol.Reply.ERR_POLICY, b"no"), "no$"),
        (GREETING + protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, 8, 1, 1 << 31), "2147"),
        (GREETING + ACK + protocol.encode_option_reply(7, protocol.Reply.ACK), "did not say"),
        (GREETING + ACK + protocol.encode_option_reply(7, protocol.Reply.SERVER), "reply 2 to GO"),
        (GREETING + ACK + protocol.encode_option_reply(7, protocol.Reply.INFO, b"\0"), "shorter"),
        (
            GREETING
            + ACK
            + protocol.encode_option_reply(
                7, protocol.Reply.INFO, struct.pack(">HIII", 3, 3000, 4096, 1 << 20)
            ),
            "block sizes",
        ),
        (
            GREETING
            + ACK
            + protocol.encode_option_reply(
                7, protocol.Reply.INFO, struct.pack(">HQH", 0, 1 << 63, 1)
            ),
            "export of",
        ),
        (GREETING + ACK[:10], "closed the connection"),
    ],
)
async def test_lies_in_negotiation(said: bytes, words: str) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(said)
        await stream.send_eof()
        while await stream.receive_some(4096):
            pass

    async with scripted(script) as path:
        with pytest.raises(NbdError, match=words):
            await NbdClient.connect(path, "d")


async def test_a_server_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0

    async def script(_stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with scripted(script) as path:
        with pytest.raises(NbdError, match="does not answer"):
            await NbdClient.connect(path, "d")


async def test_nobody_there() -> None:
    with pytest.raises(NbdError, match="No such file") as caught:
        await NbdClient.connect(Path("/tmp/no-such-nbd-server"), "d")
    assert caught.value.code == errno.ENOENT


async def test_answers_out_of_order_and_cancelled_requests() -> None:
    """A task that reads for all is cancelled; the others still get what is theirs."""
    release = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await ready(stream)
        requests = [await next_request(stream) for _ in range(4)]
        await release.wait()
        for request in reversed(requests):
            await stream.send_all(answer_to(request))
        await stream.send_all(answer_to(await next_request(stream)))

    got: dict[int, bytes] = {}

    async with scripted(script) as path, open_nbd(path, "d") as client:

        async def one(offset: int, scope: trio.CancelScope) -> None:
            with scope:
                got[offset] = await client.read(offset, 1000)

        scopes = [trio.CancelScope() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for offset, scope in enumerate(scopes):
                nursery.start_soon(one, offset, scope)
                await trio.testing.wait_all_tasks_blocked()
            # The first leads; the second, woken to lead, is cancelled at the same time.
            scopes[0].cancel()
            scopes[1].cancel()
            await trio.testing.wait_all_tasks_blocked()
            release.set()
        assert got == {offset: bytes([offset]) * 1000 for offset in (2, 3)}
        assert await client.read(200, 10) == bytes([200]) * 10


async def test_no_more_requests_travel_than_allowed() -> None:
    seen = 0

    async def script(stream: trio.SocketStream) -> None:
        nonlocal seen
        await ready(stream)
        for _ in range(5):
            requests = [await next_request(stream) for _ in range(2)]
            with trio.move_on_after(0):
                await receive(stream, 1)
                seen += 1
            for request in requests:
                await stream.send_all(answer_to(request))

    async with (
        scripted(script) as path,
        open_nbd(path, "d", depth=2) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(10):
            nursery.start_soon(client.read, 0, 100)
    assert seen == 0


@pytest.mark.parametrize("broken", [b"", bytes(100)])
async def test_everyone_learns_of_the_end(broken: bytes) -> None:
    """A server that dies, or lies, in the middle: all who wait and all who come later get an error."""

    async def script(stream: trio.SocketStream) -> None:
        await ready(stream)
        for _ in range(3):
            await next_request(stream)
        if broken:
            await stream.send_all(broken)

    failures: list[NbdError] = []

    async with scripted(script) as path, open_nbd(path, "d") as client:

        async def one() -> None:
            with pytest.raises(NbdProtocolError if broken else NbdDisconnectedError) as caught:
                await client.read(0, 100)
            failures.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert len(failures) == 3
        with pytest.raises(NbdDisconnectedError):
            await client.read(0, 100)


async def test_a_write_cancelled_half_way_ends_the_connection() -> None:
    async def script(stream: trio.SocketStream) -> None:
        await ready(stream)
        await trio.sleep_forever()

    async with scripted(script) as path, open_nbd(path, "d") as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.write, 0, bytes(SIZE))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(NbdDisconnectedError, match="half sent"):
            await client.read(0, 1)


async def test_ranges_outside_the_export_are_the_callers_mistake() -> None:
    async def script(stream: trio.SocketStream) -> None:
        await ready(stream)
        await trio.sleep_forever()

    async with scripted(script) as path, open_nbd(path, "d") as client:
        for offset, length in ((-1, 2), (0, 0), (SIZE, 1), (0, SIZE + 1)):
            with pytest.raises(ValueError, match="of an export of"):
                await client.read(offset, length)
    with pytest.raises(NbdDisconnectedError, match="was closed"):
        await client.read(0, 1)
    await client.aclose()
