# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source that holds the key of its VM, and lies: named in the log, refused or cut off, nothing changed, others undisturbed."""

from __future__ import annotations

import logging
import random
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
import trio
import trio.testing
import zstandard

from receiver.service import strangers
from replicator.domain.model import PushKind
from replicator.phcbt import StreamHeader
from replicator.phcbt.format import Codec, Kind, RecordHead, header_length
from replicator.phcbt.track import Counts, EndFields, StreamState, encode_end
from replicator.wire import messages as m
from tests.limits import HANG_S
from tests.phcbt.support import raw_block
from tests.push.lab import CHUNK, GRAIN, VM, RawPush, RawSource, raw_push, raw_source, state_of
from tests.sites import ReceiverSite, receiver_site

SIZE: Final = 200_000
CONTENT: Final = random.Random(1).randbytes(SIZE)
OTHER: Final = random.Random(2).randbytes(SIZE)
OTHER_VM: Final = UUID("00000000-0000-4000-8000-000000000001")
MIB: Final = 1 << 20
change = msgspec.structs.replace

Act = Callable[["Stage"], Awaitable[None]]
Records = Callable[["Stage"], list[bytes]]


@dataclass
class Stage:
    """A receiver with a point of "web", and a session that is about to push its next one."""

    rx: ReceiverSite
    source: RawSource
    push: RawPush
    records: list[bytes] = field(default_factory=list)

    async def open(self) -> None:
        assert isinstance(await self.source.ask(self.push.opened), m.Ready)

    @property
    def header(self) -> StreamHeader:
        raw = self.push.stream
        return StreamHeader.decode(raw[: header_length(raw[:12])])

    async def stream(self) -> None:
        """Open, and the right header with other records."""
        await self.open()
        data = self.header.encode() + b"".join(self.records)
        for at in range(0, len(data), MIB):
            await self.source.data(0, at, data[at : at + MIB])


@dataclass(frozen=True)
class Lie:
    """``act``, and then: the refusal's code, or None where the session is cut off; what the log says of it.

    ``records``: those of a stream, for ``Stage.stream``.
    """

    act: Act
    code: m.RefusalCode | None
    log: str
    records: Records = lambda _: []


async def kept(rx: ReceiverSite) -> dict[str, Any]:
    """What the receiver keeps of "web": its log, its files and its push that has not ended."""
    state = await state_of(rx)
    return {n: v for n, v in state.items() if not n.endswith(" db") and str(OTHER_VM) not in n}


def committed(state: dict[str, Any]) -> dict[str, Any]:
    """The same without the push."""
    return {n: v for n, v in state.items() if not n.startswith("push of ") and ".partial" not in n}


def listing(folder: Path) -> list[str]:
    """All that lies about where the receiver's state lies."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if ".partial" not in str(path)
    )


@asynccontextmanager
async def bystander(rx: ReceiverSite) -> AsyncIterator[None]:
    """Another VM, whose push begins before and ends after what happens inside."""
    push = raw_push(OTHER, push_id="b" * 16, vm=OTHER_VM)
    opened = change(push.opened, vm=str(OTHER_VM), name="db")
    half = len(push.stream) // 2
    async with raw_source(rx.port) as source:
        assert isinstance(await source.ask(opened), m.Ready)
        await source.data(0, 0, push.stream[:half])
        yield
        await source.data(0, half, push.stream[half:])
        assert isinstance(await source.ask(push.finish), m.Committed)


@asynccontextmanager
async def staged(tmp_path: Path) -> AsyncIterator[Stage]:
    async with receiver_site(tmp_path / "rx", dr_timeout="600") as rx:
        async with raw_source(rx.port) as source:
            assert isinstance(await raw_push(CONTENT).send(source), m.Committed)
        await rx.settled()
        async with raw_source(rx.port) as source:
            yield Stage(rx, source, raw_push(OTHER, rx.store.vm.newest, push_id="2" * 16))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@contextmanager
def little_memory(limit: int) -> Iterator[None]:
    """Python's own memory grows by no more than ``limit`` at any time inside."""
    tracemalloc.start()
    try:
        yield
        grown = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert grown < limit


# Streams

G, NONE, ZSTD = GRAIN, Codec.NONE, Codec.ZSTD


def block(stage: Stage, offset: int, length: int, **fields: Any) -> bytes:
    """A block whose checks are right, whatever else is wrong with it."""
    return raw_block(stage.header, offset, length, **fields)


def zeros(stage: Stage, offset: int, length: int) -> bytes:
    return block(stage, offset, length, kind=Kind.ZERO)


def packed(stage: Stage, frame: bytes, length: int = 4 * G) -> bytes:
    """A compressed block of ``length`` plain zeros, as it says; ``frame`` is what is in it."""
    digests = stage.header.algorithm.digest_grains(bytes(length), G)
    return block(stage, 0, length, codec=ZSTD, payload=frame, digests=digests)


def frame_of(length: int, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(bytes(length))


def claiming(frame: bytes, length: int) -> bytes:
    """The frame with another content size in its header: 4 bytes behind the descriptor and the window's (RFC 8878, 3.1.1.1)."""
    assert (frame[4] >> 6, frame[4] >> 5 & 1) == (2, 0)
    return frame[:6] + length.to_bytes(4, "little") + frame[10:]


def index(entries: int) -> bytes:
    payload = bytes(24 * entries)
    head = RecordHead.build(
        Kind.INDEX, NONE, len(payload), offset=0, length=entries, guarded=payload
    )
    return head.raw + payload


DAMAGED: Final = "damaged-stream"
STREAMS: Final[dict[str, tuple[Records, str]]] = {
    "beyond the end": (lambda s: [block(s, 48 * G, 4 * G, payload=b"x" * 4 * G)], "on a disk of 200000"),
    "zeros beyond the end": (lambda s: [zeros(s, 1 << 40, G)], "on a disk of 200000"),
    "offset at the limit": (lambda s: [zeros(s, (1 << 64) - G, G)], "on a disk of 200000"),
    "not at a grain": (lambda s: [block(s, 100, G)], "at disk byte 100"),
    "ends inside a grain": (lambda s: [block(s, 0, 100)], "ends inside a grain"),
    "longer than a chunk": (lambda s: [zeros(s, 0, CHUNK + G)], "block of"),
    "of nothing": (lambda s: [zeros(s, 0, 0)], "block of 0 bytes"),
    "backwards": (lambda s: [zeros(s, 8 * G, G), zeros(s, 0, G)], "block"),
    "twice": (lambda s: [zeros(s, 8 * G, G), zeros(s, 8 * G, G)], "block"),
    "a bomb that says so": (lambda s: [packed(s, frame_of(64 * MIB))], "zstd frame of 67108864 bytes"),
    "a bomb that says nothing": (
        lambda s: [packed(s, frame_of(64 * MIB, write_content_size=False))],
        "zstd frame of 18446744073709551615 bytes",
    ),
    "a bomb that says less": (
        lambda s: [packed(s, claiming(frame_of(64 * MIB), 4 * G))],
        "does not decompress",
    ),
    "a frame that holds less": (
        lambda s: [packed(s, frame_of(3 * G)[:5] + (4 * G - 256).to_bytes(2, "little") + frame_of(3 * G)[7:])],
        "does not decompress",
    ),
    "a frame behind the frame": (lambda s: [packed(s, frame_of(4 * G) * 2)], "does not decompress"),
    "a frame to be skipped": (
        lambda s: [packed(s, b"\x50\x2a\x4d\x18" + (1 << 10).to_bytes(4, "little") + bytes(1 << 10))],
        "not a zstd frame",
    ),
    "no frame": (lambda s: [packed(s, b"x" * 100)], "not a zstd frame"),
    "other content than its digests": (lambda s: [block(s, 0, G, digests=b"\1" * 16)], "do not have their digest"),
    "an index that is not due": (lambda s: [zeros(s, 0, G), index(1)], "index"),
    "nothing but indexes": (lambda _: [index(1024)] * 50, "index"),
    "an index that says it is endless": (
        lambda _: [RecordHead.build(Kind.INDEX, NONE, (1 << 32) - 1, offset=0, length=1 << 60, guarded=b"").raw],
        "index of",
    ),
    "an end that counts wrong": (
        lambda _: [encode_end(EndFields(Counts(zero_records=9), 0, bytes(32)))],
        "end record does not fit",
    ),
    "an unknown record": (lambda _: [b"\x09" + bytes(39)], "unknown record kind 9"),
}  # fmt: skip


async def _finish_at_once(stage: Stage) -> None:
    await stage.open()
    await stage.source.say(stage.push.finish)


async def _finish_another(stage: Stage) -> None:
    await stage.open()
    await stage.source.say(change(stage.push.finish, push_id="9" * 16))


async def _finish_without_open(stage: Stage) -> None:
    await stage.source.say(stage.push.finish)


async def _data_without_open(stage: Stage) -> None:
    await stage.source.data(0, 0, stage.push.stream)


async def _query_inside(stage: Stage) -> None:
    await stage.open()
    await stage.source.say(m.Query(str(VM), "web"))


async def _another_disk(stage: Stage) -> None:
    await stage.open()
    await stage.source.data(7, 0, stage.push.stream)


async def _a_gap(stage: Stage) -> None:
    await stage.open()
    await stage.source.data(0, 5, stage.push.stream)


async def _more_behind_the_end(stage: Stage) -> None:
    await stage.open()
    await stage.source.data(0, 0, stage.push.stream + b"x")


def _finishes(**fields: Any) -> Act:
    """A stream that is right, and another end."""

    async def act(stage: Stage) -> None:
        await stage.open()
        await stage.source.data(0, 0, stage.push.stream)
        (final,) = stage.push.finish.disks
        disk = {name: value for name, value in fields.items() if name in ("root", "stream_root")}
        vm = {"root": fields["vm_root"]} if "vm_root" in fields else {}
        await stage.source.say(change(stage.push.finish, disks=(change(final, **disk),), **vm))

    return act


ROOT: Final = b"\7" * 32
LIES: Final[dict[str, Lie]] = {
    **{name: Lie(Stage.stream, DAMAGED, log, records) for name, (records, log) in STREAMS.items()},
    "another stream root": Lie(_finishes(stream_root=ROOT), "root-mismatch", "another stream was sent"),
    "another image root": Lie(_finishes(root=ROOT), "root-mismatch", "disk-0: the two sides"),
    "another root of the VM": Lie(_finishes(vm_root=ROOT), "root-mismatch", "the two sides"),
    "an end before data": Lie(_finish_at_once, DAMAGED, "the stream has no end"),
    "the end of another push": Lie(_finish_another, None, "was not opened"),
    "an end without an Open": Lie(_finish_without_open, None, "Finish is not allowed while idle"),
    "data without an Open": Lie(_data_without_open, None, "Data is not allowed while idle"),
    "a question inside a push": Lie(_query_inside, None, "Query is not allowed while pushing"),
    "data of another disk": Lie(_another_disk, None, "data of disk 7, which the push does not have"),
    "a gap": Lie(_a_gap, None, "data at 5, expected at 0"),
    "data behind the end": Lie(_more_behind_the_end, DAMAGED, "bytes after the end record"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_in_a_push(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    lie = LIES[name]
    async with staged(tmp_path) as stage, bystander(stage.rx):
        before, there = await kept(stage.rx), listing(tmp_path)
        caplog.clear()
        stage.records = lie.records(stage)
        with little_memory(16 * MIB):
            await lie.act(stage)
            answer = await stage.source.hear()
        if lie.code is None:
            assert answer is None
        else:
            assert isinstance(answer, m.Refused)
            assert answer.code == lie.code
            assert str(tmp_path) not in answer.reason
        (line,) = told(caplog)
        assert lie.log in line
        # Who: the VM as it is called here, or the host of a session that named none.
        assert line.startswith("web: push refused" if lie.code else "127.0.0.1: session ended")
        assert committed(await kept(stage.rx)) == committed(before)
        assert listing(tmp_path) == there
        # The same push, told truly this time, is taken.
        async with raw_source(stage.rx.port) as honest:
            await honest.ask(m.Abandon(str(VM), stage.push.opened.push_id, "it lied"))
            assert await kept(stage.rx) == before
            assert isinstance(await stage.push.send(honest), m.Committed)
    assert not [record for record in caplog.records if record.exc_info]


# Names

BAD_NAMES: Final = ("../x", "/", "a/b", "a\0b", "a\nb", "a\x1b[2Jb", "", "x" * 300)
BAD_DISKS: Final = (
    "../../disk-0", "/etc/passwd", "disk-0/../x", "disk-0\n", "disk-", "disk-00000", "DISK-0", "disk-0\0",
)  # fmt: skip


async def _cut_off(
    stage: Stage, caplog: pytest.LogCaptureFixture, tmp_path: Path, *said: m.Message
) -> None:
    before, there = await kept(stage.rx), listing(tmp_path)
    caplog.clear()
    await stage.source.say(*said)
    assert await stage.source.ended()
    (line,) = told(caplog)
    assert line.startswith("127.0.0.1: session ended (")
    assert "bad message from the source" in line
    assert (await kept(stage.rx), listing(tmp_path)) == (before, there)


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_vm_called_like_a_path(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(tmp_path) as stage:
        await _cut_off(stage, caplog, tmp_path, m.Query(str(VM), name))
    async with (
        receiver_site(tmp_path / "rx", dr_timeout="600") as rx,
        raw_source(rx.port) as source,
    ):
        await _cut_off(
            Stage(rx, source, stage.push), caplog, tmp_path, change(stage.push.opened, name=name)
        )


@pytest.mark.parametrize("disk", BAD_DISKS)
async def test_a_disk_called_like_a_path(
    tmp_path: Path, disk: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(tmp_path) as stage:
        (right,) = stage.push.opened.disks
        wrong = change(stage.push.opened, disks=(change(right, disk=disk),))
        await _cut_off(stage, caplog, tmp_path, wrong)


@pytest.mark.parametrize("vm", ["../x", "", str(VM).upper(), str(VM) + "\n", "{" + str(VM) + "}"])
async def test_a_vm_whose_uuid_is_none(
    tmp_path: Path, vm: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(tmp_path) as stage:
        await _cut_off(stage, caplog, tmp_path, m.Query(vm, "web"))


async def test_names_that_are_allowed_make_no_paths(tmp_path: Path) -> None:
    """A VM called "..", a disk whose identity is a path: folders are named by UUID and by number."""
    async with (
        receiver_site(tmp_path / "rx", dr_timeout="600") as rx,
        raw_source(rx.port) as source,
    ):
        there = listing(tmp_path)
        push = raw_push(CONTENT)
        (disk,) = push.opened.disks
        odd = change(push.opened, name="..", disks=(change(disk, identity="../../etc/passwd\n\0"),))
        assert isinstance(await RawPush(odd, push.stream, push.finish).send(source), m.Committed)
        await rx.settled()
        new = set(listing(tmp_path)) - set(there)
        assert new
        assert all(path.startswith((f"rx/vms/{VM}", "rx/vms", "rx/events")) for path in new)


# Sizes, floods, and slowness


async def test_a_push_of_256_huge_disks(tmp_path: Path) -> None:
    """2^58 bytes are claimed; files without content are made, and go with the push."""
    async with staged(tmp_path) as stage, bystander(stage.rx):
        before = await kept(stage.rx)
        disks = tuple(m.OpenDisk(f"disk-{n}", f"id-{n}", 1 << 50, 2, 0) for n in range(256))
        seed = change(
            stage.push.opened, kind=PushKind.SEED, parent_root=None, disks=disks, push_id="5" * 16
        )
        with little_memory(16 * MIB):
            answer = await stage.source.ask(seed)
            assert isinstance(answer, m.Ready)
            assert answer.positions == (0,) * 256
            partial = stage.rx.stores.find("web").paths.partial(2)
            assert sum(file.stat().st_blocks for file in partial.iterdir()) == 0
            # Not one of them can be ended without its stream.
            finals = (m.FinalDisk(ROOT, ROOT),) * 256
            refused = await stage.source.ask(m.Finish(seed.push_id, ROOT, finals, 1))
        assert isinstance(refused, m.Refused)
        assert await kept(stage.rx) == before


async def test_endless_zeros_and_tiny_records(tmp_path: Path) -> None:
    """A record for each grain, as many as the disk may have: they cost no memory, and the disk's end is the end."""
    grains, more = 60_000, 40
    async with staged(tmp_path) as stage, bystander(stage.rx):
        before = await kept(stage.rx)
        size = grains * G
        header = change_header(stage.header, disk_size=size)
        (disk,) = stage.push.opened.disks
        opened = change(stage.push.opened, disks=(change(disk, size=size),))
        stage.push = RawPush(opened, header.encode(), stage.push.finish)
        run = [zeros(stage, at * G, G) for at in range(grains + more)]
        with_indexes = stream_with_indexes(header, run)
        with little_memory(48 * MIB):
            assert isinstance(await stage.source.ask(opened), m.Ready)
            sent = 0
            for piece in with_indexes:
                await stage.source.data(0, sent, piece)
                sent += len(piece)
            answer = await stage.source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == DAMAGED
        assert f"on a disk of {size}" in answer.reason
        assert await kept(stage.rx) == before


def change_header(header: StreamHeader, **fields: Any) -> StreamHeader:
    names = ("algorithm", "grain", "chunk", "disk_size", "vm", "base_point", "target_point", "base_root", "disk_id")  # fmt: skip
    return StreamHeader(**{name: getattr(header, name) for name in names} | fields)


def stream_with_indexes(header: StreamHeader, blocks: list[bytes]) -> list[bytes]:
    """The stream, an index where one is due as the format says, in pieces of a megabyte; blocks beyond the disk at its end."""
    state, whole = StreamState(header), bytearray(header.encode())
    for raw in blocks:
        head = RecordHead.decode(raw[:40], state.position)
        if head.end <= header.disk_size:
            state.add_block(head, b"")
        whole += raw
        if state.index_due:
            whole += state.index_record()
            state.add_index()
    return [bytes(whole[at : at + MIB]) for at in range(0, len(whole), MIB)]


async def test_records_begun_on_many_disks_and_never_ended(tmp_path: Path) -> None:
    """Each disk's stream stops within a record of 16 MiB: what is kept of them all is bounded."""
    disks, chunk = 40, 16 * MIB
    async with staged(tmp_path) as stage, bystander(stage.rx):
        before = await kept(stage.rx)
        claimed = tuple(m.OpenDisk(f"disk-{n}", f"id-{n}", chunk, 2, 0) for n in range(disks))
        seed = change(
            stage.push.opened, kind=PushKind.SEED, parent_root=None, disks=claimed, push_id="5" * 16
        )
        payload = bytes(chunk - 1) + b"x"
        with little_memory(224 * MIB):
            assert isinstance(await stage.source.ask(seed), m.Ready)
            header = change_header(
                stage.header, chunk=chunk, disk_size=chunk, base_point=0, base_root=bytes(32)
            )
            record = raw_block(header, 0, chunk, payload=payload)[: chunk // 2]
            answer = None
            for number in range(disks):
                data = change_header(header, disk_id=f"disk-{number}").encode() + record
                for at in range(0, len(data), MIB):
                    await stage.source.data(number, at, data[at : at + MIB])
            answer = await stage.source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == "bad-request"
        assert await kept(stage.rx) == before


async def test_many_opens_in_one_session_leave_one_push(tmp_path: Path) -> None:
    """Each takes the place of the one before; the last is all that is left, and is forgotten when it is given up."""
    async with staged(tmp_path) as stage:
        before = await kept(stage.rx)
        for push_id in (f"{number:016x}" for number in range(20)):
            answer = await stage.source.ask(change(stage.push.opened, push_id=push_id))
            assert answer == m.Ready(push_id, (0,))
        await stage.source.ask(m.Abandon(str(VM), f"{19:016x}", "enough"))
        assert await kept(stage.rx) == before


async def test_a_push_in_pieces_of_one_byte(tmp_path: Path) -> None:
    """As slow as it can be: it costs no memory, and it is a push."""
    content = bytes(10 * G) + b"x" * 100
    async with staged(tmp_path) as stage, bystander(stage.rx):
        seed = raw_push(content, push_id="5" * 16, target_point=2)
        opened = change(
            seed.opened, point=2, parent=1, disks=(change(seed.opened.disks[0], since=2),)
        )
        with little_memory(16 * MIB):
            assert isinstance(await stage.source.ask(opened), m.Ready)
            for at, byte in enumerate(seed.stream):
                await stage.source.data(0, at, bytes([byte]))
            assert isinstance(await stage.source.ask(seed.finish), m.Committed)


def floods() -> dict[str, Callable[[ReceiverSite], m.Message]]:
    return {
        "pings": lambda _: m.Ping(),
        "questions": lambda _: m.Query(str(VM), "web"),
        "descriptions": lambda _: m.Describe(str(VM), "web"),
        "pages": lambda rx: m.AskPages(
            str(VM), "web", "disk-0", newest_root(rx), 0, (0,) * m.PAGES_ASKED_MAX
        ),
    }


def newest_root(rx: ReceiverSite) -> bytes:
    assert rx.store.vm.newest is not None
    return rx.store.vm.newest.disks[0].root


async def narrow_listener() -> trio.SocketListener:
    """What the kernel keeps for either side is little, so that a side that does not read is felt at once."""
    sock = trio.socket.socket()
    for option in (trio.socket.SO_SNDBUF, trio.socket.SO_RCVBUF):
        sock.setsockopt(trio.socket.SOL_SOCKET, option, 16384)
    await sock.bind(("127.0.0.1", 0))
    sock.listen(10)
    return trio.SocketListener(sock)


@pytest.mark.parametrize("what", floods())
async def test_a_flood_whose_answers_are_not_read(tmp_path: Path, what: str) -> None:
    """The receiver stops reading: nothing gathers, and it serves others."""
    listener = await narrow_listener()
    async with receiver_site(tmp_path / "rx", dr_timeout="600", listeners=[listener]) as rx:
        async with raw_source(rx.port) as source:
            assert isinstance(await raw_push(CONTENT).send(source), m.Committed)
        await rx.settled()
        before = await kept(rx)
        body, said = m.encode(floods()[what](rx)), 0

        async def flood(source: RawSource) -> None:
            nonlocal said
            while True:
                await source.stream.send(m.CONTROL, body)
                said += 1

        async with raw_source(rx.port) as source, trio.open_nursery() as nursery:
            with little_memory(16 * MIB):
                nursery.start_soon(flood, source)
                with trio.fail_after(HANG_S):
                    await trio.testing.wait_all_tasks_blocked(0.05)
                stopped = said
                async with bystander(rx):
                    pass
            assert said == stopped
            nursery.cancel_scope.cancel()
        assert await kept(rx) == before
        async with raw_source(rx.port) as source:
            assert isinstance(await source.ask(m.Query(str(VM), "web")), m.VmState)


# Digests of a point, and doubts (a resync)


ODD_ASKS: Final[dict[str, tuple[m.RefusalCode | None, dict[str, Any]]]] = {
    "a level that is not there": ("bad-request", {"level": 4}),
    "a disk that is not there": ("wrong-parent", {"disk": "disk-9"}),
    "a root of another time": ("wrong-parent", {"root": ROOT}),
    "a disk like a path": (None, {"disk": "../../disk-0"}),
    "a level below none": (None, {"level": -1}),
    "too many pages": (None, {"indexes": (0,) * (m.PAGES_ASKED_MAX + 1)}),
}


@pytest.mark.parametrize("name", ODD_ASKS)
async def test_questions_about_digests(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, fields = ODD_ASKS[name]
    async with staged(tmp_path) as stage, bystander(stage.rx):
        before = await kept(stage.rx)
        caplog.clear()
        newest = stage.rx.stores.find("web").vm.newest
        assert newest is not None
        asked = m.AskPages(str(VM), "web", "disk-0", newest.disks[0].root, 0, (0,))
        answer = await stage.source.ask(change(asked, **fields))
        if code is None:
            assert answer is None
        else:
            assert isinstance(answer, m.Refused)
            assert answer.code == code
        assert len(told(caplog)) == 1
        assert await kept(stage.rx) == before
    assert not [record for record in caplog.records if record.exc_info]


async def test_pages_outside_a_map_are_zeros(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        newest = stage.rx.stores.find("web").vm.newest
        assert newest is not None
        before = await kept(stage.rx)
        described = await stage.source.ask(m.Describe(str(VM), "web"))
        assert isinstance(described, m.Described)
        answered = 0
        for level in range(5):
            far = (1, 1 << 31, 1 << 40)
            asked = m.AskPages(str(VM), "web", "disk-0", newest.disks[0].root, level, far)
            answer = await stage.source.ask(asked)
            if isinstance(answer, m.Pages):
                assert answer.pages == (b"",) * 3
                assert await stage.source.hear() == m.PagesEnd()
                answered += 1
            else:
                assert isinstance(answer, m.Refused)
        assert answered
        assert await kept(stage.rx) == before


async def test_a_flood_of_doubts_is_one_event(tmp_path: Path) -> None:
    """About disks, places and points that are not there as well: it is the source's own chain that it doubts."""
    async with staged(tmp_path) as stage:
        for number in range(50):
            doubt = m.Doubt(str(VM), "web", f"disk-{number}", 1 << 50, 1 << 48)
            assert isinstance(await stage.source.ask(doubt), m.VmState)
        after = await kept(stage.rx)
        events: list[str] = after["events of web"]
        assert len(events) == len(set(events)) + events.count("DeltaApplied") - 1
        assert await stage.rx.read(1) == CONTENT


# Before a key is proved


async def test_bytes_that_are_no_handshake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes first, and however it goes on: one line with the host, and the next is served."""
    noise = random.Random(4)
    starts = [
        b"\x16",
        b"R",
        b"RPLW",
        b"RPLW\x01\x00\x04\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80",
        b"",
    ]
    monkeypatch.setattr(strangers, "EVERY_S", 0.0)  # each of them has its line
    async with receiver_site(tmp_path / "rx", dr_timeout="600") as rx:
        before = await state_of(rx)
        for start in starts:
            caplog.clear()
            async with await trio.open_tcp_stream("127.0.0.1", rx.port) as junk:
                with trio.fail_after(HANG_S):
                    try:
                        await junk.send_all(start + noise.randbytes(2000))
                        await junk.send_eof()
                        while await junk.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
            async with raw_source(rx.port) as source:
                assert isinstance(await source.ask(m.Query(str(VM), "web")), m.VmState)
            (line,) = told(caplog)
            assert line.startswith("127.0.0.1: ")
        assert await state_of(rx) == before
    assert not [record for record in caplog.records if record.exc_info]
