# SPDX-License-Identifier: AGPL-3.0-or-later
"""Cancelled, decided early, cut off or spoken to out of turn, at every step: the work is undone, and nothing hangs."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bacula_adapter.backend.interface import BackupOutput, FileEntry
from bacula_adapter.backend.packets import encode
from tests.bacula_adapter.fakes import IMAGE, Fakes, small_backup
from tests.bacula_adapter.plugin import (
    BackendEndedError,
    BackendFailedError,
    Plugin,
    RestoreObject,
    SavedFile,
    inner_backend,
)

#: What a plugin says in a backup and in a restore, packet by packet; the backend's answers are not waited for.
OPENING = [
    b"Hello replicator 3 ext=1\n", b"Job\n", b"Name=Backup.2026-11-25_10.00.00_03\n", b"Type=B\n", b"",
    b"Params\n", b"PluginString=vm=web\n", b"",
]  # fmt: skip


async def slow_backup(output: BackupOutput) -> None:
    """With a wait before and after each step."""
    await trio.sleep(3)
    await small_backup(Slowly(output))
    await trio.sleep(3)


class Slowly:
    """An output that waits."""

    def __init__(self, output: BackupOutput) -> None:
        self._output = output

    async def begin(self, entry: FileEntry) -> None:
        await trio.sleep(1)
        await self._output.begin(entry)

    async def data(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(1)
        await self._output.data(offset, data)

    async def end(self) -> None:
        await trio.sleep(1)
        await self._output.end()

    async def restore_object(self, name: str, data: bytes) -> None:
        await trio.sleep(1)
        await self._output.restore_object(name, data)

    async def plugin_options(self, name: str, text: str) -> None:
        await trio.sleep(1)
        await self._output.plugin_options(name, text)


async def drowsy() -> None:
    await trio.sleep(2)


async def whole_backup(plugin: Plugin) -> None:
    await plugin.hello()
    await plugin.job()
    await plugin.params("vm=web")
    await plugin.backup()


async def whole_restore(plugin: Plugin) -> None:
    file = SavedFile(IMAGE, 9, "F 9 0 0 100600 1", "1 2 3", addressed=True, pieces=[(4, b"1234")])
    await plugin.hello()
    await plugin.job(kind="R", more=["Where=/r"])
    await plugin.params("vm=web")
    await plugin.start("RestoreStart")
    await plugin.restore_object(RestoreObject("replicator/web", b"object"))
    await plugin.restore_file("/r/a", file)
    await plugin.restore_file("/r/b", file)
    await plugin.finish()


def drowsy_fakes() -> Fakes:
    return Fakes(
        run_backup=slow_backup, opening=drowsy, undoing=drowsy, concluding=drowsy, finishing=drowsy, taking=drowsy
    )  # fmt: skip


Story = Callable[[Plugin], Awaitable[None]]
#: Half seconds to the end of each story: what ends between two of them is met at every await.
STORIES = pytest.mark.parametrize(
    ("story", "halves"), [(whole_backup, 40), (whole_restore, 18)], ids=["backup", "restore"]
)


def check_undone(fakes: Fakes) -> None:
    """Whatever was opened is undone; nothing was kept."""
    assert "kept" not in fakes.log
    assert "concluded T" not in fakes.log
    assert fakes.log.count("opened") == fakes.log.count("undone")


async def until(plugin: Plugin, story: Story, seconds: float) -> None:
    """Play the story for so long."""
    with trio.move_on_after(seconds):
        await story(plugin)
        await trio.sleep(math.inf)


@STORIES
async def test_cancelled_at_any_time(story: Story, halves: int, autojump_clock: MockClock) -> None:
    undone = 0
    for half in range(halves):
        fakes = drowsy_fakes()
        async with inner_backend(fakes) as plugin:
            await until(plugin, story, half / 2 + 0.25)
            began = autojump_clock.current_time()
            plugin.cancel()
            plugin.cancel()  # it may come twice
            await plugin.result("A")
            assert autojump_clock.current_time() - began <= 2
            check_undone(fakes)
            undone += "undone" in fakes.log
            await plugin.end()
        assert plugin.exit_code == 0
        assert [text for status, text in plugin.messages if status == "A"] in (
            ["the job was cancelled"],
            [],
        )
    assert undone > halves / 2


@STORIES
async def test_decided_at_any_time(story: Story, halves: int, autojump_clock: MockClock) -> None:
    del autojump_clock
    for half in range(halves):
        fakes = drowsy_fakes()
        async with inner_backend(fakes) as plugin:
            await until(plugin, story, half / 2 + 0.25)
            await plugin.result("f")
            check_undone(fakes)
            await plugin.end()
        assert plugin.exit_code == 0


@STORIES
async def test_said_to_be_well_before_its_end(
    story: Story, halves: int, autojump_clock: MockClock
) -> None:
    del autojump_clock
    refused = 0
    for half in range(halves):
        fakes = drowsy_fakes()
        async with inner_backend(fakes) as plugin:
            await until(plugin, story, half / 2 + 0.25)
            try:
                await plugin.result("T")
            except BackendFailedError as error:
                assert "had not come to its end; it was undone" in str(error)  # noqa: PT017 - or not at all
                check_undone(fakes)
                refused += 1
            else:
                assert fakes.log[-1] == "kept"
            await plugin.end()
    assert refused > halves / 2


@STORIES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, None], ids=str)
async def test_given_up_at_any_time(
    story: Story, halves: int, number: int | None, autojump_clock: MockClock
) -> None:
    for half in range(0, halves, 3):
        fakes = drowsy_fakes()
        async with inner_backend(fakes) as plugin:
            await until(plugin, story, half / 2 + 0.25)
            began = autojump_clock.current_time()
            if number is None:
                plugin.close_input()
            else:
                plugin.cancel(number)
            # It may be that nobody reads any more: it ends all the same.
            await plugin.ended.wait()
            assert autojump_clock.current_time() - began <= 8
        check_undone(fakes)


async def test_the_end_without_a_verdict_keeps_nothing(autojump_clock: MockClock) -> None:
    del autojump_clock
    fakes = drowsy_fakes()
    async with inner_backend(fakes) as plugin:
        await whole_backup(plugin)
        await plugin.end()
    check_undone(fakes)
    assert fakes.log[-2:] == ["concluded f", "undone"]


async def test_a_verdict_is_carried_out_whatever_comes_then(autojump_clock: MockClock) -> None:
    del autojump_clock
    for number in (signal.SIGUSR1, signal.SIGTERM, None):
        fakes = drowsy_fakes()
        async with inner_backend(fakes) as plugin:
            await whole_backup(plugin)
            await plugin.command("RESULT T")
            await trio.sleep(1)  # half of what it takes
            if number is None:
                plugin.close_input()
            else:
                plugin.cancel(number)
            await trio.sleep(2)
            assert fakes.log[-2:] == ["concluded T", "kept"]


async def test_half_a_packet_is_never_followed_by_another() -> None:
    """A plugin that does not read, a packet that is half in the pipe, a cancellation: what comes then is in step."""

    async def much(output: BackupOutput) -> None:
        buffer = bytearray(b"x" * (4 << 20))
        await output.begin(FileEntry(name=IMAGE, size=8 << 20, mtime_s=0))
        try:
            await output.data(0, buffer)
        finally:
            buffer[:] = b"y" * len(buffer)  # the memory is the handler's again

    async with inner_backend(Fakes(run_backup=much)) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("vm=web")
        await plugin.start("BackupStart")
        await trio.testing.wait_all_tasks_blocked(0.01)
        plugin.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await plugin.command("RESULT A")
        await trio.testing.wait_all_tasks_blocked(0.01)
        data = b""
        while (packet := await plugin.packet()).payload != b"RESULT OK\n":
            data += packet.payload if packet.status == "D" else b""
        assert data == b"x" * len(data) != b""
        await plugin.end()


async def play(fakes: Fakes, packets: Sequence[bytes], *, ext: bool = True) -> Plugin:
    """Say all that, whatever is answered, and go away."""
    async with inner_backend(fakes, ext=ext) as plugin:
        for packet in packets:
            await plugin.raw(packet)
            await trio.testing.wait_all_tasks_blocked()
        plugin.close_input()
        while True:
            try:
                await plugin.receive()
            except BackendEndedError:
                break
            except BackendFailedError as error:
                plugin.messages.append((error.status, str(error)))
    return plugin


def said(*texts: bytes) -> list[bytes]:
    return [encode("C", text) if text else encode("F") for text in texts]


RESTORE = [
    *said(*OPENING, b"RestoreStart\n", b"RESTOREOBJ:x\n", b"RESTOREOBJ_LEN:3\n"),
    encode("D", b"abc"), encode("F"),
    *said(b"FNAME:/r/a\n", b"STAT:F 9 0 0 100600 1 1\n", b"TSTAMP:1 2 3\n", b"", b"DATA\n"),
    encode("B", bytes(8) + b"abc"), encode("F"), *said(b"FINISH\n"),
]  # fmt: skip
RESTORE[3] = encode("C", b"Type=R\n")
BACKUP = said(*OPENING, b"BackupStart\n", b"CHECKFILE:@image/x\n")


@pytest.mark.parametrize("whole", [BACKUP, RESTORE], ids=["backup", "restore"])
async def test_the_input_ends_after_and_within_every_packet(whole: list[bytes]) -> None:
    for count in range(len(whole) + 1):
        fakes = Fakes()
        await play(fakes, whole[:count])
        check_undone(fakes)
        if count < len(whole):
            for cut in {1, 7, len(whole[count]) - 1}:
                fakes = Fakes()
                plugin = await play(fakes, [*whole[:count], whole[count][:cut]])
                check_undone(fakes)
                assert plugin.exit_code == 1
                assert plugin.messages[-1] == ("A", "the plugin's packets ended within one")


@pytest.mark.parametrize("whole", [BACKUP, RESTORE], ids=["backup", "restore"])
@pytest.mark.parametrize(
    "nonsense",
    [b"GET / HTTP/1.1\r\n\r\n", encode("C", b"Hello again 3\n"), encode("S", b"x"), encode("C", b"\xff\n"), bytes(8)],
)  # fmt: skip
async def test_nonsense_at_every_place_ends_it(whole: list[bytes], nonsense: bytes) -> None:
    for count in range(1, len(whole) + 1):
        if nonsense[:1] == b"C" and b"\n".join(whole[:count]).count(b"F000000") in (0, 1):
            continue  # among lines it may be one
        fakes = Fakes()
        plugin = await play(fakes, [*whole[:count], nonsense])
        check_undone(fakes)
        assert plugin.exit_code == 1, (count, plugin.messages)
        assert plugin.messages[-1][0] == "A"


WRONG = [
    (6, b"STAT:F 99999999999999999999 0 0 100600 1 1\n", "is not a file's attributes"),
    (6, b"STAT:F 9223372036854775808 0 0 100600 1 1\n", "is not a file's attributes"),
    (6, b"STAT:F -1 0 0 100600 1 1\n", "is not a file's attributes"),
    (6, b"STAT:F 1 0 0 9 1 1\n", "is not a file's attributes"),
    (6, b"STAT:F\n", "is not a file's attributes"),
    (7, b"TSTAMP:1 2\n", "is not three times"),
    (7, b"TSTAMP:1 9999999999999 3\n", "is not three times"),
    (2, b"RESTOREOBJ_LEN:2\n", "has more than 2 bytes"),
    (2, b"RESTOREOBJ_LEN:4\n", "has 3 of 4 bytes"),
    (2, b"RESTOREOBJ_LEN:999999999\n", "is no number from 0 to"),
    (2, b"RESTOREOBJ_LEN:-3\n", "is no number from 0 to"),
]


@pytest.mark.parametrize(("place", "text", "why"), WRONG)
async def test_wrong_lengths_and_numbers_fail_the_job(place: int, text: bytes, why: str) -> None:
    fakes = Fakes()
    packets = list(RESTORE)
    packets[len(OPENING) + place] = encode("C", text)
    plugin = await play(fakes, packets)
    check_undone(fakes)
    assert why in plugin.messages[-1][1]
    assert not fakes.restored


@pytest.mark.parametrize(
    "payload", [b"", b"1234567", bytes(8), b"\xff" * 8 + b"x", b"\x7f" + b"\xff" * 7 + b"x"]
)
async def test_addressed_data_outside_of_anything(payload: bytes) -> None:
    packets = list(RESTORE)
    packets[-3] = encode("B", payload)
    fakes = Fakes()
    plugin = await play(fakes, packets)
    check_undone(fakes)
    assert "addressed data without data, or outside any file" in plugin.messages[-1][1]


async def test_lines_without_end() -> None:
    fakes = Fakes()
    plugin = await play(fakes, [*said(*OPENING[:2]), *said(*[b"Foo=1\n"] * 1001)])
    assert "more than 1000 lines" in plugin.messages[-1][1]
    assert fakes.log == []


async def test_a_file_without_attributes() -> None:
    plugin = await play(Fakes(), [*RESTORE[:-8], encode("C", b"FNAME:/r/a\n"), encode("F")])
    assert "has no name or no STAT" in plugin.messages[-1][1]


async def test_nobody_reads_what_is_said(autojump_clock: MockClock) -> None:
    """The plugin's reading end is gone, its writing end is not: the next word of the backend goes nowhere."""
    del autojump_clock
    fakes = Fakes()
    async with inner_backend(fakes) as plugin:
        await plugin.hello()
        plugin.close_output()
        for packet in [*BACKUP[1:-1], *said(b"RESULT f\n", b"END\n"), encode("T")]:
            await plugin.raw(packet)
            await trio.sleep(1)
        assert plugin.exit_code == 0
    check_undone(fakes)


async def test_messages_that_nobody_reads_are_bounded(autojump_clock: MockClock) -> None:
    del autojump_clock

    async def shout(output: BackupOutput) -> None:
        for number in range(2000):
            logging.getLogger("replicator.test").info("%d %s", number, "x" * 3000)
        await small_backup(output)

    async with inner_backend(Fakes(run_backup=shout)) as plugin:
        await whole_backup(plugin)
        await plugin.result()
        await plugin.end()
    assert len(plugin.messages) == 501
    assert plugin.messages[-1][1].startswith("1500 messages more")
    assert all(len(text.encode()) <= 1900 for _, text in plugin.messages)
