# SPDX-License-Identifier: AGPL-3.0-or-later
"""The table of the dialogue: every pair of state and word is either in it or refused."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend.dialogue import ONLY_EXTENDED, TABLE, Dialogue, State, Word
from bacula_adapter.backend.packets import Packet, ProtocolError

#: How the plugin says each of its words.
SAID = {
    Word.HELLO: Packet("C", b"Hello replicator 3 ext=1\n"),
    Word.JOB: Packet("C", b"Job\n"),
    Word.PARAMS: Packet("C", b"Params\n"),
    Word.BACKUP_START: Packet("C", b"BackupStart\n"),
    Word.ESTIMATE_START: Packet("C", b"EstimateStart\n"),
    Word.LISTING_START: Packet("C", b"ListingStart\n"),
    Word.QUERY_START: Packet("C", b"QueryStart\n"),
    Word.RESTORE_START: Packet("C", b"RestoreStart\n"),
    Word.FINISH: Packet("C", b"FINISH\n"),
    Word.CHECKFILE: Packet("C", b"CHECKFILE:@a/b\n"),
    Word.RESULT: Packet("C", b"RESULT T\n"),
    Word.END: Packet("C", b"END\n"),
    Word.FNAME: Packet("C", b"FNAME:@a/b\n"),
    Word.STAT: Packet("C", b"STAT:F 1 0 0 100600 1 1\n"),
    Word.TSTAMP: Packet("C", b"TSTAMP:1 2 3\n"),
    Word.OBJECT: Packet("C", b"RESTOREOBJ:x\n"),
    Word.OBJECT_LENGTH: Packet("C", b"RESTOREOBJ_LEN:1\n"),
    Word.OBJECT_JOB: Packet("C", b"RESTOREOBJ_JOBID:1\n"),
    Word.OBJECT_TYPE: Packet("C", b"RESTOREOBJ_TYPE:25\n"),
    Word.DATA: Packet("C", b"DATA\n"),
    Word.PIECE: Packet("D", b"x"),
    Word.ADDRESSED: Packet("B", b"01234567x"),
    Word.DONE: Packet("F"),
    Word.BROKEN: Packet("E", b"not whole\n"),
    Word.OVER: Packet("T"),
}
LINES = (State.JOB_LINES, State.PARAM_LINES)
ENDINGS = {Word.RESULT, Word.END, Word.OVER}


def at(state: State, *, extended: bool) -> Dialogue:
    dialogue = Dialogue()
    dialogue.state, dialogue.extended = state, extended
    return dialogue


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("state", State)
def test_a_pair_is_in_the_table_or_a_protocol_error(state: State, extended: bool) -> None:
    for word, packet in SAID.items():
        check_pair(state, word, packet, extended=extended)


def check_pair(state: State, word: Word, packet: Packet, *, extended: bool) -> None:
    dialogue = at(state, extended=extended)
    heard = word
    if state in LINES and packet.status == "C" and word is not Word.RESULT:
        heard = Word.LINE  # there any text is a line
    allowed = heard in TABLE[state] and (extended or heard not in ONLY_EXTENDED)
    if state.ours:
        allowed &= heard in ENDINGS  # the plugin may not speak, except of the end
    if state is State.FILE_DATA_AWAITED and extended:
        allowed &= heard is Word.DATA or heard in ENDINGS
    if state is State.FAILED and not allowed:
        assert dialogue.receive(packet).word is heard  # on its way already: thrown away
        assert dialogue.state is State.FAILED
    elif allowed:
        assert dialogue.receive(packet).word is heard
        assert dialogue.state is TABLE[state][heard]
    else:
        with pytest.raises(ProtocolError, match=r"^the plugin said [A-Z]"):
            dialogue.receive(packet)
        assert dialogue.state is state


@pytest.mark.parametrize("state", State)
def test_the_backend_says_only_what_is_in_the_table_and_in_its_turn(state: State) -> None:
    for word in Word:
        dialogue = at(state, extended=True)
        if word in TABLE[state] and (state.ours or word is Word.FAILED):
            dialogue.say(word)
            assert dialogue.state is TABLE[state][word]
        else:
            with pytest.raises(AssertionError):
                dialogue.say(word)


@pytest.mark.parametrize("word", sorted(ONLY_EXTENDED, key=str))
def test_the_extension_is_not_spoken_to_others(word: Word) -> None:
    for state in State:
        if state.ours and word in TABLE[state]:
            with pytest.raises(AssertionError):
                at(state, extended=False).say(word)


def test_every_state_is_reached_and_leads_to_the_end() -> None:
    reached, queue = {State.HELLO}, deque([State.HELLO])
    while queue:
        for target in TABLE[queue.popleft()].values():
            if target not in reached:
                reached.add(target)
                queue.append(target)
    assert reached == set(State)
    for state in State:
        assert state is State.OVER or TABLE[state][Word.OVER] is State.OVER


def test_no_word_of_both_sides_has_two_meanings_in_a_state() -> None:
    """Whoever's turn it is, the other may only speak of the end."""
    for state, row in TABLE.items():
        if not state.ours:
            assert all(word in SAID or word in (Word.LINE, Word.FAILED) for word in row), state


@pytest.mark.parametrize(
    "packet",
    [
        Packet("C", b"SEEN\n"), Packet("C", b"\n"), Packet("C", b"Hell\n"), Packet("A", b"no\n"), Packet("I", b"x\n"),
        Packet("K"), Packet("S"), Packet("C", b"\xff"), Packet("C", b"job\n"), Packet("C", b"Job x\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", [State.JOB, State.START, State.RESTORE, State.BACKED_UP])
def test_what_is_no_word_of_a_plugin(state: State, packet: Packet) -> None:
    with pytest.raises(ProtocolError):
        at(state, extended=True).receive(packet)


@pytest.mark.parametrize(
    ("hello", "extended"),
    [
        (b"Hello replicator 3 ext=1\n", True),
        (b"Hello kubernetes 3\n", False),
        (b"Hello replicator 3 ext=11\n", False),
        (b"Hello ext=1\n", True),
    ],
)
def test_the_extension_is_agreed_on_in_hello(hello: bytes, extended: bool) -> None:
    dialogue = Dialogue()
    dialogue.receive(Packet("C", hello))
    assert dialogue.extended is extended


@given(st.lists(st.sampled_from(list(SAID.values())), max_size=30))
def test_no_conversation_breaks_anything_but_itself(said: list[Packet]) -> None:
    dialogue = Dialogue()
    for packet in said:
        before = dialogue.state
        try:
            dialogue.receive(packet)
        except ProtocolError:
            assert dialogue.state is before
            break
        answers = [word for word in TABLE[dialogue.state] if word not in SAID]
        if dialogue.state.ours and answers and dialogue.extended:
            dialogue.say(answers[0])
