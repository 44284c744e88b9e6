# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import errno
import random
import stat
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.export.nbd_allocation import AllocationCursor
from receiver.export.nbd_server import serve_nbd
from replicator.disk import Extent
from replicator.errors import StateError
from replicator.nbd import protocol
from replicator.nbd.client import open_nbd
from replicator.nbd.protocol import BASE_ALLOCATION, NbdError, StatusExtent
from tests.nbd.views import MemoryView, Served, served

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(3 * MIB + 777)


async def test_reads_of_any_size_side_by_side() -> None:
    async with served({"d": MemoryView(CONTENT)}) as server, open_nbd(server.path, "d") as client:
        assert client.size == len(CONTENT)
        assert client.read_only

        async def one(offset: int, length: int) -> None:
            assert await client.read(offset, length) == CONTENT[offset : offset + length]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0, len(CONTENT))
            nursery.start_soon(one, len(CONTENT) - 1, 1)
            for index in range(60):
                nursery.start_soon(one, index * 50_001, 50_000 + index)
    assert server.errors == []


async def test_zeros_travel_as_holes_and_arrive_as_zeros() -> None:
    content = bytes(2 * MIB) + CONTENT[:MIB] + bytes(MIB)
    async with served({"d": MemoryView(content)}) as server, open_nbd(server.path, "d") as client:
        # The same buffers are used again: what they held before must not show through a hole.
        assert await client.read(2 * MIB, MIB) == CONTENT[:MIB]
        assert await client.read(0, len(content)) == content


async def test_a_read_longer_than_a_block_is_split() -> None:
    content = bytes(40 * MIB) + b"end"
    async with served({"d": MemoryView(content)}) as server, open_nbd(server.path, "d") as client:
        assert await client.read(5, len(content) - 5) == content[5:]


async def test_several_exports() -> None:
    views = {"": MemoryView(b"default"), "a": MemoryView(b"first"), "b": MemoryView(b"second")}
    async with served(views) as server:
        for name, view in views.items():
            async with open_nbd(server.path, name) as client:
                assert await client.read(0, client.size) == view.content
        with pytest.raises(NbdError) as caught:
            async with open_nbd(server.path, "c"):
                pass
        assert caught.value.code == errno.ENOENT


async def test_writes_are_refused_and_the_connection_lives_on() -> None:
    async with served({"d": MemoryView(CONTENT)}) as server, open_nbd(server.path, "d") as client:
        for attempt in (
            client.write(0, bytes(100_000)),
            client.trim(0, 4096),
            client.zero(0, 4096),
        ):
            with pytest.raises(NbdError, match="EPERM") as caught:
                await attempt
            assert caught.value.code == errno.EPERM
        await client.flush()
        assert await client.read(0, 10) == CONTENT[:10]


async def test_a_failed_read_is_an_error_for_the_client_and_is_reported() -> None:
    view = MemoryView(CONTENT, bad=2 * MIB + 5)
    async with served({"d": view}) as server, open_nbd(server.path, "d") as client:
        with pytest.raises(NbdError, match="EIO") as caught:
            await client.read(0, 3 * MIB)
        assert caught.value.code == errno.EIO
        assert server.errors == [("d", 2 * MIB, MIB, "this part is damaged")]
        assert await client.read(0, 2 * MIB) == CONTENT[: 2 * MIB]


async def test_block_status_covers_the_disk() -> None:
    extents = [Extent(512, 1000), Extent(4096, 4096, zero=True), Extent(20_000, 50)]
    view = MemoryView(bytes(30_000), extents)
    expected = [(512, 3), (1000, 0), (18_488, 3), (50, 0), (9950, 3)]
    async with (
        served({"d": view}) as server,
        open_nbd(server.path, "d", contexts=[BASE_ALLOCATION, "qemu:dirty-bitmap:x"]) as client,
    ):
        assert client.contexts == {BASE_ALLOCATION}
        statuses = await client.block_status(0, 30_000, BASE_ALLOCATION)
        assert [(s.length, s.flags) for s in statuses] == expected
        assert await client.block_status(600, 10, BASE_ALLOCATION) == [StatusExtent(600, 10, 0)]
        with pytest.raises(KeyError):
            await client.block_status(0, 1, "qemu:dirty-bitmap:x")


async def test_many_extents_take_several_replies_and_one_walk() -> None:
    count = 5000
    view = MemoryView(bytes(count * 1024), [Extent(i * 1024, 512) for i in range(count)])
    async with (
        served({"d": view}) as server,
        open_nbd(server.path, "d", contexts=[BASE_ALLOCATION]) as client,
    ):
        statuses = await client.block_status(0, view.size, BASE_ALLOCATION)
        assert len(statuses) == 2 * count
        assert view.walks == 1


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), max_size=12),
    st.lists(st.tuples(st.integers(0, 499), st.integers(1, 500), st.integers(1, 4)), max_size=8),
)
def test_status_in_any_order_says_what_the_extents_say(
    gaps: list[tuple[int, int, bool]], questions: list[tuple[int, int, int]]
) -> None:
    extents: list[Extent] = []
    at = 0
    for gap, length, zero in gaps:
        if at + gap + length <= 500:
            extents.append(Extent(at + gap, length, zero))
            at += gap + length
    truth = [3] * 500
    for extent in extents:
        if not extent.zero:
            truth[extent.offset : extent.end] = [0] * extent.length

    async def ask() -> None:
        cursor = AllocationCursor(MemoryView(bytes(500), extents))
        for offset, wanted, limit in questions:
            length = min(wanted, 500 - offset)
            statuses = await cursor.status(offset, length, limit)
            assert 1 <= len(statuses) <= limit
            position = offset
            for status in statuses:
                assert status.offset == position
                position += status.length
                assert truth[status.offset : position] == [status.flags] * status.length
            assert position == offset + length or len(statuses) == limit
        await cursor.aclose()

    trio.run(ask)


async def test_the_socket_is_private_replaces_an_old_one_and_goes() -> None:
    async with served({"d": MemoryView(b"x")}) as server:
        assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
        path = server.path
        async with trio.open_nursery() as nursery:
            # What a killed server leaves: a socket that nobody serves. Here one that is served: the
            # newer wins.
            await nursery.start(_serve, path)
            async with open_nbd(path, "new") as client:
                assert await client.read(0, 1) == b"n"
            nursery.cancel_scope.cancel()
        assert not path.exists()


async def _serve(path: Path, task_status: trio.TaskStatus[None]) -> None:
    await serve_nbd(path, {"new": MemoryView(b"n")}, task_status=task_status)


async def test_a_file_in_the_way_is_left_alone() -> None:
    async with served({"d": MemoryView(b"x")}) as server:
        file = server.path.with_name("file")
        file.write_text("precious")
        with pytest.raises(StateError, match="cannot serve NBD"):
            await serve_nbd(file, {})
        assert file.read_text() == "precious"


async def raw_client(server: Served) -> trio.SocketStream:
    stream = await trio.open_unix_socket(server.path)
    greeting = await receive(stream, protocol.GREETING.size)
    assert protocol.GREETING.unpack(greeting)[0] == protocol.INIT_MAGIC
    return stream


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        assert piece, "the server hung up"
        data += piece
    return data


async def hung_up(stream: trio.SocketStream) -> bool:
    """Whether the server ends the connection; whatever it says before is passed over."""
    try:
        while await stream.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        pass
    return True


def export_name(name: str) -> bytes:
    return protocol.OPTION.pack(protocol.OPTION_MAGIC, 1, len(name)) + name.encode()


async def test_the_oldest_client_reads_without_structured_replies() -> None:
    """EXPORT_NAME with its padding, simple replies, a long read in one reply."""
    content = CONTENT + bytes(MIB)
    async with served({"d": MemoryView(content)}) as server, await raw_client(server) as stream:
        await stream.send_all(protocol.U32.pack(1) + export_name("d"))
        size, flags = protocol.EXPORT_INFO.unpack((await receive(stream, 134))[:10])
        assert size == len(content)
        assert flags & protocol.TransmissionFlag.READ_ONLY
        for cookie, (offset, length) in enumerate(((0, len(content)), (5, 10))):
            request = protocol.Request(0, protocol.Command.READ, cookie, offset, length)
            await stream.send_all(request.encode())
            head = await receive(stream, protocol.SIMPLE_REPLY.size)
            assert protocol.SIMPLE_REPLY.unpack(head) == (protocol.SIMPLE_REPLY_MAGIC, 0, cookie)
            assert await receive(stream, length) == content[offset : offset + length]
        bad = protocol.Request(0, protocol.Command.READ, 9, len(content), 1)
        await stream.send_all(bad.encode())
        head = await receive(stream, protocol.SIMPLE_REPLY.size)
        assert protocol.SIMPLE_REPLY.unpack(head)[1] == errno.EINVAL


async def test_a_read_that_fails_after_its_simple_reply_began_ends_the_connection() -> None:
    view = MemoryView(CONTENT, bad=2 * MIB)
    async with served({"d": view}) as server:
        async with await raw_client(server) as stream:
            await stream.send_all(protocol.U32.pack(3) + export_name("d"))
            await receive(stream, 10)
            request = protocol.Request(0, protocol.Command.READ, 1, 0, 3 * MIB)
            await stream.send_all(request.encode())
            assert await hung_up(stream)
        assert server.errors == [("d", 2 * MIB, MIB, "this part is damaged")]
        await assert_serving(server)


async def assert_serving(server: Served) -> None:
    async with open_nbd(server.path, "d") as client:
        assert await client.read(0, 10) == CONTENT[:10]


def request(command: int, offset: int, length: int, flags: int = 0) -> bytes:
    return protocol.Request(flags, command, 1, offset, length).encode()


READY = protocol.U32.pack(3) + export_name("d")
OPTION_TOO_LONG = protocol.OPTION.pack(protocol.OPTION_MAGIC, 3, 1 << 31)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        protocol.U32.pack(0),
        protocol.U32.pack(0xFF),
        protocol.U32.pack(3) + bytes(64),
        protocol.U32.pack(3) + OPTION_TOO_LONG,
        protocol.U32.pack(3) + export_name("unknown"),
        protocol.U32.pack(3) + protocol.encode_option(protocol.Option.ABORT),
        protocol.U32.pack(3) + protocol.encode_option(protocol.Option.INFO, b"x") * 1000,
        READY + bytes(28),
        READY + request(protocol.Command.WRITE, 0, 0xFFFFFFFF),
        READY + request(protocol.Command.DISC, 0, 0),
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(nonsense: bytes) -> None:
    async with served({"d": MemoryView(CONTENT)}) as server:
        async with await raw_client(server) as stream:
            await stream.send_all(nonsense)
            assert await hung_up(stream)
        await assert_serving(server)


@pytest.mark.parametrize(
    "cut",
    [
        b"",
        b"\0\0",
        READY[:9],
        READY + request(protocol.Command.READ, 0, 3 * MIB),
        READY + request(protocol.Command.READ, 0, 3 * MIB)[:13],
        READY + request(protocol.Command.WRITE, 0, 1000) + bytes(100),
    ],
)
async def test_a_client_that_goes_away_ends_nothing(cut: bytes) -> None:
    async with served({"d": MemoryView(CONTENT)}) as server:
        for _ in range(3):
            stream = await raw_client(server)
            await stream.send_all(cut)
            await stream.aclose()
        await assert_serving(server)


@settings(max_examples=25)
@given(st.data())
def test_fuzzed_clients(data: st.DataObject) -> None:
    """Whatever comes, the server answers the next client."""
    commands = st.builds(
        request, st.integers(0, 9), st.integers(0, 1 << 40), st.integers(0, 1 << 21)
    )
    options = st.builds(
        lambda number, payload: (
            protocol.OPTION.pack(protocol.OPTION_MAGIC, number, len(payload)) + payload
        ),
        st.integers(0, 12),
        st.binary(max_size=40),
    )
    parts = data.draw(st.lists(st.one_of(st.binary(max_size=50), commands, options), max_size=8))
    start = data.draw(st.sampled_from([b"", protocol.U32.pack(3), READY]))

    async def run() -> None:
        async with served({"d": MemoryView(CONTENT)}) as server:
            async with await raw_client(server) as stream:
                try:
                    await stream.send_all(start + b"".join(parts))
                    await stream.send_eof()
                except trio.BrokenResourceError:
                    pass
                assert await hung_up(stream)
            await assert_serving(server)

    trio.run(run)


async def test_more_clients_than_allowed_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.export.nbd_server.CONNECTIONS_MAX", 2)
    async with (
        served({"d": MemoryView(CONTENT)}) as server,
        await raw_client(server),
        await raw_client(server),
    ):
        third = await trio.open_unix_socket(server.path)
        assert await hung_up(third)
        await third.aclose()
