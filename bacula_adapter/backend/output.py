# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backup's files as packets: with their holes left out, or as plain streams."""

from __future__ import annotations

import struct
from typing import Final

from bacula_adapter.backend.attributes import SIZE_MAX, format_stat
from bacula_adapter.backend.dialogue import Word
from bacula_adapter.backend.interface import FileEntry
from bacula_adapter.backend.packets import PAYLOAD_MAX
from bacula_adapter.backend.pipes import Bytes
from bacula_adapter.backend.speaking import Saying, Speaker

#: Bytes of a packet: fifteen of the blocks in which the file daemon reads (65536, or 65528 where it notes their place).
PLAIN_PIECE: Final = 15 * 65536
ADDRESSED_PIECE: Final = 15 * 65528
#: Bacula ends a job whose object takes a million bytes on the wire.
OBJECT_MAX: Final = PAYLOAD_MAX
_ZEROS: Final = memoryview(bytes(PLAIN_PIECE))
#: So many packets of zeros are written at once.
_ZERO_PACKETS: Final = 8
_offset = struct.Struct(">Q")


class Output:
    """``interface.BackupOutput`` over the dialogue. One task at a time may use it.

    ``addressed``: files that are addressed go without their holes. ``options``: the plugin takes options for a restore.
    """

    def __init__(self, speaker: Speaker, *, addressed: bool, options: bool) -> None:
        self._speaker = speaker
        self._addressed = addressed
        self._options = options
        self._entry: FileEntry | None = None
        self._holes = False
        self._begun = False
        self._at = 0
        self._objects = False
        #: Files and bytes that were sent.
        self.files = 0
        self.bytes = 0

    async def begin(self, entry: FileEntry) -> None:
        """See ``BackupOutput``. Raises ValueError for a name that Bacula cannot keep."""
        if self._entry is not None or self._objects:
            raise ValueError(f"{entry.name}: begun within another file, or after a restore object")
        if not 0 <= entry.size <= SIZE_MAX:
            raise ValueError(f"{entry.name}: {entry.size} is no size of a file")
        self._holes = self._addressed and entry.addressed
        words = attributes(entry)
        if self._holes:
            words.append((Word.OFFSETS, ""))
        self._entry, self._at, self._begun = entry, 0, False
        self.files += 1
        await self._speaker.say(*words, (Word.DONE, ""))

    async def data(self, offset: int, data: Bytes) -> None:
        """See ``BackupOutput``. Raises ValueError where bytes overlap or lie outside the file."""
        entry = self._current()
        view = memoryview(data)
        if offset < self._at or offset + len(view) > _limit(entry):
            raise ValueError(
                f"{entry.name}: {len(view)} bytes at {offset} overlap or are not in the file"
            )
        if not self._holes and offset > self._at:
            await self._zeros(offset - self._at)
        self._at = offset
        if not view:
            return
        await self._begin_data()
        if self._holes:
            pieces = [
                (_offset.pack(offset + at), view[at : at + ADDRESSED_PIECE])
                for at in range(0, len(view), ADDRESSED_PIECE)
            ]
            await self._speaker.data(Word.ADDRESSED, pieces)
        else:
            await self._speaker.data(
                Word.PIECE,
                [(b"", view[at : at + PLAIN_PIECE]) for at in range(0, len(view), PLAIN_PIECE)],
            )
        self._at += len(view)
        self.bytes += len(view)

    async def end(self) -> None:
        """See ``BackupOutput``."""
        entry = self._current()
        if entry.addressed:
            if not self._holes and self._at < entry.size:
                await self._zeros(entry.size - self._at)
        elif self._at != (entry.size or self._at):
            raise ValueError(f"{entry.name}: {self._at} bytes instead of {entry.size}")
        self._entry = None
        await self._speaker.say((Word.DONE, ""))

    async def restore_object(self, name: str, data: bytes) -> None:
        """See ``BackupOutput``. Raises ValueError for one that Bacula cannot keep."""
        if self._entry is not None:
            raise ValueError(f"{name}: a restore object within a file")
        self._objects = True
        await self._object(Word.OBJECT, Word.OBJECT_LENGTH, name, data)

    async def plugin_options(self, name: str, text: str) -> None:
        """See ``BackupOutput``."""
        if self._options:
            await self._object(Word.OPTIONS, Word.OPTIONS_LENGTH, name, text.encode())

    async def _object(self, word: Word, length: Word, name: str, data: bytes) -> None:
        _check_name(name)
        if not 0 < len(data) <= OBJECT_MAX:
            raise ValueError(f"{name}: an object of {len(data)} bytes; Bacula takes {OBJECT_MAX}")
        await self._speaker.say((word, name), (length, str(len(data))))
        await self._speaker.data(Word.PIECE, [(b"", data)])
        await self._speaker.say((Word.DONE, ""))

    async def _begin_data(self) -> None:
        if not self._begun:
            self._begun = True
            await self._speaker.say((Word.DATA, ""))

    async def _zeros(self, count: int) -> None:
        await self._begin_data()
        self._at += count
        self.bytes += count
        while count:
            pieces: list[tuple[bytes, Bytes]] = []
            while count and len(pieces) < _ZERO_PACKETS:
                piece = _ZEROS[: min(count, PLAIN_PIECE)]
                pieces.append((b"", piece))
                count -= len(piece)
            await self._speaker.data(Word.PIECE, pieces)

    def _current(self) -> FileEntry:
        if self._entry is None:
            raise ValueError("data outside a file")
        return self._entry


def attributes(entry: FileEntry) -> list[Saying]:
    """What is said of a file before its data. Raises ValueError for a name that Bacula cannot keep."""
    _check_name(entry.name)
    times = " ".join([str(entry.mtime_s)] * 3)
    return [(Word.FNAME, entry.name), (Word.STAT, format_stat(entry)), (Word.TSTAMP, times)]


def _limit(entry: FileEntry) -> int:
    """Where the file ends at the latest."""
    return entry.size if entry.addressed or entry.size else SIZE_MAX


def _check_name(name: str) -> None:
    if not name or name != name.strip() or not name.isprintable() or len(name.encode()) > 4000:
        raise ValueError(f"{name[:100]!r} is no name that Bacula's protocol can carry")


__all__ = ["ADDRESSED_PIECE", "OBJECT_MAX", "PLAIN_PIECE", "Output", "attributes"]
