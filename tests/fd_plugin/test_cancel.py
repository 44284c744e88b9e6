# SPDX-License-Identifier: AGPL-3.0-or-later
"""A job that is cancelled, at any place: the backend hears of it at once, and of the verdict, and the daemon gets its job back."""

from __future__ import annotations

import pytest

from tests.fd_plugin.driving import STRING, Daemon, Script, Step, named_file, plain_file

DISK = "@image/vm/disks/disk-0.raw"
FILE = f"file={STRING}|/r/a|3|1|1000000|0+1000000"
HANG: list[Step] = [["hang"], ["verdict"]]

#: Call in which the daemon is when it is cancelled, and what the backend does: it works until it hears of that.
BACKUP: dict[str, list[Step]] = {
    "start": [["handshake"], *HANG],
    "open": [["handshake"], *named_file(DISK, 500_000), *HANG],
    "read": [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["data", None, 300_000],
        *HANG,
    ],
    "end": [["handshake"], *plain_file(DISK, 9), *HANG],
}
RESTORE: dict[str, list[Step]] = {
    "create": [["handshake"], ["until", "C", "FNAME"], *HANG],
    "write": [
        ["handshake"],
        ["until", "F"],
        ["send", "C", "OK"],
        ["until", "C", "DATA"],
        *HANG,
    ],
    "close": [
        ["handshake"],
        ["until", "F"],
        ["send", "C", "OK"],
        ["until", "C", "DATA"],
        *HANG,
    ],
    "event6": [["handshake"], ["restore", {}], *HANG],
}


@pytest.mark.parametrize("place", BACKUP)
def test_in_a_backup(daemon: Daemon, interface: int, place: str) -> None:
    done = daemon.run(interface, "backup", BACKUP[place], f"cancel={place}")
    assert done.named("cancel") == ["0"]
    assert done.status == "A"
    assert done.fatal == []
    heard = done.heard()
    assert heard.index("signal SIGUSR1") < heard.index("C RESULT A")
    assert heard[-2:] == ["C END", "T"]


@pytest.mark.parametrize("place", RESTORE)
def test_in_a_restore(daemon: Daemon, interface: int, place: str) -> None:
    big = f"file={STRING}|/r/a|3|1|9000000|0+9000000"
    options = [big if place == "write" else FILE, f"cancel={place}"]
    done = daemon.run(interface, "restore", RESTORE[place], *options)
    assert done.status == "A"
    assert done.fatal == []
    heard = done.heard()
    # Where the verdict comes at the same time, the backend may have ended before it is signalled.
    assert "signal SIGUSR1" in heard or place == "event6"
    assert "C RESULT A" in heard
    assert "C RESULT T" not in heard
    assert heard[-1] == "T"


def test_before_the_backend_listens(daemon: Daemon, interface: int) -> None:
    """It may never get to its handler: what it has not begun needs no end."""
    done = daemon.run(interface, "backup", [["hang"], ["verdict"]], "cancel=event9")
    assert done.status == "A"
    assert done.fatal == []


def test_before_there_is_a_backend(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "backup", [["hang"]], "cancel=event3", "cancel_first=1")
    assert done.status == "A"
    assert done.messages == []


def test_a_file_that_was_cancelled_is_never_whole(daemon: Daemon, interface: int) -> None:
    """The daemon closes it as if it were: attributes set, then IO_CLOSE."""
    script: Script = [["handshake"], ["restore", {}]]
    done = daemon.run(interface, "restore", script, FILE, "cancel=close", "cancel_first=1")
    heard = done.heard()
    assert done.status == "A"
    assert "F" not in heard[heard.index("C DATA") :]
    assert "C RESULT A" in heard


def test_a_backend_that_does_not_undo_is_not_waited_for_without_end(
    daemon: Daemon, interface: int
) -> None:
    """E instead of an answer, then nothing: the end comes all the same, and no reference has moved."""
    script: Script = [
        ["handshake"],
        *named_file(DISK, 9),
        ["hang"],
        ["until", "C", "RESULT"],
        ["send", "E", "cannot undo"],
        ["exit", 1],
    ]
    done = daemon.run(interface, "backup", script, "cancel=open")
    assert done.status == "A"
    assert done.fatal == []
    assert "ERROR replicator: cannot undo" in done.messages


def test_the_signal_does_not_reach_a_stranger(daemon: Daemon, interface: int) -> None:
    """The backend is long gone when the cancellation comes."""
    script: Script = [["handshake"], *named_file(DISK, 9), ["kill"]]
    done = daemon.run(interface, "backup", script, "cancel=event4", "cancel_first=1")
    assert done.named("cancel") == ["0"]
    assert done.named("open-failed")


@pytest.mark.parametrize(("status", "verdict"), [("A", "A"), ("f", "f")])
def test_within_a_call_of_the_plugin(
    daemon: Daemon, interface: int, status: str, verdict: str
) -> None:
    """15.0 may find a broken network while it passes a message on."""
    script: Script = [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["send", "W", "slow"],
        ["data", None, 500_000],
        ["send", "F"],
        ["verdict"],
    ]
    done = daemon.run(interface, "backup", script, "cancel=message", f"status={status}")
    assert done.named("cancel") == ["0"]
    assert done.fatal == []
    assert done.heard()[-3:] == [f"C RESULT {verdict}", "C END", "T"]


def test_a_cancelled_job_that_bacula_takes_for_good_is_not(daemon: Daemon, interface: int) -> None:
    """Its file was cut by the cancellation, of which then nothing came."""
    script: Script = [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["send", "W", "slow"],
        ["data", None, 500_000],
        ["send", "F"],
        ["verdict"],
    ]
    done = daemon.run(interface, "backup", script, "cancel=message", "status=T")
    assert done.fatal == ["the job is not complete, although Bacula took it for good"]
    assert done.status == "f"
    assert "C RESULT f" in done.heard()
