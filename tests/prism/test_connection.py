# SPDX-License-Identifier: AGPL-3.0-or-later
"""The HTTP client against a server of its own, over real sockets and TLS, and in memory where time matters."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from replicator.errors import UsageError
from replicator.prism import connection
from replicator.prism.connection import (
    PARALLEL_MAX,
    Connections,
    HttpRequest,
    NotSentError,
    make_tls,
)
from replicator.prism.errors import PrismAnswerError, PrismTlsError, PrismUnreachableError
from tests.limits import HANG_S
from tests.prism.lab import PC, Asked, Handler, Said, Script, ca_file, in_turn, server_tls

GET = HttpRequest("GET", "/x", [("Host", "h")])


@asynccontextmanager
async def listening(
    handler: Handler, *names: str, plain: bool = False
) -> AsyncGenerator[tuple[int, Script], None]:
    async with trio.open_nursery() as nursery:
        script = Script(nursery, handler)
        context = server_tls(*names)

        async def serve(stream: trio.SocketStream) -> None:
            if plain:
                await stream.send_all(b"220 some other service\r\n")
                return
            script.connections += 1
            tls = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            try:
                await script._serve(tls, "")
            except trio.BrokenResourceError:
                pass
            finally:
                await trio.aclose_forcefully(tls)

        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1], script
        nursery.cancel_scope.cancel()


def client(port: int, tls: ssl.SSLContext, host: str = "127.0.0.1") -> Connections:
    return Connections(host, port, tls, what="Prism", connect_timeout_s=HANG_S)


async def test_connections_are_kept_and_are_few(tmp_path: Path) -> None:
    together = 0
    most = 0
    go = trio.Event()

    async def handler(_: Asked) -> Said:
        nonlocal together, most
        together += 1
        most = max(most, together)
        if together == PARALLEL_MAX:
            go.set()
        await go.wait()
        together -= 1
        return Said(200, {"fine": True})

    with trio.fail_after(HANG_S):
        async with listening(handler, "127.0.0.1") as (port, script):
            pool = client(port, make_tls(ca_file(tmp_path), insecure=False))
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(partial(pool.exchange, GET, timeout_s=HANG_S))
            answer = await pool.exchange(GET, timeout_s=HANG_S)
            await pool.aclose()
    assert answer.body == b'{"fine":true}'
    assert most == PARALLEL_MAX
    assert script.connections == PARALLEL_MAX
    assert len(script.asked) == 21


async def test_a_certificate_of_nobody_known_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with listening(in_turn(Said()), "127.0.0.1") as (port, script):
            pool = client(port, make_tls(None, insecure=False))
            with pytest.raises(PrismTlsError) as caught:
                await pool.exchange(GET, timeout_s=HANG_S)
            lax = client(port, make_tls(None, insecure=True))
            assert (await lax.exchange(GET, timeout_s=HANG_S)).status == 200
            await lax.aclose()
    del tmp_path
    assert "prism_ca_cert" in str(caught.value)
    assert "prism_insecure" in str(caught.value)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert len(script.asked) == 1


async def test_a_certificate_of_another_host_is_refused(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with listening(in_turn(Said()), "other.example.test") as (port, script):
            pool = client(port, make_tls(ca_file(tmp_path), insecure=False))
            with pytest.raises(PrismTlsError, match=r"127\.0\.0\.1"):
                await pool.exchange(GET, timeout_s=HANG_S)
    assert script.asked == []


async def test_what_is_not_tls_is_told_from_a_bad_certificate(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with listening(in_turn(Said()), "127.0.0.1", plain=True) as (port, _):
            pool = client(port, make_tls(ca_file(tmp_path), insecure=False))
            with pytest.raises(PrismTlsError, match=r"no TLS.*prism_port"):
                await pool.exchange(GET, timeout_s=HANG_S)


async def test_nobody_listening(tmp_path: Path) -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        pool = client(port, make_tls(ca_file(tmp_path), insecure=False))
        with pytest.raises(NotSentError, match="Connection refused"):
            await pool.exchange(GET, timeout_s=HANG_S)


def test_an_authority_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    for name in ("no.pem", "missing.pem"):
        with pytest.raises(UsageError, match="prism_ca_cert"):
            make_tls(tmp_path / name, insecure=False)


@asynccontextmanager
async def in_memory(
    tmp_path: Path, handler: Handler
) -> AsyncGenerator[tuple[Connections, Script], None]:
    async with trio.open_nursery() as nursery:
        script = Script(nursery, handler)
        tls = make_tls(ca_file(tmp_path), insecure=False)
        pool = Connections(PC, 9440, tls, what="Prism", connect_timeout_s=15, dial=script.dial)
        yield pool, script
        await pool.aclose()
        nursery.cancel_scope.cancel()


async def test_a_silent_server_meets_the_deadline(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock

    async def handler(_: Asked) -> Said:
        await trio.sleep_forever()
        raise AssertionError

    async with in_memory(tmp_path, handler) as (pool, _):
        began = trio.current_time()
        with pytest.raises(PrismUnreachableError, match="no answer to GET within 60 s"):
            await pool.exchange(GET, timeout_s=60)
        assert trio.current_time() - began == 60


async def test_a_connection_that_the_server_closed_is_replaced_unseen(tmp_path: Path) -> None:
    async with in_memory(tmp_path, in_turn(Said(200), Said(cut=True), Said(201))) as (pool, script):
        assert (await pool.exchange(GET, timeout_s=HANG_S)).status == 200
        assert (await pool.exchange(GET, timeout_s=HANG_S)).status == 201
        assert len(script.asked) == 3


async def test_what_must_be_sent_once_is_sent_once(tmp_path: Path) -> None:
    """On a kept connection nobody can tell whether the server read the request before it closed."""
    async with in_memory(tmp_path, in_turn(Said(200), Said(cut=True), Said(201))) as (pool, script):
        assert (await pool.exchange(GET, timeout_s=HANG_S)).status == 200
        with pytest.raises(PrismUnreachableError, match="the server ended it"):
            await pool.exchange(GET, timeout_s=HANG_S, once=True)
        assert len(script.asked) == 2


async def test_an_idle_connection_is_not_trusted_for_long(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with in_memory(tmp_path, in_turn(Said(200))) as (pool, script):
        await pool.exchange(GET, timeout_s=60)
        await trio.sleep(connection.IDLE_S - 1)
        await pool.exchange(GET, timeout_s=60)
        assert script.connections == 1
        await trio.sleep(connection.IDLE_S + 1)
        await pool.exchange(GET, timeout_s=60)
        assert script.connections == 2


async def test_a_body_without_end_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BODY_MAX", 1 << 20)
    answer = Said(200, bytes((1 << 20) + 1))
    async with in_memory(tmp_path, in_turn(answer)) as (pool, _):
        with pytest.raises(PrismAnswerError, match="more than 1 MiB"):
            await pool.exchange(GET, timeout_s=HANG_S)


async def whole_file(pool: Connections) -> bytes:
    async with pool.streamed(GET, timeout_s=HANG_S) as (_, pieces):
        return b"".join([piece async for piece in pieces])


async def test_a_file_comes_in_pieces_and_a_cut_is_seen(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    async with in_memory(tmp_path, in_turn(Said(200, data))) as (pool, _):
        async with pool.streamed(GET, timeout_s=HANG_S) as (head, pieces):
            got = b"".join([piece async for piece in pieces])
        assert head.header("content-length") == str(len(data))
        assert got == data
    cut = Said(200, data[:1000], {"content-length": str(len(data))})

    async def serve_short(stream: trio.abc.Stream) -> None:
        tls = trio.SSLStream(stream, server_tls(PC), server_side=True, https_compatible=True)
        await tls.receive_some(65536)
        await tls.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + cut.body)
        await trio.aclose_forcefully(tls)

    async with trio.open_nursery() as nursery:

        async def dial(host: str, port: int) -> trio.abc.Stream:
            del host, port
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(serve_short, theirs)
            return ours

        tls = make_tls(ca_file(tmp_path), insecure=False)
        pool = Connections(PC, 9440, tls, what="Prism", connect_timeout_s=15, dial=dial)
        with pytest.raises(PrismUnreachableError, match="the connection broke"):
            await whole_file(pool)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_request_takes_its_connection_with_it(tmp_path: Path) -> None:
    asked = trio.Event()

    async def handler(request: Asked) -> Said:
        if request.target == "/slow":
            asked.set()
            await trio.sleep_forever()
        return Said(200, request.target.encode())

    async with in_memory(tmp_path, handler) as (pool, script):
        slow = HttpRequest("GET", "/slow", [("Host", "h")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pool.exchange, slow, timeout_s=HANG_S))
            await asked.wait()
            nursery.cancel_scope.cancel()
        assert (await pool.exchange(GET, timeout_s=HANG_S)).body == b"/x"
        assert script.connections == 2
