# SPDX-License-Identifier: AGPL-3.0-or-later
"""Log lines, progress and tables, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from replicator.cli.logs import WORKING_FOR, configure
from replicator.cli.progress import progress
from replicator.cli.render import show_history, show_points, show_status
from replicator.domain.views import push_info


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("verbose", "expected"),
    [
        (0, ["e"]),
        (1, ["i", "w", "e", "library"]),
        (2, ["d", "i", "w", "e", "library"]),
        (3, ["d", "i", "w", "e", "library debug", "library"]),
    ],
)
def test_verbose_says_how_much(
    capsys: pytest.CaptureFixture[str], verbose: int, expected: list[str]
) -> None:
    configure(0)
    configure(verbose)  # the second call replaces the first: a line is not written twice
    ours, library = logging.getLogger("receiver.some.module"), logging.getLogger("library")
    for level, text in ((10, "d"), (20, "i"), (30, "w"), (40, "e")):
        ours.log(level, text)
    library.debug("library debug")
    library.warning("library")
    lines = capsys.readouterr().err.splitlines()
    assert [line[33:] for line in lines] == expected


def test_a_record_is_one_line_with_its_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    configure(1)
    record = logging.LogRecord("replicator.x", 20, "", 0, "vm %s\nup", ("\x1b[2Jweb",), None)
    record.created, record.msecs = 0.25, 250.0
    logging.getLogger("replicator.x").handle(record)
    assert (
        capsys.readouterr().err
        == "1970-01-01T00:00:00.250Z INFO    vm \N{REPLACEMENT CHARACTER}[2Jweb up\n"
    )


@pytest.mark.parametrize(
    ("vm", "message", "expected"),
    [
        ("", "the push is given up", "the push is given up"),
        ("db", "the push is given up", "db: the push is given up"),
        ("db", "seed of db to point 1", "seed of db to point 1"),
        ("a.b", "seed of adb to point 1", "a.b: seed of adb to point 1"),
        ("e\x1b[1m", "given up", "e\N{REPLACEMENT CHARACTER}[1m: given up"),
    ],
)
def test_where_there_are_several_vms_a_line_says_which(
    capsys: pytest.CaptureFixture[str], vm: str, message: str, expected: str
) -> None:
    configure(1)
    token = WORKING_FOR.set(vm)
    try:
        logging.getLogger("replicator.push").warning("%s", message)
    finally:
        WORKING_FOR.reset(token)
    assert capsys.readouterr().err.rstrip("\n").endswith(f"WARNING {expected}")


def test_a_listener_that_is_gone_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    configure(1)
    monkeypatch.setattr(sys, "stderr", Gone())
    logging.getLogger("replicator").info("anybody there?")


@pytest.mark.parametrize(("verbose", "traced"), [(2, False), (3, True)])
def test_a_logged_exception_shows_its_traceback_at_verbose_3(
    capsys: pytest.CaptureFixture[str], verbose: int, traced: bool
) -> None:
    configure(verbose)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger("replicator").exception("it failed")
    err = capsys.readouterr().err
    assert ("Traceback" in err) is traced
    assert traced or err.count("\n") == 1


def test_progress_is_a_line_at_every_tenth_where_nobody_watches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO), progress() as report:
        for done in range(0, 1001, 5):
            report("disk-0", done, 1000)
        report("disk-1", 0, 0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"disk-0: {tenth * 10} % of 1000 B" for tenth in range(1, 11)] + [
        "disk-1: 100 % of 0 B"
    ]


def test_progress_on_a_terminal_is_a_bar_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress() as report:
        report("disk-0 [bold]\x1b[2J", 512, 1024)
        report("disk-0 [bold]\x1b[2J", 1024, 1024)
    text = terminal.getvalue()
    assert "disk-0 [bold]\N{REPLACEMENT CHARACTER}[2J" in text
    assert "100%" in text
    assert "1.0/1.0 KiB" in text


STATUS: dict[str, Any] = {
    "vm": "web[red]\x1b", "uuid": "u", "role": "source", "state": "protected", "epoch": 1, "newest_point": 7,
    "rpo_age_s": 75.0, "rpo_target_s": 600, "rpo_forecast_s": 320.0, "warnings": ["recovery point 3 is damaged\x07"],
    "last_cycle": {"point": 7, "kind": "cycle", "duration_s": 1.5, "bytes_pushed": 2048, "committed_at": ""},
    "sampling": {"days": 7, "sampled": 1024, "missed": 0, "missed_percent_max": 0.29},
    "push": None,
}  # fmt: skip
EMPTY = {
    **STATUS,
    "vm": "new",
    "newest_point": None,
    "rpo_age_s": None,
    "rpo_forecast_s": None,
    "last_cycle": None,
    "sampling": None,
    "warnings": [],
}


def test_status_is_a_row_a_vm_and_a_line_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    show_status([STATUS, EMPTY])
    head, first, second, warning, sampled = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "VM",
        "role",
        "state",
        "newest",
        "point",
        "RPO",
        "age",
        "last",
        "cycle",
        "warnings",
    ]
    mark = "\N{REPLACEMENT CHARACTER}"
    assert first.split("  ")[0] == f"web[red]{mark}"
    assert "1 min 15 s" in first
    assert "cycle, 2.0 KiB in 1.5 s" in first
    assert second.split() == ["new", "source", "protected", "-", "-", "-"]
    assert warning == f"web[red]{mark}: recovery point 3 is damaged{mark}"
    assert sampled.startswith(f"web[red]{mark}: 95 % sure that change tracking missed under 0.30 %")


def test_what_is_warned_of_for_every_vm_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    ends = "certificate /x expires in 3 days"
    show_status([{**STATUS, "warnings": [ends, "damaged"]}, {**EMPTY, "warnings": [ends]}])
    out = capsys.readouterr().out
    assert out.count(ends) == 1
    assert f"\nall VMs: {ends}\n" in out
    assert ": damaged\n" in out
    # Of one VM it is that VM's.
    show_status([{**EMPTY, "warnings": [ends]}])
    assert capsys.readouterr().out.splitlines()[2] == f"new: {ends}"


def test_status_shows_the_push_that_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    began = 1_700_000_000_000_000
    sent = push_info(1, "seed", began, done=56 << 34, total=100 << 34, sent=410 << 30, eta_s=10_900)
    received = push_info(1, "seed\x1b", began, received=3 << 20)
    show_status([{**EMPTY, "push": sent}, {**EMPTY, "push": received}])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "new: pushing point 1 (seed): 56 % of 1.6 TiB looked at, 410.0 GiB sent, about 3 h left,"
        " since 2023-11-14T22:13:20.000Z"
    )
    mark = "\N{REPLACEMENT CHARACTER}"
    assert second == (
        f"new: receiving point 1 (seed{mark}): 3.0 MiB received, since 2023-11-14T22:13:20.000Z"
    )


@pytest.mark.parametrize(
    ("age_s", "target_s", "forecast_s", "shown"),
    [
        (75.0, 600, 320.0, "1 min 15 s"),
        (75.0, 600, 600.5, "1 min 15 s, to be 10 min 0 s"),
        # It is what it will be.
        (700.0, 600, 700.0, "11 min 40 s"),
        (75.0, None, 6000.0, "1 min 15 s"),
        (75.0, 600, None, "1 min 15 s"),
    ],
)
def test_an_age_that_will_be_too_great_is_shown_beside_the_age(
    capsys: pytest.CaptureFixture[str],
    age_s: float,
    target_s: int | None,
    forecast_s: float | None,
    shown: str,
) -> None:
    rpo = {"rpo_age_s": age_s, "rpo_target_s": target_s, "rpo_forecast_s": forecast_s}
    show_status([{**STATUS, **rpo}])
    row = capsys.readouterr().out.splitlines()[1]
    assert f"  {shown}  " in row


def test_points_and_history_are_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    point = {
        "point": 1, "taken_at": "T1", "committed_at": "T2", "parent": None, "root": "ab" * 32, "bytes_pushed": 5,
        "state": "damaged",
    }  # fmt: skip
    show_points([point])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "1",
        "T1",
        "T2",
        "-",
        "5",
        "B",
        "damaged",
        "ab" * 8,
    ]
    event = {
        "id": 4, "at": "T", "kind": "k", "root": "ab" * 32, "parent": None, "disks": [{"disk": "a"}, {"disk": "b"}],
        "damage": {"disk": "disk-0", "offset": 9}, "points": [1, 2],
    }  # fmt: skip
    show_history([event])
    row = capsys.readouterr().out.splitlines()[1]
    assert row == f"4   T   k      root={'ab' * 8}, disks: 2, disk=disk-0, offset=9, points=[1, 2]"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_status([EMPTY])
    assert "\x1b[32mprotected\x1b[0m" in terminal.getvalue()
