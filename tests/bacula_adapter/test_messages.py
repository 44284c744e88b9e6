# SPDX-License-Identifier: AGPL-3.0-or-later
"""What of a process's log becomes messages of a job, and what never does."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend.messages import (
    MESSAGE_MAX,
    Logging,
    MessageQueue,
    Redactor,
    clip,
    told,
)
from replicator.config import check
from replicator.errors import UsageError
from tests.cli.conftest import KEY

_logger = logging.getLogger("replicator.test")


class Desk:
    """Logging as a session has it."""

    def __init__(self) -> None:
        self.redactor = Redactor()
        self.woken = 0
        self.queue = MessageQueue(self.redactor, self.wake)
        self.logging = Logging(self.queue, self.redactor)

    def wake(self) -> None:
        self.woken += 1

    def follow(self, **values: str) -> None:
        config = check({"debug_log": "/dev/null", **values})
        self.redactor.add_from(config)
        self.logging.follow(config)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    with made.logging:
        yield made


def test_levels_become_statuses(desk: Desk) -> None:
    _logger.debug("no")
    _logger.info("a %d", 1)
    _logger.warning("b")
    _logger.error("c")
    logging.getLogger("somebody.else").info("no")
    logging.getLogger("somebody.else").warning("d")
    assert desk.queue.take() == [("I", "a 1"), ("W", "b"), ("Q", "c"), ("W", "d")]
    assert desk.woken == 4
    assert not desk.queue


@pytest.mark.parametrize(
    ("verbose", "said"), [("0", "Q"), ("1", "IWQ"), ("2", "IWQ"), ("3", "IWQ")]
)
def test_verbose(desk: Desk, verbose: str, said: str, tmp_path: Path) -> None:
    desk.follow(verbose=verbose, debug_log=str(tmp_path / "log"))
    try:
        raise OSError(5, "gone")
    except OSError:
        _logger.debug("d", exc_info=True)
    _logger.info("i")
    _logger.warning("w")
    _logger.error("e")
    assert "".join(status for status, _ in desk.queue.take()) == said
    log = (tmp_path / "log").read_text()
    assert ("DEBUG" in log) == (verbose in "23")
    assert ("Traceback" in log) == (verbose == "3")
    assert ("INFO" in log) == (verbose != "0")


def test_the_log_file(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "backend.log"
    desk.follow(debug_log=str(path), user="u", password="hunter22")
    _logger.info("the password is hunter22, said\nin two lines")
    (line,) = path.read_text().splitlines()
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\dT[\d:.]+Z {os.getpid()} INFO    the password is \*\*\*, said in two lines",
        line,
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("where", ["missing/backend.log", "link", ""])
def test_a_log_file_that_cannot_be_had_is_warned_of_once(
    desk: Desk, tmp_path: Path, where: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    desk.follow(debug_log=str(tmp_path / where))
    _logger.info("goes on")
    (warning, message) = desk.queue.take()
    assert warning[0] == "W"
    assert warning[1].startswith(f"debug_log: {tmp_path / where}: ")
    assert message == ("I", "goes on")


def test_logging_is_left_as_it_was() -> None:
    before = list(logging.getLogger().handlers), logging.getLogger("replicator").level
    desk = Desk()
    with desk.logging:
        desk.follow(verbose="3")
    assert (list(logging.getLogger().handlers), logging.getLogger("replicator").level) == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("login with hunter22 failed", "login with *** failed"),
        (f"key {KEY}", "key ***"),
        ("password=abc rest", "password=*** rest"),
        ("Password: abc", "Password: ***"),
        ('passwd = "a b" rest', "passwd = *** rest"),
        ("Authorization: Basic YWJj rest", "Authorization: *** rest"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("dr_auth_token=zz", "dr_auth_token=***"),
        ("X-ntnx-api-key: zz", "X-ntnx-api-key: ***"),
        ("password stands in the plugin string", "password stands in the plugin string"),
        ("passfile: missing", "passfile: missing"),
    ],
)
def test_secrets_stay_behind(text: str, shown: str) -> None:
    redactor = Redactor()
    redactor.add_from(check({"user": "u", "password": "hunter22", "dr_auth_token": f"{KEY}"}))
    redactor.add(["", "abc"])  # too short to be looked for
    assert redactor.clean(text) == shown


def test_a_secret_in_another_is_no_way_out() -> None:
    redactor = Redactor()
    redactor.add(["abcd"])
    redactor.add(["abcdefgh"])
    assert redactor.clean("abcdefgh abcd") == "*** ***"


def test_the_path_of_a_secret_is_none() -> None:
    redactor = Redactor()
    redactor.add_from(check({"dr_auth_token": "/etc/replicator/token"}))
    assert redactor.clean("/etc/replicator/token") == "/etc/replicator/token"


@given(st.text(max_size=3000))
def test_a_message_is_one_short_line(text: str) -> None:
    said = clip(text)
    assert len(said.encode()) <= MESSAGE_MAX
    assert said.isprintable()


def test_a_long_message_is_cut_at_a_character() -> None:
    said = clip("é" * 2000)
    assert len(said.encode()) in (MESSAGE_MAX - 1, MESSAGE_MAX)
    assert said.endswith("é…")


def test_errors_in_a_line() -> None:
    assert told(UsageError("vm: no\nsuch")) == "vm: no such"
    assert told(OSError(28, "No space left on device", "/x")) == "/x: No space left on device"
    assert told(BaseExceptionGroup("", [ValueError("x"), UsageError("vm: no")])) == "vm: no"
    assert told(KeyboardInterrupt()) == "interrupted"
    assert told(ValueError("x")).startswith("internal error: ValueError: x")
