# SPDX-License-Identifier: AGPL-3.0-or-later
"""What may be said when: the dialogue of docs/backend-protocol.md as one table. No I/O, no work.

A state says whose turn it is. A pair of state and word that is not in the table is a protocol error, or a defect of ours.
Messages (Q, W, I) and signs of life (K) are no words: they may stand before any packet of the backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from bacula_adapter.backend.packets import Packet, ProtocolError

#: What our plugin adds to its Hello, and we to our answer.
EXTENSION: Final = "ext=1"


class Word(Enum):
    """What can be said. The value: status, and how the text begins; ``=``: all of it."""

    # Said by the plugin
    HELLO = "C Hello "
    JOB = "C =Job"
    PARAMS = "C =Params"
    BACKUP_START = "C =BackupStart"
    ESTIMATE_START = "C =EstimateStart"
    LISTING_START = "C =ListingStart"
    QUERY_START = "C =QueryStart"
    RESTORE_START = "C =RestoreStart"
    FINISH = "C =FINISH"
    CHECKFILE = "C CHECKFILE:"
    RESULT = "C RESULT "
    END = "C =END"
    #: ``key=value``: what begins like nothing else.
    LINE = "C"
    # Said by both
    FNAME = "C FNAME:"
    STAT = "C STAT:"
    TSTAMP = "C TSTAMP:"
    OBJECT = "C RESTOREOBJ:"
    OBJECT_LENGTH = "C RESTOREOBJ_LEN:"
    OBJECT_JOB = "C RESTOREOBJ_JOBID:"
    OBJECT_TYPE = "C RESTOREOBJ_TYPE:"
    DATA = "C =DATA"
    PIECE = "D"
    ADDRESSED = "B"
    DONE = "F"
    BROKEN = "E"
    OVER = "T"
    # Said by the backend
    WELCOME = "C Hello Bacula"
    TIMEOUT = "C TIMEOUT:"
    CLAIM = "C CLAIM:"
    OFFSETS = "C =OFFSETS"
    OPTIONS = "C PLUGINCONF:"
    OPTIONS_LENGTH = "C PLUGINCONF_LEN:"
    SEEN = "C =SEEN"
    GONE = "C =GONE"
    ANSWER = "C key=value"
    SEND = "C =OK"
    SKIP = "C =SKIP"
    CORE = "C =CORE"
    RESULT_OK = "C =RESULT OK"
    FAILED = "A"


class State(Enum):
    """Where the dialogue is. The value: whose turn it is, P for the plugin."""

    HELLO = "P hello"
    WELCOME = "B welcome"
    JOB = "P job"
    JOB_LINES = "P job lines"
    JOB_TAKEN = "B job taken"
    PARAMS = "P params"
    PARAM_LINES = "P param lines"
    PARAMS_TAKEN = "B params taken"
    START = "P start"
    # A backup
    BACKUP_OPENING = "B backup opening"
    BACKUP = "B backup"
    ATTRIBUTES = "B attributes"
    CONTENT = "B content"
    DATA = "B data"
    OBJECT = "B object"
    OBJECT_DATA = "B object data"
    OPTIONS = "B options"
    BACKED_UP = "P backed up"
    CHECKING = "B checking"
    # Estimate and listing; query
    LIST_OPENING = "B list opening"
    LIST = "B list"
    LIST_ATTRIBUTES = "B list attributes"
    LISTED = "P listed"
    QUERY_OPENING = "B query opening"
    QUERY = "B query"
    # A restore
    RESTORE_OPENING = "B restore opening"
    RESTORE = "P restore"
    RESTORE_OBJECT = "P restore object"
    RESTORE_OBJECT_DATA = "P restore object data"
    OBJECT_TAKING = "B object taking"
    FILE_ATTRIBUTES = "P file attributes"
    FILE_CREATING = "B file creating"
    FILE_DATA_AWAITED = "P file data awaited"
    FILE_DATA = "P file data"
    FILE_CLOSING = "B file closing"
    FINISHING = "B finishing"
    RESTORED = "P restored"
    # The end
    FAILED = "P failed"
    VERDICT = "B verdict"
    JUDGED = "P judged"
    ENDING = "B ending"
    ENDED = "P ended"
    OVER = "P over"

    @property
    def ours(self) -> bool:
        """Whether it is the backend's turn."""
        return self.value[0] == "B"


_S, _W = State, Word

#: State, word, next state, in the order of a job. ``FAILED`` (the backend's) and what can interrupt are added below.
_TABLE: Final[Mapping[State, Mapping[Word, State]]] = {
    _S.HELLO: {_W.HELLO: _S.WELCOME},
    _S.WELCOME: {_W.WELCOME: _S.JOB},
    _S.JOB: {_W.JOB: _S.JOB_LINES},
    _S.JOB_LINES: {_W.LINE: _S.JOB_LINES, _W.DONE: _S.JOB_TAKEN},
    _S.JOB_TAKEN: {_W.DONE: _S.PARAMS},
    _S.PARAMS: {_W.PARAMS: _S.PARAM_LINES},
    _S.PARAM_LINES: {_W.LINE: _S.PARAM_LINES, _W.DONE: _S.PARAMS_TAKEN},
    _S.PARAMS_TAKEN: {_W.DONE: _S.START},
    _S.START: {
        _W.BACKUP_START: _S.BACKUP_OPENING,
        _W.ESTIMATE_START: _S.LIST_OPENING,
        _W.LISTING_START: _S.LIST_OPENING,
        _W.QUERY_START: _S.QUERY_OPENING,
        _W.RESTORE_START: _S.RESTORE_OPENING,
    },
    _S.BACKUP_OPENING: {
        _W.TIMEOUT: _S.BACKUP_OPENING,
        _W.CLAIM: _S.BACKUP_OPENING,
        _W.DONE: _S.BACKUP,
    },
    _S.BACKUP: {
        _W.FNAME: _S.ATTRIBUTES,
        _W.OBJECT: _S.OBJECT,
        _W.OPTIONS: _S.OPTIONS,
        _W.DONE: _S.BACKED_UP,
    },
    _S.ATTRIBUTES: {
        _W.STAT: _S.ATTRIBUTES,
        _W.TSTAMP: _S.ATTRIBUTES,
        _W.OFFSETS: _S.ATTRIBUTES,
        _W.DONE: _S.CONTENT,
    },
    _S.CONTENT: {_W.DATA: _S.DATA, _W.DONE: _S.BACKUP},
    _S.DATA: {_W.PIECE: _S.DATA, _W.ADDRESSED: _S.DATA, _W.DONE: _S.BACKUP},
    _S.OBJECT: {_W.OBJECT_LENGTH: _S.OBJECT_DATA},
    _S.OPTIONS: {_W.OPTIONS_LENGTH: _S.OBJECT_DATA},
    _S.OBJECT_DATA: {_W.PIECE: _S.OBJECT_DATA, _W.DONE: _S.BACKUP},
    _S.BACKED_UP: {_W.CHECKFILE: _S.CHECKING},
    _S.CHECKING: {_W.SEEN: _S.BACKED_UP, _W.GONE: _S.BACKED_UP},
    _S.LIST_OPENING: {_W.TIMEOUT: _S.LIST_OPENING, _W.DONE: _S.LIST},
    _S.LIST: {_W.FNAME: _S.LIST_ATTRIBUTES, _W.DONE: _S.LISTED},
    _S.LIST_ATTRIBUTES: {
        _W.STAT: _S.LIST_ATTRIBUTES,
        _W.TSTAMP: _S.LIST_ATTRIBUTES,
        _W.DONE: _S.LIST,
    },
    _S.LISTED: {},
    _S.QUERY_OPENING: {_W.TIMEOUT: _S.QUERY_OPENING, _W.DONE: _S.QUERY},
    _S.QUERY: {_W.ANSWER: _S.QUERY, _W.DONE: _S.LISTED},
    _S.RESTORE_OPENING: {_W.TIMEOUT: _S.RESTORE_OPENING, _W.DONE: _S.RESTORE},
    _S.RESTORE: {
        _W.OBJECT: _S.RESTORE_OBJECT,
        _W.FNAME: _S.FILE_ATTRIBUTES,
        _W.FINISH: _S.FINISHING,
    },
    _S.RESTORE_OBJECT: {
        _W.OBJECT_JOB: _S.RESTORE_OBJECT,
        _W.OBJECT_TYPE: _S.RESTORE_OBJECT,
        _W.OBJECT_LENGTH: _S.RESTORE_OBJECT_DATA,
    },
    _S.RESTORE_OBJECT_DATA: {_W.PIECE: _S.RESTORE_OBJECT_DATA, _W.DONE: _S.OBJECT_TAKING},
    _S.OBJECT_TAKING: {_W.SEND: _S.RESTORE},
    _S.FILE_ATTRIBUTES: {
        _W.STAT: _S.FILE_ATTRIBUTES,
        _W.TSTAMP: _S.FILE_ATTRIBUTES,
        _W.DONE: _S.FILE_CREATING,
    },
    _S.FILE_CREATING: {
        _W.SEND: _S.FILE_DATA_AWAITED,
        _W.SKIP: _S.RESTORE,
        _W.CORE: _S.RESTORE,
    },
    # Without the extension no data are announced of an empty file: the next object, file or FINISH follows at once.
    _S.FILE_DATA_AWAITED: {
        _W.DATA: _S.FILE_DATA,
        _W.OBJECT: _S.RESTORE_OBJECT,
        _W.FNAME: _S.FILE_ATTRIBUTES,
        _W.FINISH: _S.FINISHING,
    },
    _S.FILE_DATA: {
        _W.PIECE: _S.FILE_DATA,
        _W.ADDRESSED: _S.FILE_DATA,
        _W.DONE: _S.FILE_CLOSING,
        _W.BROKEN: _S.FILE_CLOSING,
    },
    _S.FILE_CLOSING: {_W.SEND: _S.RESTORE},
    _S.FINISHING: {_W.DONE: _S.RESTORED},
    _S.RESTORED: {},
    _S.FAILED: {},
    _S.VERDICT: {_W.RESULT_OK: _S.JUDGED, _W.BROKEN: _S.JUDGED},
    _S.JUDGED: {},
    _S.ENDING: {_W.DONE: _S.ENDED},
    _S.ENDED: {},
    _S.OVER: {},
}

#: In these the plugin's last word was about the end: it has nothing to interrupt.
_LAST = frozenset({_S.VERDICT, _S.ENDING, _S.ENDED, _S.OVER})


def _with_interruptions() -> Mapping[State, Mapping[Word, State]]:
    """The table, and what may happen anywhere: the backend fails; Bacula has decided, ends the job, or goes away."""
    table = {}
    for state, row in _TABLE.items():
        more: dict[Word, State] = {_W.OVER: _S.OVER} if state is not _S.OVER else {}
        if state not in _LAST and state not in (_S.HELLO, _S.WELCOME):
            more[_W.END] = _S.ENDING
            if state is not _S.JUDGED:
                more[_W.RESULT] = _S.VERDICT
                more[_W.FAILED] = _S.FAILED
        if state in (_S.HELLO, _S.WELCOME):
            more[_W.FAILED] = _S.FAILED
        if state is _S.ENDING:
            more[_W.FAILED] = _S.ENDED  # in place of F: what stood at the end could not be done
        table[state] = MappingProxyType({**row, **more})
    return MappingProxyType(table)


TABLE: Final = _with_interruptions()

#: Words that are said only where the extension was agreed on.
ONLY_EXTENDED: Final = frozenset(
    {
        _W.RESULT, _W.CHECKFILE, _W.OBJECT_JOB, _W.OBJECT_TYPE, _W.ADDRESSED, _W.TIMEOUT, _W.CLAIM, _W.OFFSETS,
        _W.OPTIONS, _W.BROKEN,
    }
)  # fmt: skip
#: Of a file that is to be sent data follow always with the extension.
_NOT_EXTENDED: Final = {_S.FILE_DATA_AWAITED: frozenset({_W.OBJECT, _W.FNAME, _W.FINISH})}

_FROM_PLUGIN: Final = tuple(
    word
    for word in Word
    if word
    in (
        _W.HELLO, _W.JOB, _W.PARAMS, _W.BACKUP_START, _W.ESTIMATE_START, _W.LISTING_START, _W.QUERY_START,
        _W.RESTORE_START, _W.FINISH, _W.CHECKFILE, _W.RESULT, _W.END, _W.FNAME, _W.STAT, _W.TSTAMP, _W.OBJECT,
        _W.OBJECT_LENGTH, _W.OBJECT_JOB, _W.OBJECT_TYPE, _W.DATA,
    )
)  # fmt: skip
_BY_STATUS: Final = {
    word.value: word for word in (_W.PIECE, _W.ADDRESSED, _W.DONE, _W.BROKEN, _W.OVER)
}
_WHOLE: Final = {word.value[3:]: word for word in _FROM_PLUGIN if word.value[2] == "="}
_BEGINNINGS: Final = tuple((word.value[2:], word) for word in _FROM_PLUGIN if word.value[2] != "=")


@dataclass(frozen=True, slots=True)
class Said:
    """A word of the plugin. ``text``: what follows its beginning; ``data``: the payload of D and B."""

    word: Word
    text: str = ""
    data: bytes = b""


class Dialogue:
    """The state, moved by what is said. ``extended``: both sides know the extension."""

    def __init__(self) -> None:
        self.state = State.HELLO
        self.extended = False

    def receive(self, packet: Packet) -> Said:
        """What the plugin says with a packet. Raises ProtocolError if it may not say that now."""
        said = self._take_apart(packet)
        if not self._may(said.word, self.state.ours):
            if self.state is State.FAILED:
                return said  # it was on its way already
            shown = packet.payload[:40].decode("ascii", "replace") if packet.status == "C" else ""
            raise ProtocolError(
                f"the plugin said {packet.status} {shown!r} where {self.state.value[2:]} was at hand"
            )
        self.state = TABLE[self.state][said.word]
        if said.word is Word.HELLO:
            self.extended = EXTENSION in said.text.split()
        return said

    def say(self, word: Word) -> None:
        """The backend says a word. One that may not be said now is a defect of ours."""
        target = TABLE[self.state].get(word)
        assert target is not None, f"{word} in {self.state}"
        assert self.extended or word not in ONLY_EXTENDED, word
        assert self.state.ours or word is Word.FAILED, f"{word} in {self.state}"
        self.state = target

    def _may(self, word: Word, ours: bool) -> bool:
        if word not in TABLE[self.state]:
            return False
        if ours:
            return word in (_W.END, _W.OVER) or (word is _W.RESULT and self.extended)
        if self.extended:
            return word not in _NOT_EXTENDED.get(self.state, ())
        return word not in ONLY_EXTENDED

    def _take_apart(self, packet: Packet) -> Said:
        if packet.status in ("D", "B"):
            return Said(_BY_STATUS[packet.status], data=packet.payload)
        if packet.status != "C":
            word = _BY_STATUS.get(packet.status)
            if word is None:
                raise ProtocolError(f"the plugin sent a packet {packet.status}")
            return Said(word, packet.text())
        text = packet.text()
        # Between Job or Params and their end all lines are what they are.
        if self.state in (State.JOB_LINES, State.PARAM_LINES) and not text.startswith("RESULT "):
            return Said(Word.LINE, text)
        if text in _WHOLE:
            return Said(_WHOLE[text])
        for beginning, word in _BEGINNINGS:
            if text.startswith(beginning):
                return Said(word, text[len(beginning) :])
        raise ProtocolError(f"the plugin said {text[:40]!r}, which is no command")


__all__ = ["EXTENSION", "ONLY_EXTENDED", "TABLE", "Dialogue", "Said", "State", "Word"]
