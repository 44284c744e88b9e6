# SPDX-License-Identifier: AGPL-3.0-or-later
"""The receiver's side of a push session: authenticate, answer, land, acknowledge, commit."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import trio
from eventsourcing.persistence import PersistenceError

from receiver.service import digests
from receiver.service.strangers import Strangers
from receiver.store.admission import PushRefusedHereError
from receiver.store.landing import Landing, StreamMismatchError
from receiver.store.stores import Stores
from receiver.store.vm_store import VmStore
from replicator.credentials import ReceiverCredentials
from replicator.domain.model import Point
from replicator.errors import (
    AuthenticationError,
    DamageError,
    PhcbtError,
    RefusedError,
    ReplicatorError,
    StateError,
    WireError,
)
from replicator.log.peers import PeerBrokenError, seen_size, take_head, take_signed
from replicator.nursery import flat_nursery
from replicator.push.compare import note_broken
from replicator.push.schedule import beat_s
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream
from replicator.wire.peers import Peer
from replicator.wire.session import Phase, Session

_logger = logging.getLogger(__name__)

HANDSHAKE_S = 15
#: Connections that have not proved a key yet; one more, and the oldest of them is dropped.
HANDSHAKES_MAX = 128
#: Bytes that land before they are made durable and acknowledged, while more land.
ACK_BYTES = 16 << 20
#: ... or this long after the first of them, so that a slow line is acknowledged too.
ACK_S = 1.0
#: Bytes that land before the source is told so; it is told at once when nothing more is there to be landed.
LANDED_BYTES = 2 << 20
#: Bytes of records that a push may have begun and not ended, all its disks together: they are in memory (docs/wire.md, 4.10).
UNFINISHED_MAX = 128 << 20
_QUEUE = 4
_REASON_MAX = 1900
#: A push refused for one of these can never be committed: what has landed of it goes.
_HOPELESS: frozenset[m.RefusalCode] = frozenset({"root-mismatch", "damaged-stream", "bad-request"})
#: Nothing of the VM's state stands in these refusals.
_NOT_TOLD: frozenset[m.RefusalCode] = frozenset({"wrong-key", "unknown-vm"})


@dataclass(slots=True)
class _Push:
    """A push that is landing. ``dirty`` is set when something is there to be made durable, ``full`` when it is enough."""

    store: VmStore
    landing: Landing
    told: list[int]
    unacked: int = 0
    untold: int = 0
    waits: bool = False  # whether the end of what came last is kept back for more
    dirty: trio.Event = field(default_factory=trio.Event)
    full: trio.Event = field(default_factory=trio.Event)


class _End:
    """The source ended the session in order."""


_Item = tuple[int, bytearray | memoryview] | _End | Exception


@dataclass(frozen=True, slots=True)
class _Shown:
    """The head of our log that this session's source was shown, for its VM."""

    vm: UUID
    head: str


@dataclass(frozen=True, slots=True)
class _Claim:
    """A session's right to push a VM. ``gone`` is set when it is given back."""

    push_id: str
    scope: trio.CancelScope
    gone: trio.Event


class PushServer:
    """Serves push sessions over accepted connections."""

    def __init__(
        self, stores: Stores, credentials: ReceiverCredentials, timeout_s: float = 8
    ) -> None:
        """``timeout_s``: a source that is not heard of for so many seconds is gone (``dr_timeout``)."""
        self._timeout_s = timeout_s
        #: A source hears from this side this often, so that a long commit or a slow disk is not taken for a dead line.
        self.beat_s = beat_s(timeout_s)
        self._stores = stores
        self._credentials = credentials
        self._log_of_strangers = Strangers(_logger)
        #: Connections that have not proved a key yet, the oldest first.
        self._strangers: dict[trio.SocketStream, trio.CancelScope] = {}
        self._active: dict[UUID, _Claim] = {}
        self._told_names: dict[UUID, str] = {}

    def is_pushing(self, vm: UUID) -> bool:
        """Whether a push of this VM is landing now."""
        return vm in self._active

    async def serve(self, transport: trio.SocketStream) -> None:
        """One connection, to its end. Never raises for what happens in it: that is logged."""
        try:
            host, *_ = transport.socket.getpeername()
        except OSError as error:
            _logger.debug("a connection was gone before it was looked at: %s", error)
            return
        try:
            accepted = await self._authenticate(transport)
        except AuthenticationError as error:
            self._log_of_strangers.say(logging.ERROR, host, str(error))
            return
        except (WireError, trio.BrokenResourceError, OSError) as error:
            self._log_of_strangers.say(logging.WARNING, host, f"no session: {error}")
            return
        if accepted is None:
            reason = "dropped before it proved a key: too many such connections"
            self._log_of_strangers.say(logging.WARNING, host, reason)
            return
        stream, peer = accepted
        async with MessageStream(stream, m.LIMITS) as framed:
            session = _PushSession(self, framed, peer)
            try:
                await session.run()
            except (WireError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _logger.warning("%s: session ended (%s): %s", host, session.whose, error)
            except (OSError, ReplicatorError, PersistenceError) as error:
                _logger.error("%s: session failed (%s): %s", host, session.whose, error)
            except Exception:  # a defect that one session meets must not end the others
                _logger.exception("%s: session failed (%s)", host, session.whose)

    async def _authenticate(
        self, transport: trio.SocketStream
    ) -> tuple[trio.abc.Stream, Peer] | None:
        """The session's stream and who is there, or None if this connection had to make room.

        An honest source needs milliseconds: where many wait without a key, the one that has waited longest goes.
        """
        if len(self._strangers) >= HANDSHAKES_MAX:
            self._strangers.pop(next(iter(self._strangers))).cancel()
        scope = self._strangers[transport] = trio.CancelScope()
        try:
            with scope:
                return await self._credentials.accept(
                    transport, deadline_s=HANDSHAKE_S, idle_timeout_s=self._timeout_s
                )
            return None
        finally:
            self._strangers.pop(transport, None)

    def check_key(self, peer: Peer, vm: UUID, name: str) -> None:
        """Raise PushRefusedHereError unless this peer may push this VM.

        The name of a VM that is known here is the one that it was seeded with, whatever the source calls it now.
        """
        store = self._stores.get(vm)
        known = store.vm.name if store is not None else name
        if not peer.may_push(str(vm), known):
            raise PushRefusedHereError("wrong-key", f"{peer.name} may not push VM {name}")

    def note_name(self, vm: UUID, name: str) -> None:
        """Say once that the source calls a VM otherwise than it is called here."""
        store = self._stores.get(vm)
        if store is None or self._told_names.get(vm, store.vm.name) == name:
            return
        self._told_names[vm] = name
        if name == store.vm.name:
            return
        _logger.warning(
            "%s: the source calls this VM %s now; it keeps the name that it was seeded with here",
            store.vm.name,
            name,
        )

    async def claim(self, vm: UUID, push_id: str, scope: trio.CancelScope) -> _Claim:
        """Be the one session that pushes this VM; a stale session of the same push is ended first."""
        while (other := self._active.get(vm)) is not None:
            if other.push_id != push_id:
                raise PushRefusedHereError("busy", "another push of this VM is landing")
            other.scope.cancel()
            await other.gone.wait()
        claim = self._active[vm] = _Claim(push_id, scope, trio.Event())
        return claim

    def release(self, vm: UUID, claim: _Claim) -> None:
        """The push is over, or its session."""
        if self._active.get(vm) is claim:
            del self._active[vm]
        claim.gone.set()

    @property
    def stores(self) -> Stores:
        """The VMs."""
        return self._stores


class _PushSession:
    def __init__(self, server: PushServer, stream: MessageStream, peer: Peer) -> None:
        self._server = server
        self._stream = stream
        self._peer = peer
        self._session = Session()
        self._push: _Push | None = None
        self._opened = trio.Event()  # set when a push is there
        self._syncing = trio.Lock()  # held while a landing is made durable, or closed
        self._vm: UUID | None = None  # whose state may be told: the key fits
        #: The VM that the session is about, for the log: as it is called here, else as the source calls it.
        self.whose = "no VM yet"
        self._claim: tuple[UUID, _Claim] | None = None
        self._scope = trio.CancelScope()
        self._shown: _Shown | None = None

    async def run(self) -> None:
        """Read ahead in one task, act in another, make durable in a third, until the source ends the session."""
        send, receive = trio.open_memory_channel[_Item](_QUEUE)
        try:
            with self._scope:
                async with flat_nursery() as nursery:
                    nursery.start_soon(self._read, send)
                    nursery.start_soon(self._beat)
                    nursery.start_soon(self._make_durable, send)
                    await self._act(receive)
                    nursery.cancel_scope.cancel()
        finally:
            if self._push is not None:
                self._push.landing.close()
            self._release()

    async def _read(self, send: trio.MemorySendChannel[_Item]) -> None:
        while (message := await self._stream.receive()) is not None:
            await send.send(message)
        await send.send(_End())

    async def _make_durable(self, failed: trio.MemorySendChannel[_Item]) -> None:
        """Acknowledge what has landed, again and again, while more lands. What fails is handed to ``_act``."""
        while True:
            if (push := self._push) is None:
                self._opened = trio.Event()
                await self._opened.wait()
                continue
            await push.dirty.wait()
            with trio.move_on_after(ACK_S):
                await push.full.wait()
            try:
                await self._acknowledge(push)
            except (OSError, PersistenceError, ReplicatorError) as error:
                if isinstance(error, WireError):
                    raise
                await failed.send(error)
                push.dirty, push.full = trio.Event(), trio.Event()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(self._server.beat_s)
            await self._send(m.Pong())

    async def _act(self, receive: trio.MemoryReceiveChannel[_Item]) -> None:
        while not isinstance(item := await receive.receive(), _End):
            try:
                if isinstance(item, Exception):
                    raise item
                await self._take(item, last=not receive.statistics().current_buffer_used)
            except StreamMismatchError as error:
                await self._refuse("bad-request", str(error))
            except (WireError, trio.BrokenResourceError, trio.ClosedResourceError):
                raise
            except (OSError, PersistenceError, ReplicatorError) as error:
                await self._refuse(*_refusal(error, self.whose))

    async def _take(self, message: tuple[int, bytearray | memoryview], *, last: bool) -> None:
        """Act on one message. ``last``: none is waiting behind it."""
        kind, body = message
        if kind == m.DATA:
            await self._data(m.decode_data(body), last=last)
            self._stream.recycle(body)
        elif kind == m.CONTROL:
            await self._control(m.decode_from_source(body))
            push = self._push
            if last and push is not None and push.waits:
                # The end of the data before it waits for more, and none is there.
                push.waits = False
                await trio.to_thread.run_sync(push.landing.flush)
                await self._tell_landed(push)
        else:
            raise WireError(f"message of kind {kind}")

    async def _control(self, message: m.FromSource) -> None:
        late = self._session.phase is Phase.REFUSED
        self._session.message(message)
        if isinstance(message, m.Ping):
            await self._send(m.Pong())
        elif isinstance(message, m.Query):
            await self._query(message)
        elif isinstance(message, m.Open):
            await self._open(message)
        elif isinstance(message, m.Abandon):
            await self._abandon(message)
        elif isinstance(message, m.Compare):
            await self._compare(message)
        elif isinstance(message, m.SourceHead):
            await self._source_head(message)
        elif isinstance(message, m.Describe):
            await self._send(await digests.describe(self._known(message)))
        elif isinstance(message, m.AskPages):
            for answer in await digests.pages(self._known(message), message):
                await self._send(answer)
            await self._send(m.PagesEnd())
        elif isinstance(message, m.Doubt):
            store = self._known(message)
            await digests.doubt(store, message)
            await self._state(store.uuid)
        elif not late:
            await self._finish(message)

    def _check_key(self, vm: str, name: str) -> UUID:
        self._vm, asked = None, m.vm_uuid(vm)
        store = self._server.stores.get(asked)
        self.whose = store.vm.name if store is not None else f"{name} (not known here)"
        self._server.check_key(self._peer, asked, name)
        self._vm = asked
        return asked

    def _known(self, message: m.Describe | m.AskPages | m.Doubt) -> VmStore:
        """The store that a message is about, which the key may push. Raises PushRefusedHereError."""
        vm = self._check_key(message.vm, message.name)
        store = self._server.stores.get(vm)
        if store is None:
            raise PushRefusedHereError("unknown-vm", f"VM {message.name} is not known here")
        return store

    async def _query(self, query: m.Query) -> None:
        vm = self._check_key(query.vm, query.name)
        await self._server.stores.check_acceptable(vm, query.name)
        self._server.note_name(vm, query.name)
        await self._state(vm)

    async def _state(self, vm: UUID) -> None:
        store = self._server.stores.get(vm)
        if store is None:
            await self._send(m.VmState(newest=None, epoch=1, push_id=None))
            return
        unfinished = await store.unfinished()
        await self._send(m.VmState(store.newest(), store.vm.epoch, unfinished))

    async def _open(self, opened: m.Open) -> None:
        await self._close_push()
        vm = self._check_key(opened.vm, opened.name)
        store = await self._server.stores.for_push(vm, opened)
        await self._claim_push(vm, opened.push_id)
        # Looked at under the claim: until then an older session may have been committing this very push.
        newest = store.vm.newest
        if newest is not None and newest.push_id == opened.push_id:
            self._release()
            await self._send(_committed(newest))
            return
        landing = await store.open_push(opened)
        self._push = _Push(store, landing, list(landing.positions))
        self._opened.set()
        await self._send(m.Ready(opened.push_id, landing.positions))

    async def _data(self, data: m.Data, *, last: bool) -> None:
        self._session.message(data)
        if self._session.phase is Phase.REFUSED:
            return  # it was on its way when the push was refused
        push = self._push
        if push is None or data.disk >= len(push.landing.disks):
            raise WireError(f"data of disk {data.disk}, which the push does not have")
        feed = partial(push.landing.feed, data.disk, data.offset, data.payload, last=last)
        try:
            await trio.to_thread.run_sync(feed)
        except DamageError as error:
            raise PushRefusedHereError("damaged-stream", str(error)) from error
        if push.landing.unfinished > UNFINISHED_MAX:
            raise PushRefusedHereError("bad-request", "too many records are begun and not ended")
        push.dirty.set()
        push.unacked += len(data.payload)
        if push.unacked >= ACK_BYTES:
            push.full.set()
        push.waits = not last
        push.untold += len(data.payload)
        if push.untold >= LANDED_BYTES or last:
            await self._tell_landed(push)

    async def _tell_landed(self, push: _Push) -> None:
        push.untold = 0
        for index, position in enumerate(push.landing.positions):
            if position > push.told[index]:
                push.told[index] = position
                await self._send(m.Landed(index, position))

    async def _acknowledge(self, push: _Push) -> None:
        async with self._syncing:
            if self._push is not push:
                return  # it was committed or closed meanwhile
            push.unacked = 0
            push.dirty, push.full = trio.Event(), trio.Event()
            before = [disk.durable for disk in push.landing.disks]
            positions = await push.store.sync(push.landing)
            for index, (old, new) in enumerate(zip(before, positions, strict=True)):
                if new > old:
                    await self._send(m.Ack(index, new))

    async def _finish(self, finish: m.Finish) -> None:
        push = self._push
        if push is None or push.landing.opened.push_id != finish.push_id:
            raise WireError("the end of a push that was not opened")
        async with self._syncing:
            point = await push.store.commit(push.landing, finish, time.time_ns() // 1000)
            self._push = None  # who waits to make more of it durable must not journal it again
        push.dirty.set()
        push.full.set()
        _logger.info(
            "DR cycle complete: vm=%s cycle=%d bytes_pushed=%d",
            push.store.vm.name,
            point.number,
            point.bytes_pushed,
        )
        await self._close_push()
        self._release()
        await self._send(_committed(point))

    async def _abandon(self, message: m.Abandon) -> None:
        await self._close_push()
        vm = self._check_key(message.vm, message.vm)
        store = self._server.stores.get(vm)
        if store is not None and await store.unfinished() == message.push_id:
            await self._claim_push(vm, message.push_id)
            # Again: another session may have committed it before this one had the claim.
            if await store.unfinished() == message.push_id:
                await store.drop_push()
                _logger.warning(
                    "push of %s abandoned by the source: %s", store.vm.name, message.reason
                )
        self._release()
        await self._state(vm)

    async def _compare(self, asked: m.Compare) -> None:
        """Show the head of our log; whose VM it is was proven by the key."""
        vm = self._check_key(asked.vm, asked.name)
        log = self._server.stores.log
        if self._server.stores.get(vm) is None:
            raise PushRefusedHereError("unknown-vm", f"VM {asked.name} is not known here")
        head = await log.head(asked.seen)
        seen = seen_size(await log.peer(vm))
        self._shown = _Shown(vm, head.text)
        await self._send(m.ReceiverHead(str(log.key.verifier), head.text, head.proof, seen))

    async def _source_head(self, message: m.SourceHead) -> None:
        shown, self._shown = self._shown, None
        assert shown is not None, "the table of the session lets none come before"
        log = self._server.stores.log
        try:
            peer = take_head(
                await log.peer(shown.vm), message.key, message.head, message.proof, log.key
            )
            if message.signed is not None:
                peer = take_signed(peer, shown.head, message.signed, log.key.verifier)
        except PeerBrokenError as error:
            await note_broken(log, shown.vm, str(error))
            raise PushRefusedHereError("log-broken", error.why) from error
        await log.keep_peer(shown.vm, peer)
        await self._send(m.Signed(peer.seen))

    async def _refuse(self, code: m.RefusalCode, reason: str) -> None:
        """Say no. What has landed stays for another try, except where it can never be committed."""
        _logger.warning("%s: push refused (%s): %s", self.whose, code, reason)
        push = self._push
        await self._close_push()
        if push is not None and code in _HOPELESS:
            await push.store.drop_push()
        self._release()
        store = None if self._vm is None else self._server.stores.get(self._vm)
        if store is None or code in _NOT_TOLD:
            await self._send(m.Refused(code, reason[:_REASON_MAX], None, 1))
        else:
            said = reason[:_REASON_MAX]
            await self._send(m.Refused(code, said, store.newest(), store.vm.epoch))

    async def _claim_push(self, vm: UUID, push_id: str) -> None:
        if self._claim is not None:
            held, claim = self._claim
            if held == vm and claim.push_id == push_id:
                return
            self._release()
        self._claim = (vm, await self._server.claim(vm, push_id, self._scope))

    async def _close_push(self) -> None:
        if (push := self._push) is not None:
            async with self._syncing:
                push.landing.close()
                self._push = None
            push.dirty.set()  # who waits for more of it looks for the next one
            push.full.set()

    def _release(self) -> None:
        if self._claim is not None:
            claim, self._claim = self._claim, None
            self._server.release(*claim)

    async def _send(self, message: m.Message) -> None:
        self._session.message(message)
        await self._stream.send(m.CONTROL, m.encode(message))


def _refusal(error: Exception, whose: str) -> tuple[m.RefusalCode, str]:
    """What the source is told of an error. Paths of this host stay in its own log."""
    if isinstance(error, PushRefusedHereError):
        return error.code, error.reason
    if isinstance(error, RefusedError):
        return "state", str(error)
    if isinstance(error, PhcbtError):
        return "damaged-stream", str(error)
    _logger.error("%s: push failed: %s", whose, error)
    if isinstance(error, PersistenceError) and os.strerror(errno.ENOSPC) in str(error):
        return "no-room", "there is no room on the receiver for its event log"
    if isinstance(error, DamageError | StateError):
        return "root-mismatch", "what the push is built on is damaged here"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no-room", "there is no room on the receiver"
    reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return "failed", f"the receiver failed: {reason}"


def _committed(point: Point) -> m.Committed:
    return m.Committed(
        point.push_id, point.number, point.root, point.committed_at_us, point.bytes_pushed
    )
