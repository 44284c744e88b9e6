# SPDX-License-Identifier: AGPL-3.0-or-later
"""A file on its way to Prism: its bytes and digest, and servers that break, stall, or refuse in the middle of it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from replicator.errors import RefusedError, SourceError
from replicator.prism.endpoint import Hosts
from replicator.prism.errors import PrismPermissionError, PrismUnreachableError
from replicator.prism.settings import Waits
from replicator.prism.upload import open_upload
from tests.limits import HANG_S
from tests.prism.lab import PC, server_tls, settings
from tests.prism_restore.lab_restore import MIB, SIZE, sparse_file

Serve = Callable[[trio.SSLStream[trio.abc.Stream]], Awaitable[None]]


@pytest.mark.parametrize("size", [SIZE, 100_000, 9 * MIB])
async def test_bytes_and_digest(size: int, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "disk", size)
    whole = bytearray()
    async with open_upload(path, size) as file:
        assert await file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        async with file.pieces() as pieces:
            async for piece in pieces:
                assert 0 < len(piece) <= MIB
                whole += piece
    assert whole == path.read_bytes()


async def test_a_file_of_another_size(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "disk", SIZE)
    with pytest.raises(RefusedError, match=f"holds {SIZE} bytes, and should hold {SIZE + 1}"):
        async with open_upload(path, SIZE + 1):
            raise AssertionError
    with pytest.raises(SourceError, match="No such file"):
        async with open_upload(tmp_path / "none", SIZE):
            raise AssertionError


async def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * SIZE)
    async with open_upload(path, SIZE) as file:
        path.write_bytes(b"x" * MIB)
        with pytest.raises(SourceError, match="has become shorter"):
            await file.sha256()


@asynccontextmanager
async def _hosts(tmp_path: Path, serve: Serve) -> AsyncGenerator[Hosts, None]:
    """A client whose server does as ``serve`` does with each connection."""
    context = server_tls(PC)

    async def accept(plain: trio.abc.Stream) -> None:
        stream = trio.SSLStream(plain, context, server_side=True, https_compatible=True)
        await serve(stream)

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:

            async def dial(host: str, port: int) -> trio.abc.Stream:
                assert (host, port) == (PC, 9440)
                # As much as a socket's buffers would hold, and no more.
                ours, theirs = trio.testing.lockstep_stream_pair()
                nursery.start_soon(accept, theirs)
                await trio.lowlevel.checkpoint()
                return ours

            hosts = Hosts(settings(tmp_path, waits=Waits(request_s=0.2)), dial=dial)
            try:
                yield hosts
            finally:
                await hosts.aclose()
                nursery.cancel_scope.cancel()


async def _upload(hosts: Hosts, path: Path) -> None:
    async with open_upload(path, SIZE) as file, file.pieces() as pieces:
        await hosts.central.upload("/file", pieces, SIZE, (("X-Test", "1"),), answer_s=0.2)


async def test_a_server_that_takes_no_more(tmp_path: Path) -> None:
    async def serve(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.receive_some(1000)
        await trio.sleep_forever()

    async with _hosts(tmp_path, serve) as hosts:
        with pytest.raises(
            PrismUnreachableError, match=r"nothing more of the file was taken within 0\.2 s"
        ):
            await _upload(hosts, sparse_file(tmp_path / "disk", SIZE))


async def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    async def serve(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        while await stream.receive_some(MIB):
            pass

    async with _hosts(tmp_path, serve) as hosts:
        with pytest.raises(PrismUnreachableError, match=r"no answer to PUT within 0\.2 s"):
            await _upload(hosts, sparse_file(tmp_path / "disk", SIZE))


async def test_a_server_that_says_no_in_the_middle(tmp_path: Path) -> None:
    body = b'{"message_list": [{"message": "not for you", "reason": "ACCESS_DENIED"}]}'

    async def serve(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.receive_some(1000)
        head = f"HTTP/1.1 403 No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await stream.send_all(head.encode() + body)
        await trio.sleep_forever()  # and takes no more

    async with _hosts(tmp_path, serve) as hosts:
        with pytest.raises(PrismPermissionError, match="not for you"):
            await _upload(hosts, sparse_file(tmp_path / "disk", SIZE))


async def test_a_server_that_goes_away(tmp_path: Path) -> None:
    async def serve(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.receive_some(1000)
        await trio.aclose_forcefully(stream)

    async with _hosts(tmp_path, serve) as hosts:
        with pytest.raises(PrismUnreachableError, match="the connection broke during PUT"):
            await _upload(hosts, sparse_file(tmp_path / "disk", SIZE))
