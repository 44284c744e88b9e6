# SPDX-License-Identifier: AGPL-3.0-or-later
"""Messages over a byte stream."""

from __future__ import annotations

import itertools

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import WireError
from replicator.wire.framing import (
    CONTROL_BYTES_MAX,
    Message,
    MessageLimits,
    MessageParser,
    MessageStream,
)
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.stream import AuthenticatedStream, accept_stream, connect_stream
from tests.limits import HANG_S

KEY = PreSharedKey.from_hex("5a" * 32)
DATA = 9
DATA_MAX = 1 << 20
LIMITS = MessageLimits({DATA: DATA_MAX, 0: 0})


def encode(kind: int, body: bytes) -> bytes:
    return len(body).to_bytes(4) + bytes([kind]) + body


def take(parser: MessageParser, data: bytes) -> list[tuple[int, bytes]]:
    parser.receive_data(data)
    found = []
    while (message := parser.next_message()) is not None:
        found.append(plain(message))
    return found


def plain(message: Message) -> tuple[int, bytes]:
    return message[0], bytes(message[1])


async def receive(stream: MessageStream) -> tuple[int, bytes]:
    message = await stream.receive()
    assert message is not None
    return plain(message)


async def body_of(stream: MessageStream) -> memoryview:
    message = await stream.receive()
    assert message is not None
    assert isinstance(message[1], memoryview)
    return message[1]


async def authenticated_pair() -> tuple[AuthenticatedStream, AuthenticatedStream]:
    left, right = trio.testing.memory_stream_pair()
    made: list[AuthenticatedStream] = []

    async def accept() -> None:
        made.append(await accept_stream(right, Keyring([KEY]), deadline_s=HANG_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        made.insert(0, await connect_stream(left, KEY, deadline_s=HANG_S))
    client, server = made
    return client, server


messages = st.lists(st.tuples(st.integers(1, 255), st.binary(max_size=200)), max_size=6)


@given(sent=messages, cuts=st.lists(st.integers(0, 1500), max_size=12))
def test_messages_come_out_however_the_bytes_are_split(
    sent: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(encode(kind, body) for kind, body in sent)
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = MessageParser(LIMITS)
    found = []
    for start, end in itertools.pairwise(marks):
        found += take(parser, stream[start:end])
    assert found == sent
    parser.receive_eof()
    assert parser.buffered_bytes == 0


@pytest.mark.parametrize(
    ("kind", "limit"), [(1, CONTROL_BYTES_MAX), (255, CONTROL_BYTES_MAX), (DATA, DATA_MAX), (0, 0)]
)
def test_each_kind_has_its_bound_and_a_message_above_it_is_refused_by_its_head(
    kind: int, limit: int
) -> None:
    assert take(MessageParser(LIMITS), encode(kind, bytes(limit))) == [(kind, bytes(limit))]
    parser = MessageParser(LIMITS)
    parser.receive_data((limit + 1).to_bytes(4) + bytes([kind]) + b"body")
    with pytest.raises(WireError, match=f"kind {kind} and {limit + 1} bytes") as caught:
        parser.next_message()
    assert parser.buffered_bytes <= 5
    for again in (parser.next_message, parser.receive_eof):
        with pytest.raises(WireError) as second:
            again()
        assert second.value is caught.value


def test_a_great_length_alone_makes_nothing_grow() -> None:
    parser = MessageParser(LIMITS)
    assert take(parser, DATA_MAX.to_bytes(4) + bytes([DATA])) == []
    assert parser.buffered_bytes == 5


@pytest.mark.parametrize("cut", range(1, 9))
def test_an_end_inside_a_message_is_an_error(cut: int) -> None:
    parser = MessageParser(LIMITS)
    assert take(parser, encode(1, b"body")[:cut]) == []
    with pytest.raises(WireError, match="inside a message"):
        parser.receive_eof()


def test_feeding_before_taking_the_messages_is_a_bug_of_the_caller() -> None:
    parser = MessageParser(LIMITS)
    parser.receive_data(b"\0")
    with pytest.raises(RuntimeError):
        parser.receive_data(b"\0")


@pytest.mark.parametrize("table", [{256: 1}, {-1: 1}, {1: -1}, {1: 1 << 32}])
def test_a_bound_that_the_format_cannot_express_is_refused(table: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot have a limit"):
        MessageLimits(table)


@given(pieces=st.lists(st.binary(max_size=300), max_size=8))
def test_random_bytes_give_wire_errors_only_and_keep_nothing_beyond_the_bound(
    pieces: list[bytes],
) -> None:
    parser = MessageParser(MessageLimits(control_bytes_max=64))
    try:
        for piece in pieces:
            take(parser, piece)
            assert parser.buffered_bytes <= 5 + 64
        parser.receive_eof()
    except WireError:
        assert parser.buffered_bytes <= 5 + 64


class Recorder(trio.abc.Stream):
    """Records what is sent, call by call."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


async def test_a_message_goes_to_a_plain_stream_in_one_piece() -> None:
    """One record of TLS after another, and no small one before each large one."""
    large = bytearray(b"x" * (1 << 18))
    recorder = Recorder()
    await MessageStream(recorder, LIMITS).send(DATA, b"ab", b"cd", large, large, b"", b"tail")
    assert recorder.sent == [encode(DATA, b"abcd" + large + large + b"tail")]


async def test_bodies_that_fill_a_frame_are_not_copied_and_their_memory_is_used_again() -> None:
    left, right = await authenticated_pair()
    sender, receiver = MessageStream(left, LIMITS), MessageStream(right, LIMITS)
    memory: list[object] = []
    async with trio.open_nursery() as nursery:
        for content in (b"a", b"b", b"c"):
            nursery.start_soon(sender.send, DATA, content * DATA_MAX)
            body = await body_of(receiver)
            assert body == content * DATA_MAX
            memory.append(body.obj)
            if content == b"a":
                receiver.recycle(body)
    assert memory[1] is memory[0]
    assert memory[2] is not memory[1]


async def test_several_messages_in_one_frame_share_no_memory() -> None:
    """A sender may put them together; who takes the second must not find the first overwritten."""
    left, right = await authenticated_pair()
    receiver = MessageStream(right, LIMITS)
    one, two = b"1" * 20_000, b"2" * 20_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, encode(DATA, one) + encode(DATA, two))
        first = await body_of(receiver)
        second = await body_of(receiver)
    assert first == one
    assert second == two
    assert first.obj is not second.obj


async def test_a_message_above_its_bound_is_not_sent_at_all() -> None:
    recorder = Recorder()
    stream = MessageStream(recorder, LIMITS)
    with pytest.raises(ValueError, match="kind 1"):
        await stream.send(1, bytes(CONTROL_BYTES_MAX), b"x")
    assert recorder.sent == []
    await stream.send(1, b"x")
    assert recorder.sent == [encode(1, b"x")]


async def test_messages_arrive_in_order_and_a_clean_end_is_none_for_ever() -> None:
    left, right = trio.testing.memory_stream_pair()
    sender, receiver = MessageStream(left, LIMITS), MessageStream(right, LIMITS)
    assert sender.stream is left
    async with sender:
        await sender.send(1, b"control")
        await sender.send(DATA, memoryview(bytes(DATA_MAX)))
        await sender.send(0)
    assert await receive(receiver) == (1, b"control")
    assert await receive(receiver) == (DATA, bytes(DATA_MAX))
    assert await receive(receiver) == (0, b"")
    assert await receiver.receive() is None
    assert await receiver.receive() is None


async def test_an_end_inside_a_message_is_no_clean_end() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(encode(1, b"body")[:-1])
    await left.aclose()
    with pytest.raises(WireError, match="inside a message"):
        await MessageStream(right, LIMITS).receive()


async def test_tasks_that_send_at_once_do_not_mix_their_messages() -> None:
    left, right = trio.testing.lockstep_stream_pair()
    sender, receiver = MessageStream(left, LIMITS), MessageStream(right, LIMITS)
    bodies = [bytes([i]) * 40_000 for i in range(4)]
    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(sender.send, DATA, body[:20_000], body[20_000:])
        got = [await receive(receiver) for _ in bodies]
    assert sorted(got) == [(DATA, body) for body in bodies]


async def test_a_send_cancelled_half_way_breaks_the_stream_but_one_that_waited_does_not() -> None:
    left, right = trio.testing.lockstep_stream_pair()
    sender = MessageStream(left, LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, 1, b"first")
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await sender.send(1, b"never sent")
        assert scope.cancelled_caught
        assert await right.receive_some() == encode(1, b"first")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, 1, b"half")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with pytest.raises(trio.BrokenResourceError, match="in part"):
        await sender.send(1, b"more")


async def test_a_cancelled_receive_loses_nothing() -> None:
    left, right = trio.testing.memory_stream_pair()
    receiver = MessageStream(right, LIMITS)
    whole = encode(1, b"body")
    for end in range(1, len(whole)):
        await left.send_all(whole[end - 1 : end])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receiver.receive)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
    await left.send_all(whole[-1:])
    assert await receive(receiver) == (1, b"body")
