# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.failover.console import LINE_MAX, FirstLine, clean_line


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (b"\r\n\n  \r\nhello\r\n", "hello"),
        (b"\x1b[2J\x1b[1;31mred\x1b[0m  text\n", "red text"),
        (b"\x1b]0;title\x07\x1b(Bdebian login\n", "debian login"),
        (b"\x1b[H\r\n\x1bc\x07\x00\nafter\n", "after"),
        ("grün\n".encode(), "grün"),
        (b"\xff\xfe bytes\n", "bytes"),
        (b"progress 1\rprogress 2\r\n", "progress 1"),
    ],
)
def test_the_first_line_with_something_to_read_is_found_however_it_arrives(
    output: bytes, line: str
) -> None:
    whole, single = FirstLine(), FirstLine()
    assert whole.feed(output)
    for at in range(len(output)):
        single.feed(output[at : at + 1])
    assert whole.line == single.line == line


def test_a_prompt_without_an_end_counts_when_no_more_is_waited_for() -> None:
    first = FirstLine()
    assert not first.feed(b"login: ")
    assert first.give_up() == "login:"
    assert FirstLine().give_up() is None


def test_a_guest_that_never_ends_its_line_does_not_fill_memory() -> None:
    first = FirstLine()
    assert first.feed(b"x" * 5000)
    assert first.line == "x" * LINE_MAX
    blank = FirstLine()
    for _ in range(100):
        assert not blank.feed(b"\x1b[0m" * 2000)
    assert blank.give_up() is None


@given(st.binary(max_size=600))
def test_nothing_that_a_terminal_obeys_is_left(raw: bytes) -> None:
    line = clean_line(raw)
    assert line.isprintable()
    assert len(line) <= LINE_MAX
