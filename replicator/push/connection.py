# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source's session with the receiver: ask, push one or more streams. ``push/link.py`` makes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from replicator.errors import PeerRefusedError, ReplicatorError, WireError
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream
from replicator.wire.session import Session

_logger = logging.getLogger(__name__)

#: How long a receiver that lives may take for one step: the commit of a large push on a slow disk takes minutes, not more.
STUCK_S = 1800
#: ... and for landing a megabyte.
STUCK_LANDING_S = 300
#: How long a refusal may still be on its way when the line breaks.
_LAST_WORDS_S = 1
#: Bytes on the way that have not landed at the receiver: then sending waits. It is all that a broken line can cost.
ON_THE_WAY_MAX = 8 << 20
#: Bytes that have landed and are not durable there yet: what a power cut at the receiver can cost.
UNACKED_MAX = 64 << 20

A = TypeVar("A", bound=m.Message)
B = TypeVar("B", bound=m.Message)


class ConnectionLostError(ReplicatorError):
    """The line broke, or could not be made; what was acknowledged is safe. Try again."""


class Connection:
    """One session. Made by ``Link.connect``; one push at a time."""

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream
        self._session = Session()
        self._replies_in, self._replies = trio.open_memory_channel[m.FromReceiver](16)
        self._acked: list[int] = []
        self._landed: list[int] = []
        self._sent: list[int] = []
        self._window = ON_THE_WAY_MAX
        self.disks_at_once = 1
        self._room = trio.lowlevel.ParkingLot()
        self._end: Exception | None = None
        #: When the receiver was last heard of, by trio's clock.
        self.heard_at = trio.current_time()
        #: Whether something came to be durable on the receiver in this session, or since the one before.
        self.progressed = False

    async def ask(self, message: m.Message, want: type[A], other: type[B] | None = None) -> A | B:
        """Send a request and wait for its answer, one of two types. Raises as ``reply``."""
        await self.send(message)
        return await self.reply(want, other)

    async def send(self, message: m.Message) -> None:
        """Send one control message."""
        self._session.message(message)
        await self._send(m.CONTROL, m.encode(message))

    async def _send(self, kind: int, *pieces: bytes | memoryview) -> None:
        try:
            await self._stream.send(kind, *pieces)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            with trio.move_on_after(_LAST_WORDS_S):
                await self._last_words()
            if self._end is not None:  # that is why the line was closed
                raise self._lost() from error
            raise ConnectionLostError(f"the line to the receiver broke: {error}") from error

    async def _last_words(self) -> None:
        """Read the line to its end: a refusal that came before it broke goes first."""
        async for answer in self._replies:
            if isinstance(answer, m.Refused):
                raise PeerRefusedError(answer.code, answer.reason)

    async def reply(self, want: type[A], other: type[B] | None = None) -> A | B:
        """The next answer, of one of these types. Raises PeerRefusedError, ConnectionLostError, WireError."""
        try:
            with self._no_longer("has answered nothing", STUCK_S):
                answer = await self._replies.receive()
        except trio.EndOfChannel:
            raise self._lost() from self._end
        if isinstance(answer, m.Refused):
            raise PeerRefusedError(answer.code, answer.reason)
        if isinstance(answer, want) or (other is not None and isinstance(answer, other)):
            return answer
        raise WireError(f"the receiver answered {type(answer).__name__}")

    @contextmanager
    def _no_longer(self, what: str, limit_s: float) -> Iterator[None]:
        """Bounds a wait for a receiver that shows signs of life and does nothing else."""
        with trio.move_on_after(limit_s) as scope:
            yield
        if scope.cancelled_caught:
            raise ConnectionLostError(f"the receiver {what} for {limit_s:g} s, although it lives")

    def begin(self, positions: tuple[int, ...], chunk: int = 1 << 20) -> None:
        """The push's streams go on from here; their records hold at most ``chunk`` plain bytes."""
        # A record lands as a whole: some of them must have room.
        self._window = max(ON_THE_WAY_MAX, 4 * chunk)
        #: Disks that may be sent in turn: with more, each could be within a record, and no record could come to its end.
        self.disks_at_once = max(1, self._window // chunk - 1)
        self._acked = list(positions)
        self._landed = list(positions)
        self._sent = list(positions)

    async def data(self, disk: int, offset: int, pieces: list[bytes | memoryview]) -> float:
        """Send the next piece of a disk's stream; waits while too much is on its way, or not durable.

        Several tasks may send, each for disks of its own; they take turns. Returns how long it had to wait for the line
        and the receiver, seconds. Raises PeerRefusedError, ConnectionLostError, WireError.
        """
        started = trio.current_time()
        length = sum(len(piece) for piece in pieces)
        self._check_refused()
        while self._is_full(length):
            with self._no_longer("has landed nothing", STUCK_LANDING_S):
                await self._room.park()
            self._check_refused()
        # Checked after the wait: a refusal may have changed the phase meanwhile.
        self._session.message(m.Data(disk, offset, b""))
        # Before it goes out: what the receiver says of it may be here before this task goes on.
        self._sent[disk] = offset + length
        await self._send(m.DATA, m.data_head(disk, offset), *pieces)
        return trio.current_time() - started

    def _is_full(self, length: int) -> bool:
        sent = sum(self._sent) + length
        return sent - sum(self._landed) > self._window or sent - sum(self._acked) > UNACKED_MAX

    @property
    def _broke_protocol(self) -> bool:
        """Whether the session ended because of what the receiver said."""
        end = self._end
        return isinstance(end, WireError) and not isinstance(end, trio.BrokenResourceError)

    def _lost(self) -> ReplicatorError:
        """Why no answer will come: a broken line can be tried again, a broken protocol cannot."""
        end = self._end
        if self._broke_protocol:
            return WireError(f"the receiver broke the protocol: {end}")
        why = "the receiver ended the session" if end is None else f"the line broke: {end}"
        return ConnectionLostError(why)

    def _check_refused(self) -> None:
        """A refusal in the middle of a push ends it at once."""
        try:
            answer = self._replies.receive_nowait()
        except trio.WouldBlock:
            return
        except trio.EndOfChannel:
            raise self._lost() from self._end
        if isinstance(answer, m.Refused):
            raise PeerRefusedError(answer.code, answer.reason)
        raise WireError(f"the receiver answered {type(answer).__name__} in the middle of a push")

    @property
    def acked(self) -> tuple[int, ...]:
        """Each disk's durable position at the receiver."""
        return tuple(self._acked)

    async def read_replies(self) -> None:
        """Take what the receiver says until the session ends; why it did is kept for who waits. Run by ``Link.connect``."""
        try:
            await self._read_replies()
        except (WireError, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            self._end = error
            # A send may be waiting for a peer that will never take anything: it ends now, not in the fullness of TCP's time.
            await trio.aclose_forcefully(self._stream)
        finally:
            self._replies_in.close()
            self._room.unpark_all()

    async def _read_replies(self) -> None:
        while (message := await self._stream.receive()) is not None:
            kind, body = message
            self.heard_at = trio.current_time()
            if kind != m.CONTROL:
                raise WireError("it sent data")
            answer = m.decode_from_receiver(body)
            self._session.message(answer)
            if isinstance(answer, m.Ack):
                self._take_ack(answer)
            elif isinstance(answer, m.Landed):
                self._take_landed(answer)
            elif not isinstance(answer, m.Pong):
                await self._replies_in.send(answer)
                self._room.unpark_all()

    def _take_ack(self, ack: m.Ack) -> None:
        if ack.disk >= len(self._acked) or not (
            self._acked[ack.disk] <= ack.position <= self._sent[ack.disk]
        ):
            raise WireError(f"it acknowledged {ack.position} of disk {ack.disk}")
        self.progressed |= ack.position > self._acked[ack.disk]
        self._acked[ack.disk] = ack.position
        self._landed[ack.disk] = max(self._landed[ack.disk], ack.position)
        self._room.unpark_all()

    def _take_landed(self, landed: m.Landed) -> None:
        disk = landed.disk
        if disk >= len(self._landed) or not (
            self._landed[disk] <= landed.position <= self._sent[disk]
        ):
            raise WireError(f"it has landed {landed.position} of disk {disk}")
        self._landed[disk] = landed.position
        self._room.unpark_all()

    async def ping(self, every_s: float) -> None:
        """Say every so often that this side lives, for as long as the line bears it. Run by ``Link.connect``."""
        try:
            while True:
                await trio.sleep(every_s)
                await self._stream.send(m.CONTROL, m.encode(m.Ping()))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            # The push finds it out as well, by reading or sending, and knows what to do.
            _logger.debug("no more pings: %s", error)
