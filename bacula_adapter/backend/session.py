# SPDX-License-Identifier: AGPL-3.0-or-later
"""One conversation with the plugin, from Hello to the end: who reads, who speaks, and what interrupts the work.

The plugin is read at any time: Bacula's verdict, the end of the job and the end of the input cancel the work where it stands,
and so do SIGUSR1 and SIGTERM. Leaving a handler's context undoes what it did; only then the verdict is answered.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator

import trio

from bacula_adapter.backend.conversation import Conversation, serve_job
from bacula_adapter.backend.dialogue import EXTENSION, Dialogue, State, Word
from bacula_adapter.backend.dispatch import Handlers
from bacula_adapter.backend.job_info import LINES_MAX
from bacula_adapter.backend.messages import Logging, MessageQueue, Redactor, clip, told
from bacula_adapter.backend.packets import ProtocolError
from bacula_adapter.backend.pipes import PipeReader, PipeWriter
from bacula_adapter.backend.speaking import Speaker
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

#: The plugin's cancellation, and how a process is told to end.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def converse(in_fd: int, out_fd: int, handlers: Handlers) -> int:
    """Speak with the plugin over two pipes until it is over. Returns the exit code: 0 where the conversation came to its end."""
    with trio.open_signal_receiver(*SIGNALS) as signals:
        return await Session(in_fd, out_fd, handlers).run(signals)


class Session:
    """A conversation."""

    def __init__(self, in_fd: int, out_fd: int, handlers: Handlers) -> None:
        self._handlers = handlers
        self._dialogue = Dialogue()
        self._redactor = Redactor()
        self._messages = MessageQueue(self._redactor, self._wake)
        self._reader = PipeReader(in_fd)
        self._speaker = Speaker(self._dialogue, PipeWriter(out_fd), self._messages)
        self._token: trio.lowlevel.TrioToken | None = None
        self._talk = Conversation(self._dialogue, self._speaker)

    async def run(self, signals: AsyncIterator[int]) -> int:
        """See ``converse``; each of ``signals`` cancels the job."""
        self._token = trio.lowlevel.current_trio_token()
        with Logging(self._messages, self._redactor) as log:
            async with flat_nursery() as nursery:
                nursery.start_soon(self._read)
                nursery.start_soon(self._heed, signals)
                nursery.start_soon(self._speaker.keep_talking)
                await self._converse(log)
                nursery.cancel_scope.cancel()
        return 0 if self._talk.ended_well else 1

    def _wake(self) -> None:
        """There is a message; on whatever thread."""
        if self._token is not None:
            self._token.run_sync_soon(self._speaker.poke, idempotent=True)

    async def _read(self) -> None:
        """Read the plugin until its end."""
        try:
            while (packet := await self._reader.receive()) is not None:
                before = self._dialogue.state
                said = self._dialogue.receive(packet)
                if before is not State.FAILED or self._dialogue.state is not State.FAILED:
                    await self._talk.hear(said, before)
                self._speaker.poke()
        except ProtocolError as error:
            self._talk.break_off(error)
        else:
            self._talk.hang_up()

    async def _heed(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number != signal.SIGUSR1:
                self._talk.leave()
            if self._talk.cancel():
                await self._speaker.fail(self._talk.failure)

    async def _converse(self, log: Logging) -> None:
        talk = self._talk
        with talk.scope:
            try:
                await self._introduce(log)
            except Exception as error:  # noqa: BLE001 - whatever it is, the plugin has to hear of it
                await talk.fail(error)
        self._speaker.undoing = False
        with talk.parting:
            if talk.broken is not None:
                await self._speaker.fail(told(talk.broken))
            else:
                await self._part()

    async def _introduce(self, log: Logging) -> None:
        """From Hello to the job's end."""
        talk, speaker = self._talk, self._speaker
        await talk.next(Word.HELLO)
        await speaker.say((Word.WELCOME, f" {EXTENSION}" if self._dialogue.extended else ""))
        await talk.next(Word.JOB)
        job = await self._lines()
        await talk.next(Word.PARAMS)
        params = await self._lines()
        start = (await talk.next()).word
        work = self._handlers.prepare(job, params, start, extended=self._dialogue.extended)
        self._redactor.add_from(work.config)
        log.follow(work.config)
        await serve_job(talk, self._handlers, work, start)

    async def _lines(self) -> list[str]:
        """Lines until the end of their block, which is answered."""
        lines: list[str] = []
        while (said := await self._talk.next()).word is Word.LINE:
            if len(lines) == LINES_MAX:
                raise ProtocolError(f"more than {LINES_MAX} lines of a job")
            lines.append(said.text)
        await self._speaker.say((Word.DONE, ""))
        return lines

    async def _part(self) -> None:
        """All is done or undone: answer the verdict, the end, and wait for what is still missing of both."""
        talk, speaker = self._talk, self._speaker
        while True:
            state = self._dialogue.state
            if state is State.OVER or talk.broken is not None:
                return
            if state is State.VERDICT:
                why = talk.objection()
                talk.failure_told = True
                if why:
                    await speaker.say((Word.BROKEN, clip(why)))
                else:
                    await speaker.say((Word.RESULT_OK, ""))
            elif state is State.ENDING:
                if talk.failure and not talk.failure_told:
                    await speaker.say((Word.FAILED, clip(talk.failure)))
                else:
                    await speaker.say((Word.DONE, ""))
            else:
                await talk.change()


__all__ = ["SIGNALS", "Session", "converse"]
