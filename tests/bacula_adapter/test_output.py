# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a handler may put out, and what Bacula's protocol cannot carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend.dialogue import Dialogue, State
from bacula_adapter.backend.interface import BackupOutput, FileEntry
from bacula_adapter.backend.messages import MessageQueue, Redactor
from bacula_adapter.backend.output import ADDRESSED_PIECE, OBJECT_MAX, PLAIN_PIECE, Output
from bacula_adapter.backend.packets import PAYLOAD_MAX, Packet, PacketReader
from bacula_adapter.backend.pipes import Bytes, PipeWriter
from bacula_adapter.backend.speaking import Speaker
from tests.bacula_adapter.fakes import IMAGE


class Sink(PipeWriter):
    """Keeps what is written."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, parts: list[Bytes]) -> None:  # type: ignore[override]
        self.data += b"".join(parts)

    def packets(self) -> list[Packet]:
        return list(PacketReader().feed(bytes(self.data)))


def output(*, addressed: bool = True) -> tuple[Output, Sink]:
    dialogue, sink = Dialogue(), Sink()
    dialogue.state, dialogue.extended = State.BACKUP, True
    speaker = Speaker(dialogue, sink, MessageQueue(Redactor(), lambda: None))
    return Output(speaker, addressed=addressed, options=True), sink


ENTRY = FileEntry(name=IMAGE, size=100, mtime_s=0, addressed=True)
PLAIN = FileEntry(name=IMAGE, size=100, mtime_s=0)


async def begun(entry: FileEntry) -> Output:
    out, _ = output()
    await out.begin(entry)
    return out


@pytest.mark.parametrize("entry", [ENTRY, PLAIN])
async def test_bytes_outside_of_a_file(entry: FileEntry) -> None:
    for offset, length in ((99, 2), (100, 1), (0, 101), (1 << 62, 1)):
        with pytest.raises(ValueError, match="overlap or are not in the file"):
            await (await begun(entry)).data(offset, bytes(length))
    out = await begun(entry)
    await out.data(10, bytes(10))
    for offset in (0, 19):
        with pytest.raises(ValueError, match="overlap"):
            await out.data(offset, b"x")


async def test_a_plain_file_of_another_size() -> None:
    out = await begun(PLAIN)
    await out.data(0, bytes(99))
    with pytest.raises(ValueError, match="99 bytes instead of 100"):
        await out.end()


async def test_a_plain_file_whose_size_is_known_at_its_end() -> None:
    out, sink = output()
    await out.begin(FileEntry(name=IMAGE, size=0, mtime_s=0))
    await out.data(0, b"abc")
    await out.data(3, b"")
    await out.data(3, b"de")
    await out.end()
    assert [packet.payload for packet in sink.packets() if packet.status == "D"] == [b"abc", b"de"]
    assert (out.files, out.bytes) == (1, 5)


async def test_an_image_that_is_one_hole() -> None:
    out, sink = output()
    await out.begin(ENTRY)
    await out.data(100, b"")
    await out.end()
    assert [packet.status for packet in sink.packets()] == list("CCCCFF")
    plain, sink = output(addressed=False)
    await plain.begin(ENTRY)
    await plain.end()
    assert [packet.status for packet in sink.packets()] == list("CCCFCDF")


async def test_the_order_of_things() -> None:
    out = await begun(ENTRY)
    with pytest.raises(ValueError, match="begun within another file"):
        await out.begin(ENTRY)
    with pytest.raises(ValueError, match="a restore object within a file"):
        await out.restore_object("x", b"y")
    await out.end()
    for late in (out.end(), out.data(0, b"x")):
        with pytest.raises(ValueError, match="data outside a file"):
            await late
    await out.restore_object("x", b"y")
    with pytest.raises(ValueError, match="after a restore object"):
        await out.begin(ENTRY)


@pytest.mark.parametrize("size", [0, OBJECT_MAX + 1])
async def test_objects_that_bacula_does_not_keep(size: int) -> None:
    out, sink = output()
    with pytest.raises(ValueError, match=f"an object of {size} bytes"):
        await out.restore_object("x", bytes(size))
    assert not sink.data
    await out.restore_object("x", bytes(OBJECT_MAX))
    assert max(len(packet.payload) for packet in sink.packets()) == OBJECT_MAX


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\nb", "a\0b", "x" * 4001])
async def test_names_that_cannot_be_said(name: str) -> None:
    out, sink = output()
    with pytest.raises(ValueError, match="is no name"):
        await out.begin(FileEntry(name=name, size=0, mtime_s=0))
    with pytest.raises(ValueError, match="is no name"):
        await out.restore_object(name, b"x")
    assert not sink.data


@pytest.mark.parametrize("size", [-1, 1 << 63])
async def test_sizes_that_no_file_has(size: int) -> None:
    with pytest.raises(ValueError, match="is no size of a file"):
        await begun(FileEntry(name=IMAGE, size=size, mtime_s=0))


@given(st.data(), st.booleans())
async def test_what_arrives_is_the_image(data: st.DataObject, addressed: bool) -> None:
    size = data.draw(st.integers(1, 3 * PLAIN_PIECE))
    image, at = bytearray(size), 0
    out, sink = output(addressed=addressed)
    await out.begin(FileEntry(name=IMAGE, size=size, mtime_s=0, addressed=True))
    for start in sorted(data.draw(st.lists(st.integers(0, size), max_size=5))):
        length = data.draw(st.integers(0, size - max(start, at)))
        image[max(start, at) : max(start, at) + length] = b"x" * length
        await out.data(max(start, at), memoryview(bytearray(b"x" * length)))
        at = max(start, at) + length
    await out.end()
    arrived, end = bytearray(size), 0
    for packet in sink.packets():
        assert len(packet.payload) <= PAYLOAD_MAX
        if packet.status == "B":
            assert len(packet.payload) - 8 <= ADDRESSED_PIECE
            offset = int.from_bytes(packet.payload[:8], "big")
            assert offset >= end
            end = offset + len(packet.payload) - 8
            arrived[offset:end] = packet.payload[8:]
        elif packet.status == "D":
            arrived[end : end + len(packet.payload)] = packet.payload
            end += len(packet.payload)
    assert arrived == image
    assert addressed or end == size


def conforms(out: Output) -> BackupOutput:
    return out
