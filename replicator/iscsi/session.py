# SPDX-License-Identifier: AGPL-3.0-or-later
"""A session in its full-feature phase: commands in flight up to a depth, one task that receives, deadlines, and one end.

A session never connects anew: when it is lost, every command in flight fails at once with the reason, and every later one
too. What it reads goes straight into the caller's memory; a caller that gives up has its memory back at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from replicator.iscsi import pdu
from replicator.iscsi.errors import (
    IscsiError,
    IscsiProtocolError,
    SessionLostError,
    TimedOutError,
)
from replicator.iscsi.login import LoggedIn
from replicator.iscsi.pdu import (
    NO_TAG,
    AsyncMessage,
    DataIn,
    LogoutResponse,
    NopIn,
    Pdu,
    PduError,
    Reject,
    ScsiResponse,
    TaskResponse,
)
from replicator.iscsi.sense import GOOD, failure
from replicator.iscsi.settings import IscsiSettings
from replicator.iscsi.tasks import Task, Tasks
from replicator.iscsi.wire import Wire
from replicator.nursery import flat_nursery

#: How long a target may take to answer an abort, and a logout.
ABORT_TIMEOUT_S: Final = 5.0
LOGOUT_TIMEOUT_S: Final = 2.0
_ASYNC_EVENTS: Final = {
    1: "asks us to log out",
    2: "is about to drop the connection",
    3: "is about to drop the session",
}


class Session:
    """One session. Made by ``open_session``, which runs its background tasks. ``where`` names it in errors.

    Any number of tasks may have commands executed; ``settings.depth`` travel at once, those included whose callers gave up.
    """

    def __init__(self, wire: Wire, start: LoggedIn, settings: IscsiSettings, where: str) -> None:
        self.where = where
        self._wire = wire
        self._settings = settings
        self._cmd_sn = start.cmd_sn
        self._max_cmd_sn = start.max_cmd_sn
        self._exp_stat_sn = start.exp_stat_sn
        self._tasks = Tasks()
        self._slots = trio.Semaphore(settings.depth, max_value=settings.depth)
        self._window = trio.Event()
        self._busy = trio.Event()
        self._logout_tag: int | None = None
        self._ended = trio.Event()
        self._failure: tuple[type[IscsiError], str] | None = None

    @property
    def lost(self) -> bool:
        """Whether the session has ended: nothing can be executed any more."""
        return self._failure is not None

    async def submit(self, name: str, lun: bytes, cdb: bytes, view: memoryview) -> Task:
        """Send a command whose answer goes into ``view`` as soon as there is room for it; ``name`` is for errors.

        Every task must go to ``finish`` or ``abandon``. Raises what ended the session. Cancelled, nothing was sent.
        """
        await self._slots.acquire()
        try:
            await self._wait_for_window()
            self._check_alive()
        except BaseException:
            self._slots.release()
            raise
        # From here on without a checkpoint: the command is sent and known, or neither.
        deadline = trio.current_time() + self._settings.task_timeout_s
        task = Task(
            name,
            view,
            lun=lun,
            itt=self._tasks.new_tag(),
            cmd_sn=self._cmd_sn,
            deadline=deadline,
        )
        self._tasks.add(task)
        self._cmd_sn = (self._cmd_sn + 1) & 0xFFFFFFFF
        self._send(
            pdu.scsi_read(
                lun=lun,
                itt=task.itt,
                expected=task.expected,
                cmd_sn=task.cmd_sn,
                exp_stat_sn=self._exp_stat_sn,
                cdb=cdb,
            )
        )
        self._busy.set()
        return task

    async def finish(self, task: Task, lba: int = 0) -> int:
        """Wait for the end of a command; the number of bytes received.

        Raises ScsiError (one of its kinds) if the command failed, and what ended the session. Cancelled, the task is
        abandoned. ``lba`` is for the error.
        """
        try:
            await task.done.wait()
        except BaseException:
            self.abandon(task)
            raise
        if task.error is not None:
            raise task.error
        if task.status != GOOD:
            raise failure(self.where, task.name, task.status, task.sense, lba)
        return task.received

    @staticmethod
    def abandon(task: Task) -> None:
        """Nobody waits for it any more: its memory is not written to from now on. It stays in flight until its answer."""
        task.view = None

    async def execute(self, name: str, lun: bytes, cdb: bytes, size: int) -> bytes:
        """A command with an answer of up to ``size`` bytes. Raises as ``submit`` and ``finish``."""
        buffer = bytearray(size)
        task = await self.submit(name, lun, cdb, memoryview(buffer))
        return bytes(memoryview(buffer)[: await self.finish(task)])

    async def logout(self) -> None:
        """Say goodbye and wait for the answer, within LOGOUT_TIMEOUT_S. Never fails; can be repeated."""
        if self._failure is None and self._logout_tag is None:
            self._logout_tag = self._tasks.new_tag()
            request = pdu.logout(
                itt=self._logout_tag, cmd_sn=self._cmd_sn, exp_stat_sn=self._exp_stat_sn
            )
            self._send(request)
            with trio.move_on_after(LOGOUT_TIMEOUT_S):
                await self._ended.wait()
        self.fail(SessionLostError, f"{self.where}: the session was closed")

    def fail(self, kind: type[IscsiError], text: str) -> None:
        """The session is over: everything in flight fails with this, now. Only the first reason counts."""
        if self._failure is None:
            self._failure = (kind, text)
        for task in self._tasks.take_all():
            self._end(task, self._reason())
        self._window.set()
        self._ended.set()

    def _reason(self) -> IscsiError:
        assert self._failure is not None
        kind, text = self._failure
        return kind(text)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._reason()

    async def _wait_for_window(self) -> None:
        with trio.move_on_after(self._settings.task_timeout_s):
            while self._failure is None and pdu.after(self._cmd_sn, self._max_cmd_sn):
                await self._window.wait()
            return
        self._check_alive()
        text = f"{self.where} has taken no command for {self._settings.task_timeout_s:g} s"
        self.fail(TimedOutError, text)

    def _send(self, request: bytes) -> None:
        try:
            self._wire.send(request)
        except IscsiError as error:
            self.fail(type(error), str(error))

    def _end(self, task: Task, error: Exception | None = None) -> None:
        task.error = error
        task.view = None
        task.done.set()
        self._slots.release()

    # What comes in.

    async def receive_for_ever(self) -> None:
        """Take what the target sends until it ends or is cancelled; the reason is then in ``fail``."""
        try:
            while self._failure is None:
                unit, data = await self._wire.receive(self._landing)
                if self._take(unit, data):
                    await self._wire.let_others_run()
        except PduError as error:
            self.fail(IscsiProtocolError, f"{self.where} broke the protocol: {error}")
        except IscsiError as error:
            self.fail(type(error), str(error))
        except BaseException:
            self.fail(SessionLostError, f"{self.where}: the session was stopped")
            raise

    def _landing(self, unit: DataIn) -> Task:
        task = self._tasks.get(unit.itt)
        task.check_data(unit)
        return task

    def _take(self, unit: Pdu, data: bytes) -> bool:
        """True if somebody who waits can go on."""
        self._take_numbers(unit)
        if isinstance(unit, DataIn):
            task = self._tasks.find(unit.itt)
            if task is None or not task.landed(unit):
                return False
            self._tasks.remove(task)
            self._end(task)
        elif isinstance(unit, ScsiResponse):
            task = self._tasks.get(unit.itt)
            task.responded(unit, data)
            self._tasks.remove(task)
            self._end(task)
        else:
            self._take_other(unit)
        return True

    def _take_numbers(self, unit: Pdu) -> None:
        if not isinstance(unit, DataIn) or unit.status is not None:
            carries_none = isinstance(unit, NopIn) and unit.itt == NO_TAG
            following = unit.stat_sn if carries_none else (unit.stat_sn + 1) & 0xFFFFFFFF
            if pdu.after(following, self._exp_stat_sn):
                self._exp_stat_sn = following
        # RFC 7143, 4.2.2.1: numbers that do not fit each other are ignored.
        fit = not pdu.after((unit.exp_cmd_sn - 1) & 0xFFFFFFFF, unit.max_cmd_sn)
        if fit and pdu.after(unit.max_cmd_sn, self._max_cmd_sn):
            self._max_cmd_sn = unit.max_cmd_sn
            self._window.set()
            self._window = trio.Event()

    def _take_other(self, unit: Pdu) -> None:
        if isinstance(unit, NopIn):
            if unit.itt != NO_TAG:
                raise PduError("an answer to a ping that was not sent")
            if unit.ttt != NO_TAG:
                self._send(
                    pdu.nop_out(
                        lun=unit.lun,
                        ttt=unit.ttt,
                        cmd_sn=self._cmd_sn,
                        exp_stat_sn=self._exp_stat_sn,
                    )
                )
        elif isinstance(unit, TaskResponse):
            self._take_abort(unit)
        elif isinstance(unit, AsyncMessage):
            if unit.event in _ASYNC_EVENTS:
                text = f"{self.where} {_ASYNC_EVENTS[unit.event]}"
                self.fail(SessionLostError, text)
        elif isinstance(unit, LogoutResponse) and unit.itt == self._logout_tag:
            self.fail(SessionLostError, f"{self.where}: the session was closed")
        elif isinstance(unit, Reject):
            raise PduError(f"a rejection of what we sent (reason 0x{unit.reason:02x})")
        else:
            raise PduError(f"{type(unit).__name__}, which nobody asked for")

    def _take_abort(self, unit: TaskResponse) -> None:
        task = self._tasks.abort_answered(unit.itt)
        if task is None:
            return
        if unit.response not in {0, 1}:
            text = f"{self.where}: {task.name} got no answer, and cannot be aborted"
            self.fail(TimedOutError, text)
            return
        self._tasks.remove(task)
        self._end(task, TimedOutError(self._late(task)))

    def _late(self, task: Task) -> str:
        return f"{self.where}: {task.name} got no answer within {self._settings.task_timeout_s:g} s"

    # Deadlines.

    async def watch_for_ever(self) -> None:
        """Abort what takes too long; a target that does not answer that either ends the session."""
        while self._failure is None:
            task = self._tasks.earliest()
            if task is None:
                self._busy = trio.Event()
                await self._busy.wait()
                continue
            await trio.sleep_until(task.deadline)
            if self._tasks.find(task.itt) is task and trio.current_time() >= task.deadline:
                self._expire(task)

    def _expire(self, task: Task) -> None:
        if task.aborting:
            self.fail(TimedOutError, f"{self._late(task)}, and the abort none either")
            return
        tag = self._tasks.new_tag()
        self._tasks.abort_sent(tag, task)
        task.deadline += min(ABORT_TIMEOUT_S, self._settings.task_timeout_s)
        self._send(
            pdu.abort_task(
                lun=task.lun,
                itt=tag,
                task=task.itt,
                task_cmd_sn=task.cmd_sn,
                cmd_sn=self._cmd_sn,
                exp_stat_sn=self._exp_stat_sn,
            )
        )


@asynccontextmanager
async def open_session(
    wire: Wire, start: LoggedIn, settings: IscsiSettings, where: str
) -> AsyncIterator[Session]:
    """Run a session on a connection that is logged in; log out and close it at the end.

    Losing it does not cancel the body: the next command fails. Cancellation ends the session with a logout, which takes
    at most LOGOUT_TIMEOUT_S.
    """
    session = Session(wire, start, settings, where)
    # The background tasks outlive a cancellation of the body: the logout needs them.
    scope = trio.CancelScope(shield=True)

    async def run() -> None:
        with scope:
            async with flat_nursery() as nursery:
                nursery.start_soon(session.receive_for_ever)
                nursery.start_soon(session.watch_for_ever)
                nursery.start_soon(_flush, session, wire)

    try:
        async with flat_nursery() as nursery:
            nursery.start_soon(run)
            try:
                yield session
            finally:
                with trio.CancelScope(shield=True):
                    await session.logout()
                scope.cancel()
    finally:
        wire.close()


async def _flush(session: Session, wire: Wire) -> None:
    try:
        await wire.flush_for_ever()
    except IscsiError as error:
        session.fail(type(error), str(error))


__all__ = ["ABORT_TIMEOUT_S", "LOGOUT_TIMEOUT_S", "Session", "open_session"]
