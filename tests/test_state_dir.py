# SPDX-License-Identifier: AGPL-3.0-or-later
"""The state directory: checked before it is made, held by one process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from replicator.errors import RefusedError, UsageError
from replicator.state_dir import LOCK, check_directory, open_state_dir


def test_it_is_made_private_and_holds_the_pid(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with open_state_dir(folder) as held:
        assert held == folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / LOCK).read_text() == f"{os.getpid()}\n"


def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with open_state_dir(tmp_path):
        expected = rf"another replctl \(pid {os.getpid()}\) is using"
        with pytest.raises(RefusedError, match=expected), open_state_dir(tmp_path):
            pytest.fail("held twice")
        # Being refused takes nothing from the one that holds it.
        with pytest.raises(RefusedError), open_state_dir(tmp_path):
            pytest.fail("held twice")
    with open_state_dir(tmp_path):
        pass


def test_a_longer_pid_of_an_earlier_holder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("99999999999\n")
    with open_state_dir(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


def test_a_lock_file_that_holds_nonsense_still_locks(tmp_path: Path) -> None:
    with open_state_dir(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\xff\x1b[2J")
        with (
            pytest.raises(RefusedError, match="another replctl is using"),
            open_state_dir(tmp_path),
        ):
            pytest.fail("held twice")


@pytest.mark.parametrize("below", [".", "state", "a/b"])
def test_below_a_file_nothing_can_be_made(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="state_dir: "), open_state_dir(file / below):
        pytest.fail("opened")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_rights_are_asked_for_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user than root would be answered."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        UsageError, match=f"working_dir: {tmp_path}/x cannot be made: {tmp_path} is not writable"
    ):
        check_directory(tmp_path / "x", "working_dir")
    with pytest.raises(UsageError, match=f"working_dir: {tmp_path} is not writable for this user"):
        check_directory(tmp_path, "working_dir")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_takes_no_files_is_said_to_be_so() -> None:
    with (
        pytest.raises(UsageError, match=r"state_dir: /proc is not writable: "),
        open_state_dir(Path("/proc")),
    ):
        pytest.fail("opened")
