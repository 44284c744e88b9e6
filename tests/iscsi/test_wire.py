# SPDX-License-Identifier: AGPL-3.0-or-later
"""Connecting, and sending to a target that is slow to read."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from replicator.iscsi import (
    IscsiProtocolError,
    IscsiSettings,
    LoginRefusedError,
    Portal,
    PortalUnreachableError,
    SessionLostError,
    open_disk,
    open_reader,
)
from replicator.iscsi.keys import Parameters
from replicator.iscsi.wire import OUTBOX_MAX, Wire
from replicator.nursery import flat_nursery
from tests.iscsi.fake_target import NO_TAG, Connection, content, fake_target, pdu, wanted
from tests.iscsi.lab import INITIATOR, TARGET, settings

PIECE = bytes(range(48))


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Wire, socket.socket]]:
    """A wire, and the other end of it; little fits in between."""
    own, other = socket.socketpair()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    own.setblocking(False)
    other.setblocking(False)
    wire = Wire(own, "the target")
    yield wire, other
    wire.close()
    other.close()


async def test_what_does_not_fit_is_sent_later_and_in_order(
    pair: tuple[Wire, socket.socket],
) -> None:
    wire, other = pair
    count = 2000
    received = bytearray()
    async with flat_nursery() as nursery:
        nursery.start_soon(wire.flush_for_ever)
        for number in range(count):
            wire.send(number.to_bytes(4, "big") + PIECE[4:])
        while len(received) < count * 48:
            await trio.lowlevel.wait_readable(other)
            received += other.recv(65536)
        nursery.cancel_scope.cancel()
    assert bytes(received) == b"".join(n.to_bytes(4, "big") + PIECE[4:] for n in range(count))


async def test_a_target_that_does_not_read_is_given_up(pair: tuple[Wire, socket.socket]) -> None:
    wire, _ = pair
    wire.send(bytes(OUTBOX_MAX))
    with pytest.raises(SessionLostError, match="does not take what it is sent"):
        wire.send(bytes(OUTBOX_MAX))


async def test_the_other_end_is_gone(pair: tuple[Wire, socket.socket]) -> None:
    wire, other = pair
    for _ in range(100):
        wire.send(PIECE)
    other.close()
    with pytest.raises(SessionLostError, match="connection was lost"):
        await wire.flush()
    with pytest.raises(SessionLostError, match=r"closed|lost"):
        await wire.receive()
    wire.close()
    wire.close()


async def test_requests_with_data_get_their_digests(pair: tuple[Wire, socket.socket]) -> None:
    wire, other = pair
    wire.use(Parameters(header_digest=True, data_digest=True))
    wire.send(bytes(48) + bytes(32))
    assert other.recv(200)[-4:].hex() == "aa36918a"  # the example of RFC 7143


async def test_a_connection_that_is_not_taken(mock_clock: trio.testing.MockClock) -> None:
    """A listener whose queue is full: SYNs are dropped, as behind a firewall."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        portal = Portal(*listener.getsockname())
        waiting = [socket.create_connection(listener.getsockname()) for _ in range(1)]

        async def connect() -> None:
            with pytest.raises(PortalUnreachableError, match=r"within 10 s.*firewall"):
                async with open_disk(portal, TARGET, None, IscsiSettings(INITIATOR)):
                    pass

        async with flat_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(10)
        for each in waiting:
            each.close()


class NoName(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    async def getnameinfo(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


async def test_a_name_that_means_nothing() -> None:
    trio.socket.set_custom_hostname_resolver(NoName())
    with pytest.raises(PortalUnreachableError, match=r"dsip\.example:3260: .*cannot be resolved"):
        async with open_disk(Portal("dsip.example"), TARGET, None, settings()):
            pass


async def test_something_else_than_a_login_response() -> None:
    async def script(target: Connection) -> None:
        await target.receive()
        await target.send(pdu(0x20, words=(NO_TAG, *target.numbers(ends=False))))

    async with fake_target(script) as portal:
        with pytest.raises(IscsiProtocolError, match="NopIn during the login"):
            async with open_disk(portal, TARGET, None, settings()):
                pass


async def test_pings_without_an_end_to_an_initiator_that_nobody_listens_to() -> None:
    """The answers pile up at our side: the session is given up before they take room."""

    async def script(target: Connection) -> None:
        await target.login()
        await target.serve_until_read()
        ping = pdu(0x20, words=(7, *target.numbers(ends=False))) * 1000
        while True:
            await target.stream.send_all(ping)

    async with fake_target(script) as portal:
        with pytest.raises(SessionLostError):
            async with open_disk(portal, TARGET, None, settings()) as disk:
                await disk.read(0, 512)


async def test_a_reader_waits_for_a_target_that_has_its_own_trouble() -> None:
    """Cut after the first read; then refused with "try later", then let in again. Another refusal is final."""
    logins = 0

    async def script(target: Connection) -> None:
        nonlocal logins
        logins += 1
        if logins in {2, 5}:
            status = 0x0301 if logins == 2 else 0x0203
            await target.answer_login(await target.receive(), flags=0, status=status)
            return
        await target.login()
        command = await target.serve_until_read()
        await target.data(command, wanted(command), ends=True)

    async with (
        fake_target(script) as portal,
        open_reader(portal, TARGET, None, settings(), pause_s=0.0) as reader,
    ):
        assert await reader.read(0, 512) == content(0, 1)
        assert await reader.read(512, 512) == content(1, 1)
        assert logins == 3
        assert await reader.read(1024, 512) == content(2, 1)
        assert logins == 4
        with pytest.raises(LoginRefusedError, match="0x0203"):
            await reader.read(0, 512)
        assert reader.logins == 3
