# SPDX-License-Identifier: AGPL-3.0-or-later
"""Targets that lie, stall or talk too much: a typed error at once, never a hang, never growth, never a foreign byte."""

from __future__ import annotations

import random
import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from replicator.iscsi import (
    IscsiError,
    IscsiProtocolError,
    IscsiSettings,
    MediumError,
    Portal,
    ScsiError,
    SessionLostError,
    TimedOutError,
    discover,
    open_disk,
)
from replicator.iscsi.disk import BUSY_MAX, IscsiDisk
from replicator.iscsi.session import ABORT_TIMEOUT_S, LOGOUT_TIMEOUT_S
from replicator.nursery import flat_nursery
from tests.iscsi.fake_target import (
    BLOCK,
    BLOCKS,
    NO_TAG,
    Command,
    Connection,
    content,
    fake_target,
    pdu,
    wanted,
)
from tests.iscsi.lab import INITIATOR, TARGET, settings
from tests.limits import HANG_S

SIZE = 8 * BLOCK
#: Sense: unit attention, power on or reset.
RESET = bytes([0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 0, 0, 0, 0, 0])
CHANGED = RESET[:12] + bytes([0x2A, 0x09]) + RESET[14:]
MEDIUM = bytes([0xF0, 0, 3, 0, 0, 0, 3, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0])

Answer = Callable[[Connection, Command], Awaitable[None]]


async def read_one(portal: Portal, given: IscsiSettings | None = None) -> bytes:
    with trio.fail_after(HANG_S):
        async with open_disk(portal, TARGET, None, given or settings()) as disk:
            assert disk.size == BLOCKS * BLOCK
            return await disk.read(0, SIZE)


def answering(
    answer: Answer, answers: dict[str, str] | None = None
) -> Callable[[Connection], Awaitable[None]]:
    """A target that is well behaved until the first READ, which it answers in its own way."""

    async def script(target: Connection) -> None:
        await target.login(answers)
        command = await target.serve_until_read()
        await answer(target, command)
        await target.hold()

    return script


async def well(target: Connection, command: Command) -> None:
    await target.data(command, wanted(command), ends=True)


async def test_the_fake_target_itself_is_right() -> None:
    async with fake_target(answering(well)) as portal:
        assert await read_one(portal) == content(0, 8)


async def test_with_both_digests() -> None:
    digests = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
    async with fake_target(answering(well, digests)) as portal:
        assert await read_one(portal) == content(0, 8)


async def unknown_tag(target: Connection, command: Command) -> None:
    command.itt += 1
    await well(target, command)


async def unknown_tag_in_response(target: Connection, command: Command) -> None:
    command.itt += 1
    await target.respond(command)


class Recorder:
    """Takes the place of a stream."""

    def __init__(self) -> None:
        self._data = b""

    async def send_all(self, data: bytes) -> None:
        self._data += data

    def take(self) -> bytes:
        data, self._data = self._data, b""
        return data


async def too_much(target: Connection, command: Command) -> None:
    await target.data(command, bytes(SIZE + 4))


async def too_much_in_pieces(target: Connection, command: Command) -> None:
    await target.data(command, bytes(SIZE), number=0)
    await target.data(command, bytes(4), number=1, offset=SIZE)


async def behind_the_end(target: Connection, command: Command) -> None:
    await target.data(command, bytes(4), offset=1 << 31)


async def twice(target: Connection, command: Command) -> None:
    await target.data(command, bytes(512), number=0)
    await target.data(command, bytes(512), number=1)


async def out_of_order(target: Connection, command: Command) -> None:
    await target.data(command, bytes(512), number=1)


async def huge_segment(target: Connection, command: Command) -> None:
    await target.send(pdu(0x25, itt=command.itt, length=(1 << 24) - 1))


async def huge_response(target: Connection, command: Command) -> None:
    await target.send(pdu(0x21, itt=command.itt, length=(1 << 24) - 1))


async def too_little(target: Connection, command: Command) -> None:
    await target.data(command, bytes(512))
    await target.respond(command)


async def underflow(target: Connection, command: Command) -> None:
    await target.data(command, bytes(512), ends=True)


async def wrong_residual(target: Connection, command: Command) -> None:
    words = (NO_TAG, *target.numbers(), 0, 0, 5)
    await target.send(pdu(0x25, flags=0x83, itt=command.itt, words=words, data=bytes(512)))


async def target_failure(target: Connection, command: Command) -> None:
    await target.send(pdu(0x21, byte2=1, itt=command.itt, words=(0, *target.numbers())))


async def failure_in_data(target: Connection, command: Command) -> None:
    words = (NO_TAG, *target.numbers(), 0, 0, 0)
    await target.send(pdu(0x25, flags=0x81, byte3=2, itt=command.itt, words=words))


async def ready_to_transfer(target: Connection, command: Command) -> None:
    await target.send(pdu(0x31, itt=command.itt, words=(1, *target.numbers(ends=False))))


async def login_again(target: Connection, command: Command) -> None:
    await target.answer_login(command, flags=0x87)


async def unasked_text(target: Connection, command: Command) -> None:
    await target.send(pdu(0x24, itt=command.itt, words=(NO_TAG, *target.numbers())))


async def unasked_ping_answer(target: Connection, _: Command) -> None:
    await target.send(pdu(0x20, itt=5, words=(NO_TAG, *target.numbers())))


async def unasked_abort_answer(target: Connection, _: Command) -> None:
    await target.send(pdu(0x22, itt=5, words=(0, *target.numbers())))


async def unasked_logout(target: Connection, _: Command) -> None:
    await target.send(pdu(0x26, itt=5, words=(0, *target.numbers())))


async def rejection(target: Connection, _: Command) -> None:
    await target.send(pdu(0x3F, byte2=4, words=(0, *target.numbers()), data=bytes(48)))


async def nonsense(target: Connection, _: Command) -> None:
    await target.stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(48))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (unknown_tag, "a task that does not exist"),
        (unknown_tag_in_response, "a task that does not exist"),
        (too_much, "more data than was asked for"),
        (too_much_in_pieces, "more data than was asked for"),
        (behind_the_end, "out of order"),
        (twice, "out of order"),
        (out_of_order, "out of order"),
        (huge_segment, "data segment of 16777215 bytes"),
        (huge_response, "data segment of 16777215 bytes"),
        (too_little, "gave 512"),
        (underflow, "gave 512"),
        (wrong_residual, "residual"),
        (target_failure, "target failure"),
        (failure_in_data, "without its sense data"),
        (ready_to_transfer, "ReadyToTransfer"),
        (login_again, "LoginResponse"),
        (unasked_text, "TextResponse"),
        (unasked_ping_answer, "ping that was not sent"),
        (unasked_abort_answer, "request that was not made"),
        (unasked_logout, "LogoutResponse"),
        (rejection, "rejection"),
        (nonsense, "a PDU of type 0x48"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_what_breaks_the_protocol(answer: Answer, words: str) -> None:
    async with fake_target(answering(answer)) as portal:
        with pytest.raises(IscsiProtocolError, match=words) as caught:
            await read_one(portal)
        assert TARGET in str(caught.value)


@pytest.mark.parametrize("spoil", ["header", "data"])
async def test_a_wrong_digest_ends_the_session(spoil: str) -> None:
    async def answer(target: Connection, command: Command) -> None:
        await target.data(command, wanted(command), ends=True, spoil=spoil)

    digests = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
    async with fake_target(answering(answer, digests)) as portal:
        with pytest.raises(IscsiProtocolError, match=f"{spoil} whose digest is wrong"):
            await read_one(portal)


async def test_with_digests_no_flipped_bit_goes_through() -> None:
    """Each round: a right answer with some bits flipped, or cut. The bytes read are right, or there is a typed error."""
    chance = random.Random(5)
    ended = {"right": 0, "error": 0}

    async def answer(target: Connection, command: Command) -> None:
        stream, target.stream = target.stream, recorder  # type: ignore[assignment]
        await target.data(command, wanted(command)[: SIZE // 2])
        await target.data(
            command, wanted(command)[SIZE // 2 :], number=1, offset=SIZE // 2, ends=True
        )
        data = bytearray(recorder.take())
        for _ in range(chance.choice([0, 1, 1, 1, 3, 20])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        cut = chance.choice([len(data), len(data), chance.randrange(len(data))])
        target.stream = stream
        await stream.send_all(data[:cut])
        raise trio.EndOfChannel  # and no more

    recorder = Recorder()
    digests = {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"}
    async with fake_target(answering(answer, digests)) as portal:
        for _ in range(200):
            try:
                found = await read_one(portal)
            except IscsiError:
                ended["error"] += 1
            else:
                assert found == content(0, 8)
                ended["right"] += 1
    assert min(ended.values()) > 5


@pytest.mark.parametrize("event", [1, 2, 3])
async def test_a_target_that_wants_us_to_leave(event: int) -> None:
    async def answer(target: Connection, command: Command) -> None:
        del command
        words = (0, *target.numbers(), event << 24)
        await target.send(pdu(0x32, words=words))

    async with fake_target(answering(answer)) as portal:
        with pytest.raises(SessionLostError, match=r"log out|drop"):
            await read_one(portal)


async def test_other_messages_and_pings_are_no_reason_to_leave() -> None:
    answered: list[Command] = []

    async def answer(target: Connection, command: Command) -> None:
        await target.send(pdu(0x32, words=(0, *target.numbers(), 255 << 24)))
        await target.send(pdu(0x20, words=(NO_TAG, *target.numbers(ends=False))))
        for tag in (7, 8):
            words = (tag, *target.numbers(ends=False))
            await target.send(pdu(0x20, lun=b"abcdefgh", words=words))
            answered.append(await target.receive())
        await well(target, command)

    async with fake_target(answering(answer)) as portal:
        assert await read_one(portal) == content(0, 8)
    assert [(each.opcode, each.itt, each.words[0], each.lun) for each in answered] == [
        (0x00, NO_TAG, 7, b"abcdefgh"),
        (0x00, NO_TAG, 8, b"abcdefgh"),
    ]


async def test_a_cut_in_the_middle_of_data() -> None:
    async def script(target: Connection) -> None:
        await target.login()
        command = await target.serve_until_read()
        await target.stream.send_all(pdu(0x25, flags=0, itt=command.itt, length=SIZE) + bytes(100))

    async with fake_target(script) as portal:
        with pytest.raises(SessionLostError, match="closed the connection"):
            await read_one(portal)


@pytest.mark.parametrize("flags", [0x04, 0x44])
async def test_a_login_that_goes_on_for_ever(flags: int) -> None:
    async def script(target: Connection) -> None:
        while True:
            request = await target.receive()
            stage = request.flags >> 2 & 3
            await target.answer_login(request, flags=flags if stage else 0x81)

    async with fake_target(script) as portal:
        with pytest.raises(IscsiProtocolError, match="without an end"):
            await read_one(portal)


async def pass_time(clock: trio.testing.MockClock, seconds: float) -> None:
    """Once everybody waits. The clock of these tests stands still otherwise, so that nothing is late by chance."""
    await trio.testing.wait_all_tasks_blocked()
    clock.jump(seconds)


async def test_a_portal_that_says_nothing(mock_clock: trio.testing.MockClock) -> None:
    async def script(target: Connection) -> None:
        await target.receive()
        await pass_time(mock_clock, 15)
        await target.hold()

    async with fake_target(script) as portal:
        with pytest.raises(TimedOutError, match="login within 15 s"):
            await read_one(portal, IscsiSettings(INITIATOR))


async def test_a_list_of_targets_that_does_not_come(mock_clock: trio.testing.MockClock) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        await target.receive()
        await pass_time(mock_clock, 30)
        await target.hold()

    async with fake_target(script) as portal:
        with pytest.raises(TimedOutError, match="list its targets within 30 s"):
            await discover(portal, IscsiSettings(INITIATOR))


async def test_an_answer_to_an_abort_ends_the_task_and_not_the_session(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        command = await target.serve_until_read()
        await pass_time(mock_clock, 30)
        abort = await target.receive()
        assert (abort.opcode, abort.flags, abort.words[0]) == (0x02, 0x81, command.itt)
        await target.send(pdu(0x22, itt=abort.itt, words=(0, *target.numbers())))
        await well(target, await target.serve_until_read())
        await target.hold()

    given = IscsiSettings(INITIATOR)
    async with fake_target(script) as portal, open_disk(portal, TARGET, None, given) as disk:
        with pytest.raises(TimedOutError, match=r"READ\(16\) of 8 blocks at 0 got no answer"):
            await disk.read(0, SIZE)
        assert not disk.lost
        assert await disk.read(SIZE, SIZE) == content(8, 8)


async def test_an_answer_that_comes_while_it_is_aborted_counts(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        command = await target.serve_until_read()
        await pass_time(mock_clock, 30)
        abort = await target.receive()
        await well(target, command)
        await target.send(pdu(0x22, byte2=1, itt=abort.itt, words=(0, *target.numbers())))
        await well(target, await target.serve_until_read())
        await target.hold()

    given = IscsiSettings(INITIATOR)
    async with fake_target(script) as portal, open_disk(portal, TARGET, None, given) as disk:
        assert await disk.read(0, SIZE) == content(0, 8)
        assert await disk.read(SIZE, SIZE) == content(8, 8)


@pytest.mark.parametrize(
    ("answered", "words"), [(True, "cannot be aborted"), (False, "none either")]
)
async def test_an_abort_that_is_refused_or_not_answered_ends_the_session(
    answered: bool, words: str, mock_clock: trio.testing.MockClock
) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        await target.serve_until_read()
        await pass_time(mock_clock, 30)
        abort = await target.receive()
        if answered:
            await target.send(pdu(0x22, byte2=5, itt=abort.itt, words=(0, *target.numbers())))
        else:
            await pass_time(mock_clock, ABORT_TIMEOUT_S)
        await target.hold()

    given = IscsiSettings(INITIATOR)
    async with fake_target(script) as portal, open_disk(portal, TARGET, None, given) as disk:
        with pytest.raises(TimedOutError, match=words):
            await disk.read(0, SIZE)
        assert disk.lost


async def test_a_window_that_stays_shut(mock_clock: trio.testing.MockClock) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        command = await target.serve_until_read()
        target.window = 0
        while target.exp_cmd_sn <= target.max_cmd_sn:  # all that the login left room for
            await well(target, command)
            command = await target.receive()
        await well(target, command)
        await pass_time(mock_clock, 30)
        await target.hold()

    given = IscsiSettings(INITIATOR, depth=1, read_size=4096)
    async with fake_target(script) as portal, open_disk(portal, TARGET, None, given) as disk:
        with pytest.raises(TimedOutError, match="has taken no command for 30 s"):
            await disk.read(0, disk.size)


@pytest.mark.parametrize("window", [1, 2, 64])
async def test_no_more_commands_than_depth_and_window_allow(window: int) -> None:
    """The target lets pile up what comes: the depth bounds it; `Connection` checks that the window does, too."""
    pieces, held = 61, list[int]()

    async def script(target: Connection) -> None:
        target.window = window
        await target.login()
        waiting = [await target.serve_until_read()]

        async def pile_up() -> None:
            while True:
                waiting.append(await target.receive())

        async with flat_nursery() as nursery:
            nursery.start_soon(pile_up)
            for _ in range(pieces):
                await trio.testing.wait_all_tasks_blocked()
                held.append(len(waiting))
                await well(target, waiting.pop())  # the newest first: the order is the target's
            nursery.cancel_scope.cancel()
        await target.hold()

    given = settings(depth=4, read_size=4096)
    async with fake_target(script) as portal, open_disk(portal, TARGET, None, given) as disk:
        assert await disk.read(0, pieces * 4096) == content(0, 8 * pieces)
    assert max(held) == (1 if window == 1 else 4)


async def test_a_reset_is_asked_again_once() -> None:
    async def once(target: Connection, command: Command) -> None:
        await target.respond(command, status=2, sense=RESET)
        await well(target, await target.serve_until_read())

    async def always(target: Connection, command: Command) -> None:
        await target.respond(command, status=2, sense=RESET)
        await target.respond(await target.serve_until_read(), status=2, sense=RESET)

    async with fake_target(answering(once)) as portal:
        assert await read_one(portal) == content(0, 8)
    async with fake_target(answering(always)) as portal:
        with pytest.raises(ScsiError, match="unit attention 6/0x2900"):
            await read_one(portal)


async def test_a_disk_whose_size_changed_is_not_read_on() -> None:
    async def answer(target: Connection, command: Command) -> None:
        await target.respond(command, status=2, sense=CHANGED)

    async with fake_target(answering(answer)) as portal:
        with pytest.raises(ScsiError, match="size has changed"):
            await read_one(portal)


async def test_a_medium_error_with_its_block() -> None:
    async def answer(target: Connection, command: Command) -> None:
        await target.respond(command, status=2, sense=MEDIUM)

    async with fake_target(answering(answer)) as portal:
        with pytest.raises(MediumError, match="block 3:") as caught:
            await read_one(portal)
        assert caught.value.lba == 3


async def test_a_full_queue_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.iscsi.disk.BUSY_PAUSE_S", 0.0)

    async def answer(target: Connection, command: Command) -> None:
        for _ in range(BUSY_MAX):
            await target.respond(command, status=0x28)
            command = await target.serve_until_read()
        if full:
            await target.respond(command, status=0x28)
        else:
            await well(target, command)

    full = False
    async with fake_target(answering(answer)) as portal:
        assert await read_one(portal) == content(0, 8)
        full = True
        with pytest.raises(ScsiError, match="queue is full"):
            await read_one(portal)


async def test_what_was_cancelled_is_thrown_away_wherever_it_is() -> None:
    """The target sends half of the data, the reader gives up, the other half comes: nobody's memory is touched."""
    half, go_on = trio.Event(), trio.Event()

    async def script(target: Connection) -> None:
        await target.login()
        command = await target.serve_until_read()
        whole = pdu(
            0x25, flags=0x81, itt=command.itt, words=(NO_TAG, *target.numbers()), data=b"x" * SIZE
        )
        await target.stream.send_all(whole[: 48 + SIZE // 2])
        half.set()
        await go_on.wait()
        await target.stream.send_all(whole[48 + SIZE // 2 :])
        await well(target, await target.serve_until_read())
        await target.hold()

    async with fake_target(script) as portal, open_disk(portal, TARGET, None, settings()) as disk:
        memory = bytearray(SIZE)
        async with flat_nursery() as nursery:
            nursery.start_soon(disk.read_into, 0, memoryview(memory))
            await half.wait()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        memory[:] = bytes(SIZE)
        go_on.set()
        assert await disk.read(SIZE, SIZE) == content(8, 8)
        assert memory == bytes(SIZE)


async def listed(portal: Portal) -> list[str]:
    with trio.fail_after(HANG_S):
        return [target.name for target in await discover(portal, settings())]


@pytest.mark.parametrize(
    ("text", "final", "words"),
    [
        (b"TargetName=no name\0", True, "wrong TargetName"),
        (b"TargetName=iqn.2026-01.example:a\0TargetAddress=:::\0", True, "wrong TargetAddress"),
        (b"\xff\0", True, "not key=value|not UTF-8"),
        (b"", False, "without an end"),
        (b"x" * 200_000, False, "without an end"),
        (b"TargetName=iqn.2026-01.example:a\0" * 5000, True, "more than 4096 targets"),
    ],
)
async def test_lists_of_targets_that_are_none(text: bytes, final: bool, words: str) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        while True:
            question = await target.receive()
            tag = NO_TAG if final else 9
            flags = 0x80 if final else 0x40
            words = (tag, *target.numbers())
            await target.send(pdu(0x24, flags=flags, itt=question.itt, words=words, data=text))

    async with fake_target(script) as portal:
        with pytest.raises(IscsiProtocolError, match=words):
            await listed(portal)


async def test_discovery_answers_pings_and_takes_the_portal_where_no_address_is_given() -> None:
    async def script(target: Connection) -> None:
        await target.login()
        question = await target.receive()
        assert (question.opcode, question.data) == (0x04, b"SendTargets=All\0")
        await target.send(pdu(0x20, words=(3, *target.numbers(ends=False))))
        assert (await target.receive()).words[0] == 3
        data = b"TargetName=iqn.2026-01.example:a\0"
        words = (NO_TAG, *target.numbers())
        await target.send(pdu(0x24, itt=question.itt, words=words, data=data))
        await target.hold()

    async with fake_target(script) as portal:
        (found,) = await discover(portal, settings())
        assert found.portals == (portal,)


async def test_a_list_that_came_counts_when_the_goodbye_is_not_answered(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def script(target: Connection) -> None:
        await target.login()
        question = await target.receive()
        data = f"TargetName={TARGET}\0TargetAddress=10.0.0.1:3260,1\0".encode()
        words = (NO_TAG, *target.numbers())
        await target.send(pdu(0x24, itt=question.itt, words=words, data=data))
        assert (await target.receive()).opcode == 0x06
        await pass_time(mock_clock, LOGOUT_TIMEOUT_S)
        await target.hold()

    async with fake_target(script) as portal:
        (found,) = await discover(portal, IscsiSettings(INITIATOR))
        assert found.portals == (Portal("10.0.0.1"),)


async def test_a_lost_session_fails_everyone_and_every_later_read() -> None:
    async def script(target: Connection) -> None:
        await target.login()
        for _ in range(3):
            await target.serve_until_read()

    async def read(disk: IscsiDisk, at: int) -> None:
        with pytest.raises(SessionLostError):
            await disk.read(at * SIZE, SIZE)

    async with fake_target(script) as portal, open_disk(portal, TARGET, None, settings()) as disk:
        async with flat_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(read, disk, number)
        await read(disk, 4)
        with pytest.raises(IscsiError):
            [extent async for extent in disk.allocated()]


async def test_the_map_of_a_target_that_has_none_is_one_extent() -> None:
    async def answer(target: Connection, command: Command) -> None:
        assert command.cdb[:2] == bytes([0x9E, 0x12])
        sense = bytes([0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0])
        await target.respond(command, status=2, sense=sense)

    async with (
        fake_target(answering(answer)) as portal,
        open_disk(portal, TARGET, None, settings()) as disk,
    ):
        assert [extent.length async for extent in disk.allocated()] == [disk.size]
        assert [extent.offset async for extent in disk.allocated(1000)] == [1000]


async def test_a_map_that_leads_nowhere_is_refused() -> None:
    async def answer(target: Connection, command: Command) -> None:
        await target.data(command, struct.pack(">I4xQIB3x", 20, 0, 0, 0), ends=True)

    async with (
        fake_target(answering(answer)) as portal,
        open_disk(portal, TARGET, None, settings()) as disk,
    ):
        with pytest.raises(IscsiProtocolError, match="GET LBA STATUS"):
            [extent async for extent in disk.allocated()]
