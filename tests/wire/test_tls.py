# SPDX-License-Identifier: AGPL-3.0-or-later
"""TLS over any stream: trio's own conformance test, what each failure is called on each side, endings, deadlines."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from replicator.errors import AuthenticationError, WireError
from replicator.wire import PeerSilentError, TamperedError, stream
from replicator.wire import tls as module
from replicator.wire.frames import BUFFER_BYTES
from replicator.wire.tls import ALPN, SEND_BYTES, TlsStream, secure_stream
from replicator.wire.tls_errors import explain
from tests.limits import HANG_S
from tests.wire.tls_lab import HOST, authorities, authority, context, issue

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
Pair = tuple[TlsStream, TlsStream]


async def outcome(
    transport: trio.abc.Stream,
    side: ssl.SSLContext,
    name: str | None,
    *,
    idle_timeout_s: float = 60,
    deadline_s: float = HANG_S,
) -> Any:
    """The stream, or the error of one side."""
    try:
        return await secure_stream(
            transport, side, server_name=name, deadline_s=deadline_s, idle_timeout_s=idle_timeout_s
        )
    except (WireError, trio.BrokenResourceError) as error:
        return error


def source_side() -> ssl.SSLContext:
    return context(issue("source.example"), server_side=False)


def receiver_side() -> ssl.SSLContext:
    return context(issue(HOST, "dr.example"), server_side=True)


async def both(
    left: trio.abc.Stream,
    right: trio.abc.Stream,
    *,
    source: ssl.SSLContext | None = None,
    receiver: ssl.SSLContext | None = None,
    name: str = HOST,
    idle_timeout_s: float = 60,
) -> tuple[Any, Any]:
    """What the source gets, and what the receiver."""
    got: list[Any] = []

    async def connect() -> None:
        side = source or source_side()
        got.append(await outcome(left, side, name, idle_timeout_s=idle_timeout_s))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        accepted = await outcome(
            right, receiver or receiver_side(), None, idle_timeout_s=idle_timeout_s
        )
    return got[0], accepted


async def memory_maker() -> Pair:
    return await both(*trio.testing.memory_stream_pair())


async def lockstep_maker() -> Pair:
    return await both(*trio.testing.lockstep_stream_pair())


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    listeners = await trio.open_tcp_listeners(0, host=HOST)
    async with listeners[0] as listener:
        left = await trio.open_tcp_stream(HOST, listener.socket.getsockname()[1])
        return left, await listener.accept()


async def tcp_maker() -> Pair:
    return await both(*await tcp_pair())


def outgoing(stream: TlsStream) -> trio.testing.MemorySendStream:
    transport = stream.transport
    assert isinstance(transport, trio.StapledStream)
    assert isinstance(transport.send_stream, trio.testing.MemorySendStream)
    return transport.send_stream


def incoming(stream: TlsStream) -> trio.testing.MemoryReceiveStream:
    transport = stream.transport
    assert isinstance(transport, trio.StapledStream)
    assert isinstance(transport.receive_stream, trio.testing.MemoryReceiveStream)
    return transport.receive_stream


@pytest.mark.parametrize(
    ("maker", "clogged_maker"),
    [(memory_maker, lockstep_maker), (lockstep_maker, lockstep_maker), (tcp_maker, None)],
    ids=["memory", "lockstep", "tcp"],
)
async def test_trios_own_conformance_test_passes_unchanged(
    maker: Callable[[], Awaitable[Pair]],
    clogged_maker: Callable[[], Awaitable[Pair]] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The test closes clogged streams, whose close nobody takes: real time passes.
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.01)
    await trio.testing.check_two_way_stream(maker, clogged_maker)


# --- what a session is -------------------------------------------------------------------------


async def test_the_session_is_tls_1_3_and_each_side_knows_the_names_of_the_other() -> None:
    certificate = issue("source.example", "b.example", "10.1.2.3", common_name="Site A")
    source, receiver = await both(
        *trio.testing.memory_stream_pair(), source=context(certificate, server_side=False)
    )
    # Not the address: no name maps to VMs by where it is.
    assert receiver.peer_names == ("source.example", "b.example", "Site A")
    assert source.peer_names == ("dr.example",)
    assert source.protocol == receiver.protocol == ALPN
    assert source._tls.version() == "TLSv1.3"


@pytest.mark.parametrize("maker", [memory_maker, tcp_maker])
async def test_large_sends_arrive_whole_both_ways_at_once(
    maker: Callable[[], Awaitable[Pair]],
) -> None:
    sent = hashlib.shake_256(b"large").digest(5 * SEND_BYTES + 7)
    source, receiver = await maker()

    async def read(stream: TlsStream) -> None:
        got = bytearray()
        while len(got) < len(sent):
            piece = await stream.receive_some()
            assert len(piece) <= BUFFER_BYTES
            got += piece
        assert bytes(got) == sent

    async with source, receiver, trio.open_nursery() as nursery:
        for stream in (source, receiver):
            nursery.start_soon(stream.send_all, sent)
            nursery.start_soon(read, stream)


async def test_pieces_travel_in_order_and_small_neighbours_share_a_record() -> None:
    source, receiver = await memory_maker()
    pieces = [b"head", b"", b"tail", bytes(40_000), b"x" * 16_384, b"yz", b"end"]
    await source.send_pieces(*pieces)
    whole = b"".join(pieces)
    got = b""
    while len(got) < len(whole):
        got += bytes(await receiver.receive_payload())
    assert got == whole
    outgoing(source).send_all_hook = None
    await source.send_pieces(b"a", b"b")
    assert len(outgoing(source).get_data_nowait()) == 5 + 2 + 1 + 16  # one record


async def test_payloads_are_read_into_memory_that_is_used_again() -> None:
    source, receiver = await memory_maker()
    await source.send_all(b"first")
    first = await receiver.receive_payload()
    memory = first.obj
    assert bytes(first) == b"first"
    receiver.buffers.give(first)
    await source.send_all(b"second")
    second = await receiver.receive_payload()
    assert bytes(second) == b"second"
    assert second.obj is memory


async def test_a_change_of_keys_that_the_other_side_asks_for_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's ssl cannot ask for one: what TLS would have to say to it stands in for the answer."""
    source, receiver = await memory_maker()
    opened = receiver._open

    def with_answer(room: memoryview) -> int:
        count = opened(room)
        if count:
            receiver._tls.write(b"answer")
        return count

    monkeypatch.setattr(receiver, "_open", with_answer)
    await source.send_all(b"x")
    assert await receiver.receive_some() == b"x"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.receive_some)
        assert await source.receive_some() == b"answer"
        nursery.cancel_scope.cancel()
    await receiver.send_all(b"more")
    assert await source.receive_some() == b"more"


# --- endings -----------------------------------------------------------------------------------


async def test_an_end_is_told_from_a_cut_at_any_byte() -> None:
    source, receiver = await memory_maker()
    send_stream = outgoing(source)
    kept = bytearray()

    async def keep() -> None:
        await trio.lowlevel.checkpoint()
        kept.extend(send_stream.get_data_nowait())

    send_stream.send_all_hook, send_stream.close_hook = keep, None
    await source.send_all(b"hello")
    record = len(kept)
    await source.aclose()
    assert record == 5 + len(b"hello") + 1 + 16
    got: list[bytes] = []

    async def read() -> None:
        while not got or got[-1]:
            got.append(await receiver.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for at in range(len(kept)):
            assert got == ([b"hello"] if at >= record else [])
            incoming(receiver).put_data(kept[at : at + 1])
            await trio.testing.wait_all_tasks_blocked()
    assert got == [b"hello", b""]
    assert await receiver.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError, match="has closed"):
        await receiver.send_all(b"late")


@pytest.mark.parametrize("whole", [0, 3, 27, 30])
async def test_a_connection_that_ends_without_a_close_is_a_cut(whole: int) -> None:
    source, receiver = await memory_maker()
    send_stream = outgoing(source)
    send_stream.send_all_hook = None
    await source.send_all(b"hello")
    data = bytes(send_stream.get_data_nowait())
    assert len(data) == 27
    incoming(receiver).put_data((data * 2)[:whole])
    incoming(receiver).put_eof()
    if whole >= len(data):
        assert await receiver.receive_some() == b"hello"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="cut") as caught:
            await receiver.receive_some()
        assert not isinstance(caught.value, WireError)
    with pytest.raises(trio.BrokenResourceError):
        await receiver.send_all(b"x")


async def test_what_came_before_a_damaged_record_is_handed_up_first() -> None:
    source, receiver = await memory_maker()
    send_stream = outgoing(source)
    send_stream.send_all_hook = None
    await source.send_all(b"good")
    await source.send_all(b"damaged")
    data = bytearray(send_stream.get_data_nowait())
    data[-1] ^= 1
    incoming(receiver).put_data(data)
    assert await receiver.receive_some() == b"good"
    for _ in range(2):
        with pytest.raises(TamperedError, match="bad record mac"):
            await receiver.receive_some()
    await receiver.aclose()


@pytest.mark.parametrize("way", ["send", "close"])
async def test_a_stream_that_was_broken_off_says_no_end(way: str) -> None:
    """A send that was cancelled in the middle: nothing may follow, and the other side must see a cut."""
    source, receiver = await memory_maker()

    async def stuck() -> None:
        await trio.sleep_forever()

    outgoing(source).send_all_hook = stuck
    with trio.move_on_after(0.01):
        await source.send_all(b"never out")
    with pytest.raises(trio.BrokenResourceError, match="broken off"):
        await source.send_all(b"x")
    if way == "close":
        outgoing(source).send_all_hook = outgoing(source).close_hook = None
        await source.aclose()
        incoming(receiver).put_eof()
        with pytest.raises(trio.BrokenResourceError, match="cut"):
            await receiver.receive_some()


async def test_the_end_has_no_payload_and_a_closed_stream_takes_no_bytes() -> None:
    source, receiver = await memory_maker()
    await source.aclose()
    assert bytes(await receiver.receive_payload()) == b""
    await receiver.aclose()
    for act in (receiver.receive_payload, partial(receiver.send_pieces, b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await act()


async def test_a_receive_that_gets_bytes_while_a_close_is_under_way_says_closed() -> None:
    source, receiver = await memory_maker()

    async def stuck() -> None:
        await trio.sleep_forever()

    outgoing(receiver).send_all_hook = stuck
    async with trio.open_nursery() as nursery:

        async def receiving() -> None:
            with pytest.raises(trio.ClosedResourceError, match="another task"):
                await receiver.receive_some()
            nursery.cancel_scope.cancel()

        nursery.start_soon(receiving)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(receiver.aclose)
        await trio.testing.wait_all_tasks_blocked()
        await source.send_all(b"late")


async def test_tls_that_takes_no_more_is_a_broken_stream() -> None:
    source, _ = await memory_maker()
    source._close_record()  # as if it had ended under way
    for text in ("protocol is shutdown", "broken off"):
        with pytest.raises(trio.BrokenResourceError, match=text):
            await source.send_all(b"x")


async def test_a_close_that_nobody_takes_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, _ = await memory_maker()

    async def stuck() -> None:
        await trio.sleep_forever()

    outgoing(source).send_all_hook = stuck
    began = autojump_clock.current_time()
    await source.aclose()
    assert autojump_clock.current_time() - began == pytest.approx(stream.CLOSE_TIMEOUT_S)


async def test_a_peer_that_is_gone_does_not_disturb_the_close() -> None:
    source, receiver = await tcp_maker()
    await trio.aclose_forcefully(receiver)
    await source.aclose()


# --- silence -----------------------------------------------------------------------------------


async def test_silence_breaks_the_stream_in_either_direction(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, receiver = await both(*trio.testing.memory_stream_pair(), idle_timeout_s=8)
    began = autojump_clock.current_time()
    for _ in range(2):
        with pytest.raises(PeerSilentError, match="nothing, or too little"):
            await receiver.receive_some()
    assert autojump_clock.current_time() - began == pytest.approx(8)

    async def stuck() -> None:
        await trio.sleep_forever()

    outgoing(source).send_all_hook = stuck
    began = autojump_clock.current_time()
    with pytest.raises(PeerSilentError, match="took no data"):
        await source.send_all(b"x")
    assert autojump_clock.current_time() - began == pytest.approx(80)

    outgoing(receiver).wait_send_all_might_not_block_hook = stuck
    receiver._receive_error = None
    began = autojump_clock.current_time()
    with pytest.raises(PeerSilentError, match="took no data"):
        await receiver.wait_send_all_might_not_block()
    assert autojump_clock.current_time() - began == pytest.approx(80)


async def test_a_record_that_trickles_is_not_waited_for_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source, receiver = await both(*trio.testing.memory_stream_pair(), idle_timeout_s=8)
    send_stream = outgoing(source)
    send_stream.send_all_hook = None
    await source.send_all(bytes(1000))
    data = send_stream.get_data_nowait()
    began = autojump_clock.current_time()

    async def trickle() -> None:
        for byte in data:
            await trio.sleep(7)
            incoming(receiver).put_data(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(PeerSilentError):
            await receiver.receive_some()
        nursery.cancel_scope.cancel()
    assert autojump_clock.current_time() - began == pytest.approx(80)


async def test_a_cancelled_receive_loses_nothing() -> None:
    source, receiver = await memory_maker()
    with trio.move_on_after(0.01):
        await receiver.receive_some()
    await source.send_all(b"still there")
    assert await receiver.receive_some(5) == b"still"
    assert await receiver.receive_some() == b" there"


async def test_a_handshake_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    left, right = trio.testing.memory_stream_pair()
    began = autojump_clock.current_time()
    error = await outcome(right, receiver_side(), None, deadline_s=15)
    assert isinstance(error, PeerSilentError)
    assert autojump_clock.current_time() - began == pytest.approx(15)
    with pytest.raises(trio.BrokenResourceError):
        await left.send_all(b"it is closed")


async def test_a_connection_that_ends_in_the_handshake_is_broken() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.aclose()
    error = await outcome(right, receiver_side(), None)
    assert isinstance(error, trio.BrokenResourceError)
    assert not isinstance(error, WireError)


# --- what is refused ---------------------------------------------------------------------------


def old(side: ssl.SSLContext) -> ssl.SSLContext:
    side.minimum_version = ssl.TLSVersion.TLSv1_2
    side.maximum_version = ssl.TLSVersion.TLSv1_2
    return side


def without_certificate() -> ssl.SSLContext:
    side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    side.load_verify_locations(cadata=authorities())
    side.set_alpn_protocols([ALPN])
    return side


def other_protocol(side: ssl.SSLContext) -> ssl.SSLContext:
    side.set_alpn_protocols(["http/1.1"])
    return side


def source_with(**options: Any) -> Callable[[], ssl.SSLContext]:
    return lambda: context(issue("source.example", **options), server_side=False)


def receiver_with(**options: Any) -> Callable[[], ssl.SSLContext]:
    return lambda: context(issue(HOST, **options), server_side=True)


EXPIRED: dict[str, Any] = {"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}
EARLY: dict[str, Any] = {"not_before": NOW + DAY, "not_after": NOW + 9 * DAY}

#: Sides, the error at the source, the error at the receiver: its kind, and a part of its text.
REFUSED: dict[str, tuple[Any, Any, str, tuple[Any, str], tuple[Any, str]]] = {
    "source expired": (
        source_with(**EXPIRED),
        receiver_side,
        HOST,
        (AuthenticationError, "the receiver refused the certificate of this side (dr_auth_cert): it, or the authority"),
        (AuthenticationError, "TLS verification failed: the source's certificate, or the authority that issued it, has expired"),
    ),
    "source not yet valid": (
        source_with(**EARLY),
        receiver_side,
        HOST,
        (AuthenticationError, "the receiver refused the certificate of this side (dr_auth_cert): it is not valid yet"),
        (AuthenticationError, "the source's certificate, or the authority that issued it, is not valid yet: compare the clocks"),
    ),
    "source of another authority": (
        source_with(ca="theirs"),
        receiver_side,
        HOST,
        (AuthenticationError, "dr_ca_cert on that side does not hold the authority that issued it"),
        (AuthenticationError, "the source's certificate was issued by an authority that dr_ca_cert on this side does not hold"),
    ),
    "source without a certificate": (
        without_certificate,
        receiver_side,
        HOST,
        (AuthenticationError, "the receiver refused the certificate of this side (dr_auth_cert): none was shown"),
        (AuthenticationError, "TLS verification failed: the source showed no certificate (dr_auth_cert)"),
    ),
    "receiver expired": (
        source_side,
        receiver_with(**EXPIRED),
        HOST,
        (AuthenticationError, "the receiver's certificate, or the authority that issued it, has expired: renew it"),
        (AuthenticationError, "the source refused the certificate of this side (dr_auth_cert): it, or the authority that"),
    ),
    "receiver not yet valid": (
        source_side,
        receiver_with(**EARLY),
        HOST,
        (AuthenticationError, "the receiver's certificate, or the authority that issued it, is not valid yet"),
        (AuthenticationError, "the source refused the certificate of this side (dr_auth_cert): it is not valid yet"),
    ),
    "receiver of another authority": (
        source_side,
        receiver_with(ca="theirs"),
        HOST,
        (AuthenticationError, "the receiver's certificate was issued by an authority that dr_ca_cert on this side does not hold"),
        (AuthenticationError, "dr_ca_cert on that side does not hold the authority that issued it"),
    ),
    "receiver of another address": (
        source_side,
        receiver_side,
        "127.0.0.2",
        (AuthenticationError, "does not name dr_host: IP address mismatch, certificate is not valid for '127.0.0.2'; it names 127"),
        (AuthenticationError, "the source refused the certificate of this side (dr_auth_cert)"),
    ),
    "receiver of another name": (
        source_side,
        receiver_side,
        "other.example",
        (AuthenticationError, "does not name dr_host: Hostname mismatch, certificate is not valid for 'other.example'; it names 1"),
        (AuthenticationError, "does not name this host as dr_host does there"),
    ),
    "receiver named by its common name only": (
        source_side,
        receiver_with(common_name="dr2.example"),
        "dr2.example",
        (AuthenticationError, "does not name dr_host"),
        (AuthenticationError, "refused the certificate of this side"),
    ),
    "source of old TLS": (
        lambda: old(source_side()),
        receiver_side,
        HOST,
        (WireError, "the receiver does not speak TLS 1.3"),
        (WireError, "the source does not speak TLS 1.3"),
    ),
    "receiver of old TLS": (
        source_side,
        lambda: old(receiver_side()),
        HOST,
        (WireError, "the receiver does not speak TLS 1.3"),
        (WireError, "the source does not speak TLS 1.3"),
    ),
    "source of another protocol": (
        lambda: other_protocol(source_side()),
        receiver_side,
        HOST,
        (WireError, "the receiver speaks TLS, but not this protocol (replctl/1)"),
        (WireError, "the source speaks TLS, but not this protocol (replctl/1)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("pair", [trio.testing.memory_stream_pair, None], ids=["memory", "tcp"])
async def test_each_side_says_why_there_is_no_session(case: str, pair: Any) -> None:
    make_source, make_receiver, name, at_source, at_receiver = REFUSED[case]
    left, right = await tcp_pair() if pair is None else pair()
    with trio.fail_after(HANG_S):
        errors = await both(left, right, source=make_source(), receiver=make_receiver(), name=name)
    for error, (kind, text) in zip(errors, (at_source, at_receiver), strict=True):
        assert type(error) is kind, error
        assert text in str(error)
    for transport in (left, right):
        with pytest.raises(trio.ClosedResourceError):
            await transport.send_all(b"x")


@pytest.mark.parametrize(
    "greeting", [b"RPLW\x04\x00\x00\x01\x04", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"]
)
async def test_a_receiver_that_speaks_something_else_is_named(greeting: bytes) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.send_all(greeting)
    error = await outcome(left, source_side(), HOST)
    assert type(error) is WireError
    assert "the receiver does not speak TLS: it takes a pre-shared key (dr_auth_token)" in str(
        error
    )


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x02hi", b"\0" * 600]
)
async def test_a_source_that_speaks_something_else_is_refused(greeting: bytes) -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(greeting)
    await left.send_eof()
    error = await outcome(right, receiver_side(), None)
    assert isinstance(error, WireError | trio.BrokenResourceError)
    assert not isinstance(error, AuthenticationError)


@pytest.mark.parametrize("said", [b"\x02", b""])
async def test_a_receiver_that_does_not_take_the_certificate_in_words_is_not_believed(
    said: bytes,
) -> None:
    left, right = trio.testing.memory_stream_pair()
    receiver = TlsStream(right, receiver_side(), server_name=None)

    async def serve() -> None:
        await receiver.shake_hands()
        if said:
            await receiver.send_all(said)
        else:
            await receiver.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        error = await outcome(left, source_side(), HOST)
    assert type(error) is WireError
    assert "did not say that it takes the certificate" in str(error)


def test_a_failure_that_has_no_words_of_ours_is_told_in_those_of_tls() -> None:
    error = ssl.SSLError(1, "no")
    error.reason = "TLSV1_ALERT_INTERNAL_ERROR"
    told = explain(error, "the source")
    assert type(told) is WireError
    assert str(told) == "TLS handshake with the source failed: tlsv1 alert internal error"
    # Codes of later versions of OpenSSL.
    verify = ssl.SSLCertVerificationError(1, "no")
    verify.verify_code, verify.verify_message = 99, "something new"
    told = explain(verify, "the source")
    assert str(told) == "TLS verification failed: the source's certificate: something new"


async def test_an_intermediate_authority_alone_can_be_trusted() -> None:
    child = authority("root").create_child_ca()
    ours = child.issue_cert(HOST)
    trusted = child.cert_pem.bytes().decode("ascii")
    source = context(ours, server_side=False, trusted=trusted)
    receiver = context(ours, server_side=True, trusted=trusted)
    streams = await both(*trio.testing.memory_stream_pair(), source=source, receiver=receiver)
    assert all(isinstance(stream, TlsStream) for stream in streams)


async def test_a_send_while_another_task_sends_is_the_callers_defect() -> None:
    source, _ = await lockstep_maker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(source.send_all, bytes(10)))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await source.send_pieces(b"x")
        nursery.cancel_scope.cancel()
