# SPDX-License-Identifier: AGPL-3.0-or-later
"""A job in the dialogue: what the plugin says goes to the handler, what the handler does goes to the plugin.

What ends a job (a verdict, the end, silence, a signal) cancels ``scope`` where the work is under way, and is a word like any
other where the work is done and waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from bacula_adapter.backend.attributes import (
    OBJECT_MAX,
    SIZE_MAX,
    Stat,
    parse_number,
    parse_stat,
    parse_tstamp,
)
from bacula_adapter.backend.dialogue import Dialogue, Said, State, Word
from bacula_adapter.backend.dispatch import Handlers, Work
from bacula_adapter.backend.interface import (
    TERMINATED_OK,
    Answer,
    BackupHandler,
    ListingHandler,
    RestoredFile,
    RestoreHandler,
)
from bacula_adapter.backend.messages import told
from bacula_adapter.backend.output import Output, attributes
from bacula_adapter.backend.packets import ProtocolError
from bacula_adapter.backend.speaking import Speaker
from replicator.cli.text import one_line

_logger = logging.getLogger(__name__)

#: Words that are read ahead of the work, data of a restore above all.
_AHEAD: Final = 6
#: The work is done, and waits for the verdict or the end.
_COMPLETE: Final = frozenset({State.BACKED_UP, State.LISTED, State.RESTORED})
_ENDINGS: Final = frozenset({Word.RESULT, Word.END, Word.OVER})
_ANSWERS: Final = {Answer.SEND: Word.SEND, Answer.SKIP: Word.SKIP, Answer.CORE: Word.CORE}
_OFFSET_BYTES: Final = 8
#: How long the last words may take where nobody may be listening any more.
_PARTING_S: Final = 5.0


class Conversation:
    """What was said, what was decided, and what became of the job."""

    def __init__(self, dialogue: Dialogue, speaker: Speaker) -> None:
        self.dialogue = dialogue
        self.speaker = speaker
        #: The job: cancelled by whatever ends it before its time.
        self.scope = trio.CancelScope()
        #: What is said after it.
        self.parting = trio.CancelScope()
        #: Why the job failed, and whether the plugin has heard of it.
        self.failure = ""
        self.failure_told = False
        #: The plugin broke the protocol.
        self.broken: ProtocolError | None = None
        #: Bacula's verdict, once there is one.
        self.verdict = ""
        self._concluding = False
        self._concluded = False
        self._failing = False
        self._listing = False
        self._changed = trio.Event()
        self._deaf = False
        self._hung_up = False
        self._ended = False
        self._words, self._heard = trio.open_memory_channel[Said](_AHEAD)

    # What the reader and the signals report

    async def hear(self, said: Said, before: State) -> None:
        """The plugin said something, in the state ``before``."""
        if said.word in _ENDINGS:
            if said.word is Word.RESULT:
                self.verdict = said.text
            self._ended |= said.word is Word.END
            self._change()
            if before not in _COMPLETE:
                self._interrupt()
                return
        if not self._deaf:
            await self._words.send(said)

    def hang_up(self) -> None:
        """The plugin says no more."""
        self._hung_up = self.dialogue.state is not State.OVER
        self.dialogue.state = State.OVER
        self.leave()
        self._interrupt()

    def break_off(self, error: ProtocolError) -> None:
        """The plugin said what cannot be."""
        self.broken = error
        self.leave()
        self._interrupt()

    def leave(self) -> None:
        """The process has to end soon: nobody may be waiting for its last words."""
        self.parting.deadline = trio.current_time() + _PARTING_S

    def cancel(self) -> bool:
        """Bacula cancels the job. False where it is too late for that."""
        if self._concluding or self.dialogue.state in (State.OVER, State.ENDED, State.JUDGED):
            return False
        self.failure = self.failure or "the job was cancelled"
        self.failure_told = True  # by who calls this
        self._interrupt()
        return True

    def _interrupt(self) -> None:
        self._stop_listening()
        self._change()
        if not self._concluding and not self._failing:
            self.speaker.undoing = True
            self.scope.cancel()

    def _stop_listening(self) -> None:
        """Nobody waits for the plugin's words any more; who reads them must not wait for that either."""
        self._deaf = True
        with suppress(trio.WouldBlock):
            while True:
                self._heard.receive_nowait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def change(self) -> None:
        """Wait until something more was said that ends the job."""
        await self._changed.wait()

    # What the work asks

    async def next(self, expected: Word | None = None) -> Said:
        """The plugin's next word; the dialogue has seen to it that it fits."""
        said = await self._heard.receive()
        assert expected is None or said.word in (expected, *_ENDINGS), said.word
        return said

    async def fail(self, error: BaseException) -> None:
        """The job failed: say so at once, unless it was. What is under way is undone afterwards."""
        text = told(error)
        if not self.failure:
            self.failure = text
        elif text != self.failure:
            _logger.warning("after that: %s", text)
        self._failing = self.speaker.undoing = True
        self._stop_listening()
        if not self.failure_told and self.dialogue.state not in (State.VERDICT, State.ENDING):
            self.failure_told = True
            await self.speaker.fail(self.failure)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """An error inside is said to the plugin before it goes on its way."""
        try:
            yield
        except Exception as error:
            await self.fail(error)
            raise

    async def conclude(self, handler: BackupHandler | RestoreHandler, said: Said) -> None:
        """The work was complete, and ``said`` is the plugin's last word on it: let the handler know. Nothing interrupts that."""
        status = said.text
        if said.word is not Word.RESULT:
            # Without the extension the end is all there is. With it, an end without a verdict is none.
            status = TERMINATED_OK if said.word is Word.END and not self.dialogue.extended else "f"
        self._concluding = True
        await handler.conclude(status)
        self._concluded = status == TERMINATED_OK

    def objection(self) -> str:
        """What is to be said against the verdict; empty where there is nothing."""
        if self.verdict != TERMINATED_OK or self._concluded:
            return ""
        if self.failure:
            return self.failure
        if self._listing:
            return ""
        return "the job is said to be well, but it had not come to its end; it was undone"

    def listed(self) -> None:
        """Nothing is to be concluded."""
        self._listing = True

    @property
    def ended_well(self) -> bool:
        """Whether the conversation came to its end as agreed, whatever became of the job."""
        return self.broken is None and (self._ended or not self._hung_up)


async def serve_job(talk: Conversation, handlers: Handlers, work: Work, start: Word) -> None:
    """Open the handler, do the job, and wait for the verdict. Raises what the handler raises; undone on the way out."""
    extended = talk.dialogue.extended
    if extended:
        await talk.speaker.say((Word.TIMEOUT, str(work.config.backend_timeout)))
    if start is Word.BACKUP_START:
        async with handlers.backup(work) as backup, talk.telling():
            await _back_up(talk, backup, work)
    elif start is Word.RESTORE_START:
        async with handlers.restore(work) as restore, talk.telling():
            await talk.speaker.say((Word.DONE, ""))
            await _Restore(talk, restore).run()
    else:
        async with handlers.listing(work) as listing, talk.telling():
            await talk.speaker.say((Word.DONE, ""))
            await _list(talk, listing, work)
        talk.listed()
        await talk.next()


async def _back_up(talk: Conversation, handler: BackupHandler, work: Work) -> None:
    speaker, extended = talk.speaker, talk.dialogue.extended
    if extended and handler.claims:
        await speaker.say(*((Word.CLAIM, prefix) for prefix in handler.claims))
    await speaker.say((Word.DONE, ""))
    output = Output(speaker, addressed=work.job.addressed and extended, options=extended)
    await handler.run(output)
    await speaker.say((Word.DONE, ""))
    while (said := await talk.next()).word is Word.CHECKFILE:
        seen = await handler.exists(said.text)
        await speaker.say((Word.SEEN if seen else Word.GONE, ""))
    await talk.conclude(handler, said)


async def _list(talk: Conversation, handler: ListingHandler, work: Work) -> None:
    speaker = talk.speaker
    if work.parameter is not None:
        async for key, value in handler.query(work.parameter):
            await speaker.say((Word.ANSWER, one_line(f"{key}={value}")))
    else:
        found = handler.estimate() if work.path is None else handler.listing(work.path)
        async for entry in found:
            await speaker.say(*attributes(entry), (Word.DONE, ""))
    await speaker.say((Word.DONE, ""))


class _Restore:
    """Files and objects of a restore, word by word."""

    def __init__(self, talk: Conversation, handler: RestoreHandler) -> None:
        self._talk = talk
        self._handler = handler
        #: A file was asked for, and its data did not begin yet.
        self._awaited = False

    async def run(self) -> None:
        """Until the verdict."""
        talk = self._talk
        while True:
            said = await talk.next()
            if self._awaited and said.word is not Word.DATA:
                # Of an empty file Bacula's own metaplugins send nothing.
                self._awaited = False
                await self._handler.close(whole=True)
            match said.word:
                case Word.OBJECT:
                    await self._object(said.text)
                case Word.FNAME:
                    await self._file(said.text)
                case Word.DATA:
                    self._awaited = False
                    await self._data()
                case _:
                    assert said.word is Word.FINISH, said.word
                    break
        await self._handler.finish()
        await talk.speaker.say((Word.DONE, ""))
        await talk.conclude(self._handler, await talk.next())

    async def _object(self, name: str) -> None:
        kind, job_id, length = 25, 0, 0
        data = bytearray()
        while (said := await self._talk.next()).word is not Word.DONE:
            match said.word:
                case Word.OBJECT_JOB:
                    job_id = parse_number("RESTOREOBJ_JOBID", said.text, (1 << 32) - 1)
                case Word.OBJECT_TYPE:
                    kind = parse_number("RESTOREOBJ_TYPE", said.text, 1000)
                case Word.OBJECT_LENGTH:
                    length = parse_number("RESTOREOBJ_LEN", said.text, OBJECT_MAX)
                case _:
                    data += said.data
                    if len(data) > length:
                        raise ProtocolError(f"the object {name} has more than {length} bytes")
        if len(data) != length:
            raise ProtocolError(f"the object {name} has {len(data)} of {length} bytes")
        await self._handler.restore_object(name, kind, job_id, bytes(data))
        await self._talk.speaker.say((Word.SEND, ""))

    async def _file(self, name: str) -> None:
        found: Stat | None = None
        mtime_s = 0
        while (said := await self._talk.next()).word is not Word.DONE:
            if said.word is Word.STAT:
                found = parse_stat(said.text)
            else:
                mtime_s = parse_tstamp(said.text)
        if found is None or not name:
            raise ProtocolError(f"the file {name} has no name or no STAT")
        file = RestoredFile(
            name=name, size=found.size, mtime_s=mtime_s, file_index=found.file_index
        )
        answer = await self._handler.create(file)
        self._awaited = answer is Answer.SEND
        await self._talk.speaker.say((_ANSWERS[answer], ""))

    async def _data(self) -> None:
        handler = self._handler
        while (said := await self._talk.next()).word not in (Word.DONE, Word.BROKEN):
            if said.word is Word.PIECE:
                if said.data:
                    await handler.data(None, said.data)
                continue
            offset = int.from_bytes(said.data[:_OFFSET_BYTES], "big")
            data = said.data[_OFFSET_BYTES:]
            if not data or offset + len(data) > SIZE_MAX:
                raise ProtocolError("addressed data without data, or outside any file")
            await handler.data(offset, data)
        await handler.close(whole=said.word is Word.DONE)
        await self._talk.speaker.say((Word.SEND, ""))


__all__ = ["Conversation", "serve_job"]
