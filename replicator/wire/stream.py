# SPDX-License-Identifier: AGPL-3.0-or-later
"""An authenticated byte stream over any trio stream (docs/wire.md, sections 2 and 3.1).

It drives the handshake and the frames; it decides nothing about what the bytes mean.

Errors. A connection that breaks or is cut raises :class:`trio.BrokenResourceError`, as trio asks of
a stream. Where more is known, the error is a subclass of that **and** of
:class:`~replicator.errors.WireError`: :class:`PeerSilentError` and :class:`TamperedError`. So code
that knows only trio treats them as a broken connection, and ours can tell them apart (catch
``WireError`` first).
"""

from __future__ import annotations

import operator
from types import TracebackType
from typing import Final

import trio

from replicator.errors import WireError
from replicator.wire.buffers import Buffers
from replicator.wire.frames import (
    BUFFER_BYTES,
    NEED_DATA,
    PAYLOAD_BYTES_MAX,
    CutError,
    Data,
    FrameOpener,
    FrameSealer,
)
from replicator.wire.handshake import (
    MESSAGE_BYTES_MAX,
    SUITE_SEALED,
    SUITES,
    ClientHandshake,
    Offer,
    ServerHandshake,
    Session,
)
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.transport import receive_into

IDLE_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 5.0
ALERT_TIMEOUT_S: Final = 1.0
FRAME_TIMEOUT_FACTOR: Final = 10
"""A frame once begun must be whole within this many idle timeouts, however it trickles."""


class PeerSilentError(WireError, trio.BrokenResourceError):
    """The other side, or the network, did not move in time. The session is over."""


class TamperedError(WireError, trio.BrokenResourceError):
    """A frame was not what the other side sent: tampering, or damage that TCP did not see."""


class OneTask:
    """Lets one task in; a second one is a bug of the caller's and gets ``BusyResourceError``."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.busy = False

    def __enter__(self) -> None:
        if self.busy:
            raise trio.BusyResourceError(f"another task is {self._what} this stream")
        self.busy = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.busy = False


class AuthenticatedStream(trio.abc.Stream):
    """Bytes both ways, each one authenticated before it is handed up. Made by
    :func:`connect_stream` and :func:`accept_stream`; owns the transport.

    ``idle_timeout_s`` bounds every wait for the other side: for a byte to come while
    :meth:`receive_some` waits, and, times :data:`FRAME_TIMEOUT_FACTOR`, for a frame to be whole in
    either direction. ``math.inf`` turns it off.

    Frames are sealed and opened in the trio thread (0.05 ms per MiB encrypted, 0.5 ms with HMAC): a hop to another
    thread would cost more than it frees.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        session: Session,
        *,
        trailing_data: bytes = b"",
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self._transport = transport
        self._session = session
        self._idle_timeout_s = idle_timeout_s
        sealed = session.suite == SUITE_SEALED
        self.buffers: Final = Buffers(BUFFER_BYTES)
        self._sealer = FrameSealer(session.send_key, sealed=sealed)
        self._opener = FrameOpener(session.receive_key, sealed=sealed, buffers=self.buffers)
        self._opener.receive_data(trailing_data)
        self._unread = memoryview(b"")
        self._frame_wait_s = 0.0
        self._sending = OneTask("sending on")
        self._receiving = OneTask("receiving from")
        self._closed = False
        self._ended = False
        self._send_broken = False
        self._receive_error: WireError | None = None

    @property
    def peer_key(self) -> PreSharedKey:
        """The key that the other side proved to hold; its ``vm`` is what it may push."""
        return self._session.peer_key

    @property
    def session_id(self) -> bytes:
        """16 bytes, the same on both sides, fresh for each session. Not secret."""
        return self._session.session_id

    @property
    def transport(self) -> trio.abc.Stream:
        """The stream below, for its addresses; not to be read, written or closed."""
        return self._transport

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send the bytes, in frames of at most ``PAYLOAD_BYTES_MAX``.

        Raises :class:`PeerSilentError` when the other side takes nothing for too long, and trio's
        ``BrokenResourceError``, ``ClosedResourceError``, ``BusyResourceError``. When cancelled, or
        after an error, a frame may be out in part: nothing more can be sent then, not even the
        authenticated close, and the other side sees a cut.
        """
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            view = memoryview(data).cast("B")
            for start in range(0, len(view), PAYLOAD_BYTES_MAX):
                self._check_sendable()
                await self._send_payload(view[start : start + PAYLOAD_BYTES_MAX])

    async def send_pieces(self, *pieces: bytes | bytearray | memoryview) -> None:
        """As ``send_all`` with the pieces in order, at most ``PAYLOAD_BYTES_MAX`` in all, in one frame; never joined before
        it is made.
        """
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._send_payload(*pieces)

    async def _send_payload(self, *pieces: bytes | bytearray | memoryview) -> None:
        frame = self._sealer.seal(*pieces)
        self._send_broken = True
        with trio.move_on_after(self._idle_timeout_s * FRAME_TIMEOUT_FACTOR) as scope:
            await self._transport.send_all(frame)
            self._send_broken = False
        if scope.cancelled_caught:
            raise PeerSilentError("the other side took no data in time")

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._ended:
            raise trio.BrokenResourceError("the other side has closed the stream")
        if self._receive_error is not None:
            raise trio.BrokenResourceError("the stream is broken") from self._receive_error
        if self._send_broken:
            raise trio.BrokenResourceError("an earlier send was broken off inside a frame")

    async def wait_send_all_might_not_block(self) -> None:
        """See trio. Raises what :meth:`send_all` does; a cancellation breaks nothing."""
        with self._sending:
            self._check_sendable()
            with trio.move_on_after(self._idle_timeout_s * FRAME_TIMEOUT_FACTOR) as scope:
                await self._transport.wait_send_all_might_not_block()
            if scope.cancelled_caught:
                raise PeerSilentError("the other side took no data in time")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Authenticated bytes, at least one; ``b""`` only for the other side's authenticated close.

        Raises as ``receive_payload``.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be 1 or more")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            if not self._unread and not self._ended:
                self._unread = await self._next_payload()
            count = len(self._unread) if max_bytes is None else max_bytes
            piece, rest = bytes(self._unread[:count]), self._unread[count:]
            if not rest:
                self.buffers.give(self._unread)
            self._unread = rest
            return piece

    async def receive_payload(self) -> memoryview:
        """The whole payload of the next frame, not copied; empty only for the other side's authenticated close.

        Its memory may be given back to ``buffers`` when nobody reads it any more. Raises :class:`TamperedError`,
        :class:`PeerSilentError`, ``trio.BrokenResourceError`` when the connection broke or was cut, and trio's
        ``ClosedResourceError`` and ``BusyResourceError``. After an error it raises that for ever. When cancelled, nothing is
        lost: call it again.
        """
        with self._receiving:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            if self._unread or self._ended:
                payload, self._unread = self._unread, memoryview(b"")
                return payload
            return await self._next_payload()

    async def _next_payload(self) -> memoryview:
        """The next frame's payload; empty at the authenticated close."""
        if self._receive_error is not None:
            raise self._receive_error
        try:
            while (event := self._opener.next_event()) is NEED_DATA:
                await self._feed_opener()
        except CutError as error:
            raise trio.BrokenResourceError(str(error)) from error
        except PeerSilentError as error:
            self._receive_error = error
            raise
        except WireError as error:
            self._receive_error = TamperedError(str(error))
            raise self._receive_error from error
        self._frame_wait_s = 0.0
        if isinstance(event, Data):
            return event.payload
        self._ended = True
        return memoryview(b"")

    async def _feed_opener(self) -> None:
        started = trio.current_time()
        patience_s = self._idle_timeout_s * FRAME_TIMEOUT_FACTOR - self._frame_wait_s
        with trio.move_on_after(max(0.0, min(self._idle_timeout_s, patience_s))) as scope:
            count = await receive_into(self._transport, self._opener.room())
        if self._closed:
            raise trio.ClosedResourceError("another task closed this stream")
        if scope.cancelled_caught:
            raise PeerSilentError("nothing, or too little, came from the other side in time")
        if self._opener.inside_frame:
            # Only time spent waiting counts: a reader that pauses is not the other side's fault.
            self._frame_wait_s += trio.current_time() - started
        if count:
            self._opener.took(count)
        else:
            self._opener.receive_eof()

    async def aclose(self) -> None:
        """Send the authenticated close, for 5 s at most, and close the transport.

        Only a stream that ends well says so: when a send was broken off, while a task sends or
        waits to, or when this is cancelled (as by :func:`trio.aclose_forcefully`), the transport
        is closed without it and the other side sees a cut. A connection that is gone already is
        no error. A second call does nothing.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        say_so = not (self._sending.busy or self._send_broken or self._receive_error or self._ended)
        self._closed = True
        try:
            if say_so:
                with trio.move_on_after(CLOSE_TIMEOUT_S):
                    await self._transport.send_all(self._sealer.seal_close())
        except trio.BrokenResourceError:
            # There is nobody to tell; what was not acknowledged is known from the push protocol.
            pass
        finally:
            await self._transport.aclose()


async def connect_stream(
    transport: trio.abc.Stream,
    key: PreSharedKey,
    *,
    deadline_s: float,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    suites: tuple[int, ...] = SUITES,
) -> AuthenticatedStream:
    """Prove ``key`` to the other side and it to us, within ``deadline_s`` seconds in all; ``suites``: those to speak,
    best first.

    Takes the transport over: on any error or cancellation it is closed. Raises
    :class:`~replicator.errors.AuthenticationError` (token mismatch between source and receiver),
    :class:`~replicator.errors.WireError` (no common version, not our protocol),
    :class:`PeerSilentError`, ``trio.BrokenResourceError``.
    """
    handshake = ClientHandshake(key, offer=Offer(suites=suites))
    return await _establish(transport, handshake, handshake.start(), deadline_s, idle_timeout_s)


async def accept_stream(
    transport: trio.abc.Stream,
    keyring: Keyring,
    *,
    deadline_s: float,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    suites: tuple[int, ...] = SUITES,
) -> AuthenticatedStream:
    """The accepting side of :func:`connect_stream`, with the same promise and the same errors.

    The key that the other side holds is the stream's ``peer_key``; whether it may do what it asks
    for is the caller's question.
    """
    handshake = ServerHandshake(keyring, suites=suites)
    return await _establish(transport, handshake, b"", deadline_s, idle_timeout_s)


async def _establish(
    transport: trio.abc.Stream,
    handshake: ClientHandshake | ServerHandshake,
    greeting: bytes,
    deadline_s: float,
    idle_timeout_s: float,
) -> AuthenticatedStream:
    try:
        with trio.move_on_after(deadline_s):
            session = await _shake_hands(transport, handshake, greeting)
            return AuthenticatedStream(
                transport,
                session,
                trailing_data=handshake.trailing_data,
                idle_timeout_s=idle_timeout_s,
            )
        raise PeerSilentError(f"the handshake was not done in {deadline_s:.3g} s")
    except BaseException:
        try:
            await _send_alert(transport, handshake.alert)
        finally:
            await trio.aclose_forcefully(transport)
        raise


async def _shake_hands(
    transport: trio.abc.Stream, handshake: ClientHandshake | ServerHandshake, greeting: bytes
) -> Session:
    reply = greeting
    while True:
        if reply:
            await transport.send_all(reply)
        if handshake.session is not None:
            return handshake.session
        data = await transport.receive_some(MESSAGE_BYTES_MAX)
        if not data:
            raise trio.BrokenResourceError("the other side closed the connection in the handshake")
        reply = handshake.receive_data(data)


async def _send_alert(transport: trio.abc.Stream, alert: bytes) -> None:
    if not alert:
        return
    with trio.move_on_after(ALERT_TIMEOUT_S):
        try:
            await transport.send_all(alert)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The alert is a courtesy; the caller gets the error that it is about.
            return
