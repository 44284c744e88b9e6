# SPDX-License-Identifier: AGPL-3.0-or-later
"""A job's lines, and whether its file daemon encrypts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend import job_info
from bacula_adapter.backend.interface import JobInfo, JobKind, Level
from bacula_adapter.backend.job_info import decide_streams, parse_job, why_plain
from bacula_adapter.backend.packets import ProtocolError
from replicator.config import check
from replicator.errors import UsageError

LINES = [
    "Name=Job.2026-11-25_10.00.00_03",
    "JobID=7",
    "Type=R",
    "Where=/r",
    "Replace=w",
    "no equals sign",
]


def test_a_job() -> None:
    job = parse_job(LINES, extended=True)
    assert job == JobInfo(
        name="Job.2026-11-25_10.00.00_03", job_id=7, kind=JobKind.RESTORE, where="/r", replace="w", addressed=True
    )  # fmt: skip
    assert job.level is Level.FULL
    assert not parse_job(LINES, extended=False).addressed


def test_where_it_goes_to() -> None:
    assert parse_job(["Name=x", "Type=R"], extended=True).where == ""
    by_rule = parse_job(["Name=x", "Type=R", "RegexWhere=!a!b!"], extended=True)
    assert (by_rule.where, by_rule.regex_where) == (None, "!a!b!")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Name=", "the job has no Name="),
        ("Name=" + "x" * 256, "Name= is too long"),
        ("Name=a\x07b", "Name= is too long, or not printable"),
        ("Type=X", "Type=X is none of B, R, E"),
        ("Type=BR", "Type=BR is none of"),
        ("Level=f", "Level=f is none of F, D, I"),
        ("JobID=-1", "JobID: '-1' is no number from 0 to"),
        ("JobID=4294967296", "JobID: "),
        ("JobID=" + "9" * 5000, "JobID: "),
        ("Since=1e9", "Since: "),
        ("Since=99999999999999999999", "Since: "),
        ("Replace=x", "Replace=x is none of a, w, n, o"),
        ("Accurate=2", "Accurate=2 is none of"),
        ("Where=" + "x" * 5000, "Where= is too long"),
    ],
)
def test_what_no_job_is(line: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse_job(["Name=x", "Type=B", line], extended=True)


@given(st.lists(st.text(max_size=40), max_size=8))
def test_any_lines_are_a_job_or_an_error(lines: list[str]) -> None:
    try:
        assert parse_job(["Name=x", "Type=B", *lines], extended=True).name
    except ProtocolError as error:
        assert str(error).isprintable()  # noqa: PT017 - either is fine


FD = """
# PKI Encryption = yes
FileDaemon {
  Name = fd ; WorkingDirectory = "/var # not a comment"
  %s
}
"""


@pytest.mark.parametrize(
    ("directive", "encrypts"),
    [
        ("PKI Encryption = yes", True),
        ("PKI Encryption = Yes # by order", True),
        ("pkiencryption=true", True),
        ("P K I  E n c r y p t i o n = yes;", True),
        ('PKI Encryption = "yes"', True),
        ("Maximum Concurrent Jobs = 2; PKI Encryption = yes; Heartbeat Interval = 5", True),
        ("PKI Signatures = yes", False),
        ("PKI Encryption = no", False),
        ("# PKI Encryption = yes", False),
        ('Description = "PKI Encryption = yes"', False),
        ("", False),
    ],
)
def test_whether_a_daemon_encrypts(tmp_path: Path, directive: str, encrypts: bool) -> None:
    path = tmp_path / "bacula-fd.conf"
    path.write_text(FD % directive)
    assert ("the file daemon encrypts" in why_plain(path)) == encrypts
    assert bool(why_plain(path)) == encrypts


@pytest.mark.parametrize("directive", ["@/etc/bacula/pki.conf", "  @|generate", "Name = x; @more"])
def test_what_is_elsewhere_may_encrypt(tmp_path: Path, directive: str) -> None:
    path = tmp_path / "bacula-fd.conf"
    path.write_text(FD % directive)
    assert "includes other files (@)" in why_plain(path)


def test_an_address_is_no_include(tmp_path: Path) -> None:
    path = tmp_path / "bacula-fd.conf"
    path.write_text(FD % 'Description = "@home"\nPassword = @home')
    assert not why_plain(path)


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in why_plain(tmp_path / "gone")
    assert "cannot be found from here" in why_plain(Path("conf/bacula-fd.conf"))
    assert "cannot be read" in why_plain(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be read" in why_plain(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * ((4 << 20) + 1))
    assert "cannot be read" in why_plain(tmp_path / "large")


def test_which_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "bacula-fd.conf"
    path.write_text(FD % "PKI Encryption = yes")
    lines = ["Name=x", "Type=B", f"FDConfig={path}"]
    ours, stock = parse_job(lines, extended=True), parse_job(lines, extended=False)

    def decide(job: JobInfo, streams: str) -> bool:
        return decide_streams(job, check({"bacula_streams": streams}))

    assert not decide(ours, "plain")
    assert decide(ours, "addressed")
    assert not decide(stock, "auto")
    assert caplog.messages == []
    assert not decide(ours, "auto")
    assert "plain streams, zeros included: the file daemon encrypts" in caplog.text
    with pytest.raises(UsageError, match=r"bacula_streams: addressed needs replicator-fd\.so"):
        decide(stock, "addressed")
    path.write_text(FD % "")
    assert decide(ours, "auto")
    unnamed = parse_job(lines[:2], extended=True)
    monkeypatch.setattr(job_info, "FD_CONFIG", path)
    assert decide(unnamed, "auto")
    monkeypatch.setattr(job_info, "FD_CONFIG", tmp_path / "gone")
    assert not decide(unnamed, "auto")
