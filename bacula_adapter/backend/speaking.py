# SPDX-License-Identifier: AGPL-3.0-or-later
"""Saying things to the plugin: words, the job's messages before them, and signs of life. Packets are never mixed.

Several tasks may speak; each call is one piece. What the dialogue forbids is a defect, and stops here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from bacula_adapter.backend.dialogue import TABLE, Dialogue, State, Word
from bacula_adapter.backend.messages import MessageQueue, clip
from bacula_adapter.backend.packets import encode, header
from bacula_adapter.backend.pipes import Bytes, PipeWriter

#: The plugin hears of the backend at least so often while it waits for it.
KEEP_ALIVE_S: Final = 10.0

#: A word, and what follows its beginning.
Saying = tuple[Word, str]


class Speaker:
    """The backend's voice."""

    def __init__(self, dialogue: Dialogue, writer: PipeWriter, messages: MessageQueue) -> None:
        self._dialogue = dialogue
        self._writer = writer
        self._messages = messages
        self._lock = trio.Lock()
        self._poked = trio.Event()
        self._said_at = 0.0
        #: Signs of life also where it is the plugin's turn: something is being undone, and the plugin may ask any moment.
        self.undoing = False
        #: Nobody listens any more: what is said goes nowhere.
        self.unheard = False

    def poke(self) -> None:
        """There is a message to say, or it may be our turn now."""
        self._poked.set()

    async def say(self, *sayings: Saying) -> None:
        """Say words, one packet each, after the messages that wait. Cancelled, they are said in full or not at all."""
        async with self._lock:
            await self._say_messages()
            parts = []
            for word, text in sayings:
                self._dialogue.say(word)
                parts.append(_encode(word, text))
            await self._write(parts)

    async def data(self, word: Word, pieces: Sequence[tuple[bytes, Bytes]]) -> None:
        """Say data: a packet for each piece, of what goes before it (an offset) and the bytes themselves, which are not copied."""
        async with self._lock:
            await self._say_messages()
            parts: list[Bytes] = []
            for before, piece in pieces:
                self._dialogue.say(word)
                parts += (header(word.value, len(before) + len(piece)) + before, piece)
            await self._write(parts)

    async def fail(self, text: str) -> None:
        """Say that the job has failed, unless that was said or it is too late for it. Also in the plugin's turn."""
        async with self._lock:
            await self._say_messages()
            state = self._dialogue.state
            if state not in (State.FAILED, State.ENDING) and Word.FAILED in TABLE[state]:
                self._dialogue.say(Word.FAILED)
                await self._write([encode("A", clip(text).encode())])

    async def keep_talking(self) -> None:
        """Until cancelled: say messages as they come, and signs of life, wherever it is our turn."""
        self._said_at = trio.current_time()
        while True:
            with trio.move_on_at(self._said_at + KEEP_ALIVE_S):
                await self._poked.wait()
            self._poked = trio.Event()
            if not self._our_turn():
                self._said_at = (
                    trio.current_time()
                )  # the plugin waits for us from here on at the earliest
                continue
            async with self._lock:
                if not self._our_turn():
                    continue
                await self._say_messages()
                if trio.current_time() >= self._said_at + KEEP_ALIVE_S:
                    self._said_at = trio.current_time()
                    if self._dialogue.extended:
                        await self._write([encode("K")])

    def _our_turn(self) -> bool:
        state = self._dialogue.state
        return (state.ours or self.undoing) and state not in (State.WELCOME, State.OVER)

    async def _say_messages(self) -> None:
        if self._messages and self._dialogue.state is not State.WELCOME:
            taken = self._messages.take()
            await self._write([encode(status, f"{text}\n".encode()) for status, text in taken])
        # Who was interrupted says no more: the word would not fit where the dialogue is now.
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _write(self, parts: Sequence[Bytes]) -> None:
        self._said_at = trio.current_time()
        if self.unheard:
            return
        try:
            await self._writer.write(parts)
        except OSError:
            self.unheard = (
                True  # the reader sees the end of our input as well, and that is what counts
            )


def _encode(word: Word, text: str) -> bytes:
    status, beginning = word.value[0], word.value[2:]
    if status != "C":
        return encode(status, f"{text}\n".encode() if text else b"")
    if beginning.startswith("="):
        assert not text
        beginning = beginning[1:]
    if word is Word.ANSWER:
        beginning = ""
    return encode("C", f"{beginning}{text}\n".encode())


__all__ = ["KEEP_ALIVE_S", "Saying", "Speaker"]
