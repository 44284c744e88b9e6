# SPDX-License-Identifier: AGPL-3.0-or-later
"""The receiver's side of a push session: authenticate, answer, land, acknowledge, commit."""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import dataclass
from uuid import UUID

import trio
from eventsourcing.persistence import PersistenceError

from receiver.store.landing import Landing
from receiver.store.stores import Stores
from receiver.store.vm_store import PushRefusedHereError, VmStore
from replicator.domain.model import Point
from replicator.errors import (
    AuthenticationError,
    DamageError,
    PhcbtError,
    RefusedError,
    ReplicatorError,
    WireError,
)
from replicator.nursery import flat_nursery
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.session import Session
from replicator.wire.stream import accept_stream

_logger = logging.getLogger(__name__)

HANDSHAKE_S = 15
#: Sessions that have not proved a key yet; further ones wait for a place.
HANDSHAKES_MAX = 32
#: Bytes that land before they are made durable and acknowledged.
ACK_BYTES = 16 << 20
#: ... or this long after the first of them, so that a slow line is acknowledged too.
ACK_S = 2.0
_QUEUE = 4
#: Bytes of data taken together into one worker thread call.
_BATCH = 1 << 20


@dataclass(slots=True)
class _Push:
    store: VmStore
    landing: Landing
    unacked: int = 0
    since: float = 0.0


class PushServer:
    """Serves push sessions over accepted connections."""

    def __init__(self, stores: Stores, keyring: Keyring) -> None:
        self._stores = stores
        self._keyring = keyring
        self._handshakes = trio.CapacityLimiter(HANDSHAKES_MAX)
        self._active: dict[UUID, tuple[str, trio.CancelScope, trio.Event]] = {}

    def is_pushing(self, vm: UUID) -> bool:
        """Whether a push of this VM is landing now."""
        return vm in self._active

    async def serve(self, transport: trio.SocketStream) -> None:
        """One connection, to its end. Never raises for what the other side does: that is logged."""
        host, *_ = transport.socket.getpeername()
        try:
            async with self._handshakes:
                stream = await accept_stream(transport, self._keyring, deadline_s=HANDSHAKE_S)
        except AuthenticationError as error:
            _logger.error("%s: %s", host, error)
            return
        except (WireError, trio.BrokenResourceError, OSError) as error:
            _logger.warning("%s: no session: %s", host, error)
            return
        async with MessageStream(stream, m.LIMITS) as framed:
            session = _PushSession(self, framed, stream.peer_key)
            try:
                await session.run()
            except (WireError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _logger.warning("%s: session ended: %s", host, error)
            except (OSError, ReplicatorError, PersistenceError) as error:
                _logger.error("%s: session failed: %s", host, error)

    def allowed(self, key: PreSharedKey, vm: str, name: str) -> None:
        """Raise PushRefusedHereError unless this key may push this VM."""
        if key.vm is not None and key.vm not in (vm, name):
            raise PushRefusedHereError("wrong-key", f"the key {key.name} may not push VM {name}")

    async def claim(self, vm: UUID, push_id: str, scope: trio.CancelScope) -> trio.Event:
        """Be the one session that pushes this VM; a stale session of the same push is ended first."""
        while (other := self._active.get(vm)) is not None:
            other_push, other_scope, gone = other
            if other_push != push_id:
                raise PushRefusedHereError("busy", "another push of this VM is landing")
            other_scope.cancel()
            await gone.wait()
        done = trio.Event()
        self._active[vm] = (push_id, scope, done)
        return done

    def release(self, vm: UUID, done: trio.Event) -> None:
        """The push is over, or its session."""
        if vm in self._active and self._active[vm][2] is done:
            del self._active[vm]
        done.set()

    @property
    def stores(self) -> Stores:
        """The VMs."""
        return self._stores


class _PushSession:
    def __init__(self, server: PushServer, stream: MessageStream, key: PreSharedKey) -> None:
        self._server = server
        self._stream = stream
        self._key = key
        self._session = Session()
        self._push: _Push | None = None
        self._claim: tuple[UUID, trio.Event] | None = None
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Read ahead in one task, act in another, until the source ends the session."""
        send, receive = trio.open_memory_channel[tuple[int, bytearray]](_QUEUE)
        try:
            with self._scope:
                async with flat_nursery() as nursery:
                    nursery.start_soon(self._read, send)
                    await self._act(receive)
                    nursery.cancel_scope.cancel()
        finally:
            if self._push is not None:
                self._push.landing.close()
            if self._claim is not None:
                self._server.release(*self._claim)

    async def _read(self, send: trio.MemorySendChannel[tuple[int, bytearray]]) -> None:
        async with send:
            while (message := await self._stream.receive()) is not None:
                await send.send(message)

    async def _act(self, receive: trio.MemoryReceiveChannel[tuple[int, bytearray]]) -> None:
        while True:
            message = None
            with trio.move_on_at(self._ack_due()):
                try:
                    message = await receive.receive()
                except trio.EndOfChannel:
                    return
            if message is None:
                await self._acknowledge()
            elif message[0] == m.DATA:
                await self._data(m.decode_data(message[1]))
            elif message[0] == m.CONTROL:
                await self._control(m.decode_from_source(message[1]))
            else:
                raise WireError(f"message of kind {message[0]}")

    def _ack_due(self) -> float:
        push = self._push
        return push.since + ACK_S if push is not None and push.unacked else float("inf")

    async def _control(self, message: m.FromSource) -> None:
        self._session.message(message)
        if isinstance(message, m.Ping):
            await self._send(m.Pong())
            return
        try:
            await self._answer(message)
        except PushRefusedHereError as error:
            await self._refuse(message, error.code, error.reason)
        except RefusedError as error:
            await self._refuse(message, "state", str(error))
        except PhcbtError as error:
            await self._refuse(message, "damaged-stream", str(error))
        except (OSError, PersistenceError, DamageError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            code: m.RefusalCode = "no-room" if full else "failed"
            _logger.error("push failed: %s", error)
            await self._refuse(message, code, f"the receiver failed: {error}")

    async def _answer(self, message: m.FromSource) -> None:
        if isinstance(message, m.Query):
            await self._query(message)
        elif isinstance(message, m.Open):
            await self._open(message)
        elif isinstance(message, m.Finish):
            await self._finish(message)
        elif isinstance(message, m.Abandon):
            await self._abandon(message)

    async def _query(self, query: m.Query) -> None:
        self._server.allowed(self._key, query.vm, query.name)
        await self._state(m.vm_uuid(query.vm))

    async def _state(self, vm: UUID) -> None:
        store = self._server.stores.get(vm)
        if store is None:
            await self._send(m.VmState(newest=None, epoch=1, push_id=None))
            return
        unfinished = await store.unfinished()
        await self._send(m.VmState(store.newest(), store.vm.epoch, unfinished))

    async def _open(self, opened: m.Open) -> None:
        self._server.allowed(self._key, opened.vm, opened.name)
        vm = m.vm_uuid(opened.vm)
        self._close_push()
        store = await self._server.stores.for_push(vm, opened)
        newest = store.vm.newest
        if newest is not None and newest.push_id == opened.push_id:
            await self._send(_committed(newest))
            return
        if self._claim is None or self._claim[0] != vm:
            self._release()
            self._claim = (vm, await self._server.claim(vm, opened.push_id, self._scope))
        landing = await store.open_push(opened)
        self._push = _Push(store, landing)
        await self._send(m.Ready(opened.push_id, landing.positions))

    async def _data(self, data: m.Data) -> None:
        self._session.message(data)
        push = self._push
        if push is None or data.disk >= len(push.landing.disks):
            raise WireError(f"data of disk {data.disk} without a push")
        try:
            await trio.to_thread.run_sync(
                push.landing.disks[data.disk].feed, data.offset, data.payload
            )
        except (PhcbtError, DamageError) as error:
            await self._refuse(data, "damaged-stream", str(error))
            return
        except OSError as error:
            _logger.error("push of %s: %s", push.store.vm.name, error)
            await self._refuse(data, "no-room", f"the receiver cannot write: {error.strerror}")
            return
        if not push.unacked:
            push.since = trio.current_time()
        push.unacked += len(data.payload)
        if push.unacked >= ACK_BYTES:
            await self._acknowledge()

    async def _acknowledge(self) -> None:
        push = self._push
        assert push is not None
        push.unacked = 0
        before = [disk.durable for disk in push.landing.disks]
        positions = await push.store.sync(push.landing)
        for index, (old, new) in enumerate(zip(before, positions, strict=True)):
            if new > old:
                await self._send(m.Ack(index, new))

    async def _finish(self, finish: m.Finish) -> None:
        push = self._push
        if push is None or push.landing.opened.push_id != finish.push_id:
            raise WireError("the end of a push that was not opened")
        try:
            point = await push.store.commit(push.landing, finish, time.time_ns() // 1000)
        finally:
            self._close_push()
        _logger.info(
            "DR cycle complete: vm=%s cycle=%d bytes_pushed=%d",
            push.store.vm.name,
            point.number,
            point.bytes_pushed,
        )
        self._release()
        await self._send(_committed(point))

    async def _abandon(self, message: m.Abandon) -> None:
        vm = m.vm_uuid(message.vm)
        store = self._server.stores.get(vm)
        self._server.allowed(self._key, message.vm, store.vm.name if store else message.vm)
        self._close_push()
        if store is not None and await store.unfinished() == message.push_id:
            claim = self._claim or (vm, await self._server.claim(vm, message.push_id, self._scope))
            self._claim = claim
            await store.drop_push()
            _logger.warning("push of %s abandoned by the source: %s", store.vm.name, message.reason)
        self._release()
        await self._state(vm)

    async def _refuse(self, message: object, code: m.RefusalCode, reason: str) -> None:
        """Say no. What has landed stays for another try, except where it can never be committed."""
        vm = self._claim[0] if self._claim else m.vm_uuid(getattr(message, "vm", str(UUID(int=0))))
        store = self._server.stores.get(vm)
        self._close_push()
        if code in ("root-mismatch", "damaged-stream", "bad-request") and store and self._claim:
            await store.drop_push()
        self._release()
        _logger.warning("push refused (%s): %s", code, reason)
        newest, epoch = (store.newest(), store.vm.epoch) if store else (None, 1)
        await self._send(m.Refused(code, reason[:1900], newest, epoch))

    def _close_push(self) -> None:
        if self._push is not None:
            self._push.landing.close()
            self._push = None

    def _release(self) -> None:
        if self._claim is not None:
            claim, self._claim = self._claim, None
            self._server.release(*claim)

    async def _send(self, message: m.Message) -> None:
        self._session.message(message)
        await self._stream.send(m.CONTROL, m.encode(message))


def _committed(point: Point) -> m.Committed:
    return m.Committed(
        point.push_id, point.number, point.root, point.committed_at_us, point.bytes_pushed
    )
