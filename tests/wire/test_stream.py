# SPDX-License-Identifier: AGPL-3.0-or-later
"""The authenticated stream: trio's own conformance test, deadlines, endings, tampering."""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing

from replicator.errors import AuthenticationError, WireError
from replicator.wire import (
    AuthenticatedStream,
    Keyring,
    PeerSilentError,
    PreSharedKey,
    TamperedError,
    accept_stream,
    connect_stream,
)
from replicator.wire import stream as stream_module
from replicator.wire.frames import HEAD_BYTES, PAYLOAD_BYTES_MAX, SEAL_BYTES
from replicator.wire.handshake import ClientHandshake

KEY = PreSharedKey.from_hex(hashlib.sha256(b"key").hexdigest(), name="to site B", vm="web")
OTHER = PreSharedKey.from_hex(hashlib.sha256(b"other key").hexdigest())


async def authenticate(
    left: trio.abc.Stream, right: trio.abc.Stream, *, idle_timeout_s: float = 60.0
) -> tuple[AuthenticatedStream, AuthenticatedStream]:
    """The two ends after a handshake."""
    ends: list[AuthenticatedStream] = []

    async def connect() -> None:
        ends.append(await connect_stream(left, KEY, deadline_s=10, idle_timeout_s=idle_timeout_s))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        accepted = await accept_stream(
            right, Keyring([OTHER, KEY]), deadline_s=10, idle_timeout_s=idle_timeout_s
        )
    return ends[0], accepted


async def memory_pair(
    *, idle_timeout_s: float = 60.0
) -> tuple[AuthenticatedStream, AuthenticatedStream]:
    return await authenticate(*trio.testing.memory_stream_pair(), idle_timeout_s=idle_timeout_s)


def outgoing(stream: AuthenticatedStream) -> trio.testing.MemorySendStream:
    transport = stream.transport
    assert isinstance(transport, trio.StapledStream)
    assert isinstance(transport.send_stream, trio.testing.MemorySendStream)
    return transport.send_stream


def incoming(stream: AuthenticatedStream) -> trio.testing.MemoryReceiveStream:
    transport = stream.transport
    assert isinstance(transport, trio.StapledStream)
    assert isinstance(transport.receive_stream, trio.testing.MemoryReceiveStream)
    return transport.receive_stream


async def record(stream: AuthenticatedStream, act: Callable[[], Awaitable[object]]) -> bytes:
    """The bytes that an act puts on the wire, kept from the other side."""
    sent = bytearray()
    send_stream = outgoing(stream)
    hooks = send_stream.send_all_hook, send_stream.close_hook

    async def keep() -> None:
        await trio.lowlevel.checkpoint()
        sent.extend(send_stream.get_data_nowait())

    send_stream.send_all_hook, send_stream.close_hook = keep, None
    await act()
    send_stream.send_all_hook, send_stream.close_hook = hooks
    return bytes(sent)


def no_secret_in(error: BaseException) -> None:
    text = "".join(traceback.format_exception(error)) + repr(error)
    for key in (KEY, OTHER):
        assert key.secret.hex() not in text
        assert repr(key.secret)[2:-1] not in text


# --- conformance -------------------------------------------------------------------------------


async def memory_maker() -> tuple[AuthenticatedStream, AuthenticatedStream]:
    return await memory_pair()


async def lockstep_maker() -> tuple[AuthenticatedStream, AuthenticatedStream]:
    return await authenticate(*trio.testing.lockstep_stream_pair())


async def tcp_maker() -> tuple[AuthenticatedStream, AuthenticatedStream]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listeners[0] as listener:
        port = listener.socket.getsockname()[1]
        left = await trio.open_tcp_stream("127.0.0.1", port)
        right = await listener.accept()
    return await authenticate(left, right)


@pytest.mark.parametrize(
    ("maker", "clogged_maker"),
    [(memory_maker, lockstep_maker), (lockstep_maker, lockstep_maker), (tcp_maker, None)],
    ids=["memory", "lockstep", "tcp"],
)
async def test_trios_own_conformance_test_passes_unchanged(
    maker: Callable[[], Awaitable[tuple[AuthenticatedStream, AuthenticatedStream]]],
    clogged_maker: Callable[[], Awaitable[tuple[AuthenticatedStream, AuthenticatedStream]]] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The test closes clogged streams, whose close frame nobody takes: real time passes.
    monkeypatch.setattr(stream_module, "CLOSE_TIMEOUT_S", 0.01)
    await trio.testing.check_two_way_stream(maker, clogged_maker)


# --- what a session is -------------------------------------------------------------------------


async def test_each_side_knows_the_key_and_the_session() -> None:
    left, right = await memory_pair()
    assert left.peer_key is right.peer_key is KEY
    assert left.session_id == right.session_id
    again, _ = await memory_pair()
    assert again.session_id != left.session_id


async def test_a_large_send_is_cut_into_frames_and_arrives_whole() -> None:
    left, right = await tcp_maker()
    sent = hashlib.shake_256(b"large").digest(2 * PAYLOAD_BYTES_MAX + 5)
    got = bytearray()
    sizes = []
    async with left, right, trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, sent)
        while len(got) < len(sent):
            piece = await right.receive_some()
            sizes.append(len(piece))
            got += piece
    assert got == sent
    assert sizes == [PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX, 5]


async def test_a_send_of_other_items_than_bytes_counts_bytes() -> None:
    left, right = await memory_pair()
    await left.send_all(memoryview(b"\1\0\2\0").cast("H"))
    assert await right.receive_some() == b"\1\0\2\0"


async def test_frames_in_the_same_segment_as_the_proof_are_not_lost() -> None:
    left, right = trio.testing.memory_stream_pair()
    client = ClientHandshake(KEY)
    await left.send_all(client.start())
    async with trio.open_nursery() as nursery:
        accepted: list[AuthenticatedStream] = []

        async def accept() -> None:
            accepted.append(await accept_stream(right, Keyring([KEY]), deadline_s=1))

        nursery.start_soon(accept)
        proof = client.receive_data(await left.receive_some())
        assert client.session is not None
        early = AuthenticatedStream(Sink(), client.session)
        await early.send_all(b"early")
        sink = early.transport
        assert isinstance(sink, Sink)
        await left.send_all(proof + sink.taken)
    assert await accepted[0].receive_some() == b"early"


class Sink(trio.abc.Stream):
    """Takes everything, gives nothing."""

    def __init__(self) -> None:
        self.taken = bytearray()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.taken += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError(max_bytes)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


# --- endings -----------------------------------------------------------------------------------


async def test_a_close_is_a_clean_end_for_ever_and_nothing_can_be_sent_after_it() -> None:
    left, right = await memory_pair()
    await left.send_all(b"last")
    await left.aclose()
    await left.aclose()
    assert await right.receive_some() == b"last"
    assert await right.receive_some() == b""
    assert await right.receive_some(5) == b""
    with pytest.raises(trio.BrokenResourceError):
        await right.send_all(b"to nobody")
    await right.aclose()


async def read_to_the_end(stream: AuthenticatedStream) -> bytes:
    got = bytearray()
    while piece := await stream.receive_some():
        got += piece
    return bytes(got)


async def test_a_session_cut_at_any_byte_is_a_broken_connection() -> None:
    frame = HEAD_BYTES + SEAL_BYTES
    whole = 2 * frame + len(b"hello")
    for cut in range(whole):
        left, right = await memory_pair()
        sent = await record(left, partial(left.send_all, b"hello"))
        sent += await record(left, left.aclose)
        assert len(sent) == whole
        incoming(right).put_data(sent[:cut])
        incoming(right).put_eof()
        if cut >= frame + len(b"hello"):
            assert await right.receive_some() == b"hello"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="no authenticated close"):
                await right.receive_some()


async def test_a_cancelled_send_breaks_the_stream_and_its_end_is_seen_as_a_cut() -> None:
    left, right = await lockstep_maker()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send_all, b"cancelled")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with pytest.raises(trio.BrokenResourceError, match="broken off"):
        await left.send_all(b"more")
    with pytest.raises(trio.BrokenResourceError, match="broken off"):
        await left.wait_send_all_might_not_block()
    await left.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await read_to_the_end(right)


async def test_a_send_cancelled_before_it_began_does_no_harm() -> None:
    left, right = await memory_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await left.send_all(b"never")
    assert scope.cancelled_caught
    await left.send_all(b"sent")
    assert await right.receive_some() == b"sent"


async def test_a_cancelled_receive_loses_nothing_wherever_it_is_cancelled() -> None:
    left, right = await memory_pair()
    sent = await record(left, partial(left.send_all, b"hello"))
    for byte in sent[:-1]:
        incoming(right).put_data(bytes([byte]))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(right.receive_some)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
    incoming(right).put_data(sent[-1:])
    assert await right.receive_some() == b"hello"


async def test_a_close_by_force_is_a_cut() -> None:
    left, right = await memory_pair()
    await trio.aclose_forcefully(left)
    with pytest.raises(trio.BrokenResourceError):
        await right.receive_some()


async def test_a_close_that_the_other_side_does_not_take_ends_after_its_time_limit(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, right = await lockstep_maker()
    started = trio.current_time()
    await left.aclose()
    assert trio.current_time() - started == pytest.approx(5.0)
    with pytest.raises(trio.ClosedResourceError):
        await left.transport.send_all(b"x")
    await right.aclose()


async def test_a_close_wakes_the_tasks_that_wait() -> None:
    left, _ = await lockstep_maker()

    async def closed(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(closed, partial(left.send_all, bytes(100_000)))
        nursery.start_soon(closed, left.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        await left.aclose()


async def test_a_receive_that_gets_bytes_while_a_close_is_under_way_says_closed() -> None:
    left, right = await lockstep_maker()

    async def closed() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await left.receive_some()

    async def late() -> None:
        with suppress(trio.BrokenResourceError):  # nobody takes the rest of it
            await right.send_all(b"late")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(closed)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(left.aclose)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(late)
        await trio.testing.wait_all_tasks_blocked()
        assert await right.receive_some() == b""


# --- deadlines ---------------------------------------------------------------------------------


async def test_silence_is_bounded_and_is_both_a_wire_error_and_a_broken_connection(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, _right = await memory_pair(idle_timeout_s=30)
    started = trio.current_time()
    with pytest.raises(PeerSilentError) as caught:
        await left.receive_some()
    assert trio.current_time() - started == pytest.approx(30)
    assert isinstance(caught.value, WireError)
    assert isinstance(caught.value, trio.BrokenResourceError)
    with pytest.raises(PeerSilentError):
        await left.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await left.send_all(b"x")


async def test_bytes_reset_the_idle_deadline_but_a_frame_cannot_trickle_for_ever(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, right = await memory_pair(idle_timeout_s=30)
    sent = await record(left, partial(left.send_all, b"hello"))

    async def trickle() -> None:
        for byte in sent:
            await trio.sleep(20)
            incoming(right).put_data(bytes([byte]))

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(PeerSilentError):
            await right.receive_some()
        nursery.cancel_scope.cancel()
    # The frame begins with its first byte, after 20 s.
    assert trio.current_time() - started == pytest.approx(20 + 10 * 30)


async def test_a_reader_that_pauses_in_a_frame_is_not_taken_for_a_silent_peer(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, right = await memory_pair(idle_timeout_s=30)
    sent = await record(left, partial(left.send_all, b"hello"))
    incoming(right).put_data(sent[:10])
    with trio.move_on_after(1):
        await right.receive_some()
    await trio.sleep(10_000)
    incoming(right).put_data(sent[10:])
    assert await right.receive_some() == b"hello"


async def test_without_an_idle_timeout_a_receive_waits_as_long_as_it_takes(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, right = await memory_pair(idle_timeout_s=math.inf)

    async def later() -> None:
        await trio.sleep(80_000)
        await left.send_all(b"late")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert await right.receive_some() == b"late"


async def test_a_peer_that_takes_nothing_is_given_up(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, _ = await authenticate(*trio.testing.lockstep_stream_pair(), idle_timeout_s=3)
    with pytest.raises(PeerSilentError):
        await left.send_all(b"x")
    assert trio.current_time() == pytest.approx(30)
    with pytest.raises(trio.BrokenResourceError, match="broken off"):
        await left.send_all(b"x")


async def test_a_wait_to_send_is_given_up_as_well(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    left, _ = await memory_pair(idle_timeout_s=3)
    outgoing(left).wait_send_all_might_not_block_hook = trio.sleep_forever
    with pytest.raises(PeerSilentError):
        await left.wait_send_all_might_not_block()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_slow_handshake_is_bounded_as_a_whole(
    side: str,
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def drip() -> None:
        for byte in ClientHandshake(KEY).start():
            await trio.sleep(0.9)
            await theirs.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        opening = partial(connect_stream, ours, KEY, deadline_s=10)
        if side == "server":
            opening = partial(accept_stream, ours, Keyring([KEY]), deadline_s=10)
            nursery.start_soon(drip)
        with pytest.raises(PeerSilentError, match="not done in 10 s"):
            await opening()
        assert trio.current_time() == pytest.approx(10)
        nursery.cancel_scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


# --- a handshake that fails --------------------------------------------------------------------


async def test_a_wrong_key_is_told_on_both_sides_and_leaves_both_closed() -> None:
    left, right = trio.testing.memory_stream_pair()
    caught: list[AuthenticationError] = []

    async def attempt(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(AuthenticationError, match="token mismatch") as error:
            await call()
        no_secret_in(error.value)
        caught.append(error.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, partial(connect_stream, left, OTHER, deadline_s=1))
        nursery.start_soon(attempt, partial(accept_stream, right, Keyring([KEY]), deadline_s=1))
    assert len(caught) == 2
    for end in (left, right):
        with pytest.raises(trio.ClosedResourceError):
            await end.send_all(b"x")


async def test_a_connection_closed_in_the_handshake_is_a_broken_connection() -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.send_eof()
    with pytest.raises(trio.BrokenResourceError, match="closed the connection in the handshake"):
        await connect_stream(left, KEY, deadline_s=1)


async def test_a_garbage_sender_that_is_gone_or_reads_nothing_does_not_hold_us(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - time passes at once
) -> None:
    for gone in (False, True):
        left, right = trio.testing.memory_stream_pair()
        await left.send_all(b"GET / HTTP/1.1\r\n\r\n")
        transport = right.send_stream
        transport.send_all_hook = trio.sleep_forever
        if gone:
            transport.send_all_hook = broken
        with pytest.raises(WireError, match="does not speak this protocol"):
            await accept_stream(right, Keyring([KEY]), deadline_s=10)
    assert trio.current_time() == pytest.approx(1)


async def broken() -> None:
    await trio.lowlevel.checkpoint()
    raise trio.BrokenResourceError


async def test_a_cancelled_handshake_closes_the_transport() -> None:
    left, _ = trio.testing.memory_stream_pair()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(connect_stream, left, KEY, deadline_s=10))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await left.send_all(b"x")


# --- tampering ---------------------------------------------------------------------------------


async def refuses(stream: AuthenticatedStream, data: bytes) -> None:
    """The stream refuses the bytes, hands up nothing of them, and is dead afterwards."""
    incoming(stream).put_data(data)
    for _ in range(2):
        with pytest.raises(TamperedError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value, WireError)
        assert isinstance(caught.value, trio.BrokenResourceError)
        assert isinstance(caught.value.__cause__, WireError)
        no_secret_in(caught.value)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    # No authenticated close: this end does not know that all went well.
    assert await record(stream, stream.aclose) == b""


async def test_every_turned_bit_of_a_frame_is_refused() -> None:
    for bit in range((HEAD_BYTES + 2 + SEAL_BYTES) * 8):
        if bit // 8 in range(4) and bit != 31:
            # A greater length is refused at once or waited for; test_frames has every bit.
            continue
        left, right = await memory_pair()
        turned = bytearray(await record(left, partial(left.send_all, b"hi")))
        turned[bit // 8] ^= 1 << bit % 8
        if bit // 8 < 4:
            turned += bytes(1 << 20)
        await refuses(right, bytes(turned))


async def test_a_recorded_session_cannot_be_played_into_another() -> None:
    left, right = await memory_pair()
    recorded = await record(left, partial(left.send_all, b"hello"))
    incoming(right).put_data(recorded)
    assert await right.receive_some() == b"hello"
    _, later = await memory_pair()
    await refuses(later, recorded)


async def test_a_frame_played_again_reflected_or_out_of_order_is_refused() -> None:
    left, right = await memory_pair()
    one = await record(left, partial(left.send_all, b"one"))
    two = await record(left, partial(left.send_all, b"two"))
    await refuses(left, one)
    incoming(right).put_data(one)
    assert await right.receive_some() == b"one"
    await refuses(right, one)
    left, right = await memory_pair()
    await record(left, partial(left.send_all, b"one"))
    two = await record(left, partial(left.send_all, b"two"))
    await refuses(right, two)


async def test_good_frames_before_a_bad_one_are_handed_up() -> None:
    left, right = await memory_pair()
    good = await record(left, partial(left.send_all, b"good"))
    bad = bytearray(await record(left, partial(left.send_all, b"evil")))
    bad[-1] ^= 1
    incoming(right).put_data(good)
    assert await right.receive_some() == b"good"
    await refuses(right, bytes(bad))
