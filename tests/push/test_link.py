# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a source reaches its receiver: how long it tries, what is put around the connection, what is closed again."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from replicator.config import check
from replicator.credentials import Proof, SourceCredentials
from replicator.errors import AuthenticationError, UsageError
from replicator.push.connection import ConnectionLostError
from replicator.push.link import CONNECT_S, RECONNECT_S, UNSENT_BYTES, Link, check_congestion

CONFIG = check({"dr_host": "dr.example", "dr_auth_token": f"{'ab' * 32},{'cd' * 32}"})


class Network:
    """Connections that come, or hang; proofs that are taken, refused, or hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reachable = True
        self.answers: list[bool | type[Exception]] = []
        self.transports: list[trio.abc.Stream] = []
        self.deadlines_s: list[float] = []
        monkeypatch.setattr(trio, "open_tcp_stream", self._open)
        self.credentials = _Credentials(self)

    async def _open(self, host: str, port: int) -> trio.abc.Stream:
        assert (host, port) == ("dr.example", 9848)
        if not self.reachable:
            await trio.sleep_forever()
        ours, theirs = trio.testing.memory_stream_pair()
        self.transports.append(theirs)
        return ours


class _Proof:
    name = "the key of a test"

    def __init__(self, network: Network) -> None:
        self._network = network

    async def prove(
        self, transport: trio.abc.Stream, *, deadline_s: float, idle_timeout_s: float = 0.0
    ) -> trio.abc.Stream:
        del idle_timeout_s
        self._network.deadlines_s.append(deadline_s)
        answer = self._network.answers.pop(0)
        if answer is True:
            return transport
        await transport.aclose()
        assert isinstance(answer, type)
        raise answer("refused")


class _Credentials(SourceCredentials):
    def __init__(self, network: Network) -> None:
        super().__init__(CONFIG)
        self.given = (_Proof(network), _Proof(network))
        self.took: list[Proof] = []

    async def proofs(self) -> Sequence[Proof]:
        return self.given

    def taken(self, proof: Proof) -> None:
        self.took.append(proof)


async def test_the_first_contact_may_take_longer_than_later_ones(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    network = Network(monkeypatch)
    link = Link(CONFIG, network.credentials)

    async def fails_after(limit_s: int) -> None:
        began = autojump_clock.current_time()
        with pytest.raises(
            ConnectionLostError,
            match=f"cannot reach the receiver at dr.example:9848: no answer within {limit_s} s$",
        ):
            async with link.connect():
                pass
        assert autojump_clock.current_time() - began == pytest.approx(limit_s)

    network.reachable = False
    await fails_after(CONNECT_S)
    await fails_after(CONNECT_S)
    network.reachable, network.answers = True, [True, True]
    async with link.connect():
        pass
    network.reachable = False
    await fails_after(RECONNECT_S)
    network.reachable = True
    async with link.connect():
        pass
    assert network.deadlines_s == [pytest.approx(CONNECT_S), pytest.approx(RECONNECT_S)]


async def test_a_proof_that_is_refused_is_followed_by_the_next_on_a_connection_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(monkeypatch)
    link = Link(CONFIG, network.credentials)
    network.answers = [AuthenticationError, True]
    async with link.connect():
        assert len(network.transports) == 2
        assert network.credentials.took == [network.credentials.given[1]]
    network.answers = [AuthenticationError, AuthenticationError]
    with pytest.raises(AuthenticationError):
        async with link.connect():
            pass
    # A line that breaks says nothing of the key: the next one is not for that.
    network.answers = [trio.BrokenResourceError]
    with pytest.raises(ConnectionLostError, match="the line broke while authenticating: refused"):
        async with link.connect():
            pass
    assert network.credentials.took == [network.credentials.given[1]]


async def test_a_throttle_lies_below_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Around:
        def __init__(self) -> None:
            self.made: list[trio.abc.Stream] = []

        def wrap(self, stream: trio.abc.Stream) -> trio.abc.Stream:
            self.made.append(stream)
            return stream

    network, around = Network(monkeypatch), Around()
    network.answers = [AuthenticationError, True]
    async with Link(CONFIG, network.credentials, around).connect():
        assert len(around.made) == 2


async def test_what_the_body_raises_comes_through_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(monkeypatch)
    network.answers = [True]
    error = ValueError("the body's own")
    with pytest.raises(ValueError, match="own") as caught:
        async with Link(CONFIG, network.credentials).connect():
            raise error
    assert caught.value is error
    assert await network.transports[0].receive_some() == b""


def option(stream: trio.SocketStream, name: int) -> bytes:
    found = stream.getsockopt(socket.IPPROTO_TCP, name, 16)
    assert isinstance(found, bytes)
    return found


async def tuned(monkeypatch: pytest.MonkeyPatch, congestion: str) -> trio.SocketStream:
    """A real connection as a link has set it."""
    network = Network(monkeypatch)
    made: list[trio.SocketStream] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        opened = trio.socket.socket()
        await opened.connect(("127.0.0.1", port))

        async def connect(*_: object) -> trio.SocketStream:
            await trio.lowlevel.checkpoint()
            made.append(trio.SocketStream(opened))
            return made[0]

        async def stays_open(_: object) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(trio, "open_tcp_stream", connect)
        values = {"dr_host": "dr.example", "dr_auth_token": "ab" * 32, "dr_congestion": congestion}
        network.answers = [trio.BrokenResourceError]
        monkeypatch.setattr(trio.SocketStream, "aclose", stays_open)
        with pytest.raises(ConnectionLostError):
            async with Link(check(values), network.credentials).connect():
                pass
    return made[0]


@pytest.mark.parametrize("congestion", ["auto", "system", "reno"])
async def test_tcp_is_told_what_a_long_push_wants(
    monkeypatch: pytest.MonkeyPatch, congestion: str
) -> None:
    settings = Path("/proc/sys/net/ipv4")
    own = (settings / "tcp_congestion_control").read_text().strip()
    available = (settings / "tcp_available_congestion_control").read_text().split()
    stream = await tuned(monkeypatch, congestion)
    with stream.socket:
        used = option(stream, socket.TCP_CONGESTION).rstrip(b"\0").decode()
        unsent = option(stream, socket.TCP_NOTSENT_LOWAT)
    assert int.from_bytes(unsent[:4], "little") == UNSENT_BYTES
    auto = "bbr" if "bbr" in available else own
    assert used == {"auto": auto, "system": own, "reno": "reno"}[congestion]


def test_a_congestion_control_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    for name in ("auto", "system", "reno"):
        check_congestion(name)
    with pytest.raises(UsageError, match=r"dr_congestion: .* use nonesuch .*allowed: .*reno"):
        check_congestion("nonesuch")
