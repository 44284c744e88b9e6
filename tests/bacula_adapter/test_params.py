# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plugin strings: their words, the file behind them, and what is refused in one line that names the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.backend import params as params_module
from bacula_adapter.backend.dialogue import Word
from bacula_adapter.backend.dispatch import Product, phase
from bacula_adapter.backend.interface import JobInfo, JobKind, Level
from bacula_adapter.backend.packets import ProtocolError
from bacula_adapter.backend.params import load_params, split_string, values_of, with_options
from replicator import __version__
from replicator.config import Config, check
from replicator.errors import UsageError
from tests.cli.conftest import KEY, write_config


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REPLCTL_CONFIG", raising=False)
    monkeypatch.setattr(params_module, "DEFAULT_PATH", tmp_path / "replicator.conf")


def load(string: str) -> Config:
    return load_params([f"PluginString={string}"], extended=True).config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a=b  c=d ", ["a=b", "c=d"]),
        ('vm="web 1" x', ["vm=web 1", "x"]),
        ('"vm=web 1"', ["vm=web 1"]),
        (r'vm="a\"b" \"c', ['vm=a"b', '"c']),
        ('vm=""', ["vm="]),
        ('""', [""]),
        (r"vm=a\b\\", [r"vm=a\b\\"]),
        ("a=b\tc=d", ["a=b", "c=d"]),
        ("vm=web listing=/a b  c ", ["vm=web", "listing=/a b  c"]),
        ('vm="x listing=y"', ["vm=x listing=y"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_string(text) == words


@given(st.lists(st.text(st.characters(blacklist_characters="\\\0"), max_size=12), max_size=6))
def test_any_words_can_be_said(words: list[str]) -> None:
    quoted = " ".join('"' + word.replace('"', r"\"") + '"' for word in words)
    assert split_string(quoted) == words


@given(st.text(alphabet='ab= "\\', max_size=30))
def test_any_text_is_words_or_an_error(text: str) -> None:
    try:
        assert all(text for text in split_string(text)) or '""' in text or '"' in text
    except UsageError as error:
        assert "double quote" in str(error)  # noqa: PT017 - either is fine


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("vm=web dr_hots=x", r"unknown key dr_hots \(did you mean dr_host\?\)"),
        ("vm=a vm=b", "vm: given twice in the plugin string"),
        ("vcpu=two", "vcpu: expected a whole number from 1 to 1024"),
        (
            "passfile=/etc/secret",
            "passfile: the path of a secret is not taken from a plugin string",
        ),
        ("prism_api_key=/x", "prism_api_key: the path of a secret"),
        ("prism_element_passfile=/x", "prism_element_passfile: the path of a secret"),
        ("dr_auth_key=/x", "dr_auth_key: the path of a secret"),
        ("--dr-auth-key=/x", "dr_auth_key: the path of a secret"),
        ("dr_auth_token=/x", "dr_auth_token: the path of a secret"),
        ("point=3", "point: says which recovery point to back up; give from = replica too"),
        ("from=somewhere", "from: expected one of replica"),
        ("from=replica dr_host=x", "from: replica is for the receiver's host"),
        ("target_format=ova", "target_format: expected one of qcow2, raw, vhd, vhdx, vmdk"),
        ("bacula_streams=1", "bacula_streams: expected one of addressed, auto, plain"),
        ("backend_timeout=4", "backend_timeout: expected a whole number from 5 to 3600"),
        ("prism_insecure=maybe", "prism_insecure: expected yes or no"),
        ('vm="web', "a double quote that does not end"),
        ("config=../x", "config: expected the NAME of /etc/replicator/NAME.conf"),
        ("config=.x", "config: expected the NAME"),
        ("config=none", "configuration .*/none.conf: No such file"),
        ("state_dir=relative", "state_dir: expected an absolute path"),
    ],
)
def test_refused_in_one_line_that_names_the_key(string: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(string)
    assert "\n" not in str(caught.value)


def test_secrets_are_never_echoed() -> None:
    for string in (
        "password=hunter22 user=",
        f"dr_auth_token={KEY} wrong=1",
        "password=hunter22 vm=a vm=b",
    ):
        with pytest.raises(UsageError) as caught:
            load(string)
        assert "hunter22" not in str(caught.value)
        assert KEY not in str(caught.value)
    shown = repr(load_params(["PluginString=user=u password=hunter22"], extended=True))
    assert "hunter22" not in shown


def test_words_with_dashes_and_without_value() -> None:
    config = load("--vcpu=4 --memory-mib=2048 power-on vm=web")
    assert (config.vcpu, config.memory_mib, config.power_on) == (4, 2048, True)


def test_the_string_wins_over_the_file(tmp_path: Path) -> None:
    write_config(tmp_path / "lab.conf", {"vm": "web", "concurrent_disks": 7, "from": "replica"})
    config = load("config=lab vm=db")
    assert (config.vm, config.concurrent_disks, config.from_) == ("db", 7, "replica")
    assert load(f"config={tmp_path}/lab.conf point=3").point == 3
    with pytest.raises(UsageError, match="unknown key wm"):
        load("config=lab wm=db")


def test_a_password_in_the_string_takes_the_place_of_the_files(tmp_path: Path) -> None:
    values = {"user": "backup", "passfile": tmp_path / "secret"}
    write_config(tmp_path / "replicator.conf", values)
    loaded = load_params(["PluginString=password=hunter22"], extended=True)
    assert (loaded.config.password, loaded.config.passfile) == ("hunter22", None)
    assert list(loaded.exposed) == ["password"]
    assert load("").passfile == tmp_path / "secret"


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("").vm == "*"  # the default one may be missing
    write_config(tmp_path / "replicator.conf", {"vm": "default"})
    assert load("").vm == "default"
    write_config(tmp_path / "named.conf", {"vm": "named"})
    monkeypatch.setenv("REPLCTL_CONFIG", str(tmp_path / "named.conf"))
    assert load("").vm == "named"
    monkeypatch.setenv("REPLCTL_CONFIG", str(tmp_path / "gone.conf"))
    with pytest.raises(UsageError, match=r"gone.conf: No such file"):
        load("")


def test_a_stock_plugin_says_word_by_word() -> None:
    lines = [
        "vm=web",
        "Accurate=1",
        "abort_on_error=1",
        "power_on=1",
        "vm=db",
        "listing=/",
        "query=vm",
    ]
    loaded = load_params(lines, extended=False)
    assert (loaded.config.vm, loaded.config.power_on) == ("db", True)  # the operator's come last
    assert (loaded.listing, loaded.query) == ("/", "vm")
    with pytest.raises(UsageError, match="unknown key accurat"):
        load_params(["accurat=1"], extended=False)
    assert load_params(["PluginFoo=1", "PluginString=vm=web"], extended=True).config.vm == "web"
    assert load_params(["PluginString=vm=web", "query=vm"], extended=True).query == "vm"


def test_options_of_a_restore() -> None:
    config = load("vm=web power_on=no user=u password=hunter22 from=replica target_container=x")
    changed = with_options(config, {"power_on": "yes", "--vcpu": "2", "target_container": "y"})
    assert (changed.power_on, changed.vcpu, changed.target_container) == (True, 2, "y")
    assert (changed.password, changed.from_) == ("hunter22", "replica")
    assert with_options(config, {}) == config
    for key in ("password", "passfile", "dr_auth_token"):
        with pytest.raises(UsageError, match=f"{key}: no option of a restore"):
            with_options(config, {key: "x"})
    with pytest.raises(UsageError, match="vcpu: expected"):
        with_options(config, {"vcpu": "x"})


def test_values_lead_back_to_their_configuration() -> None:
    values = {
        "from": "replica",
        "point": "3",
        "power_on": "yes",
        "cross_restore": "no",
        "debug_log": "/x",
        "vcpu": "2",
    }
    config = check(values)
    assert values_of(config) == values
    assert check(values_of(config)) == config


def prepare(
    string: str, *, kind: str = "B", level: str = "F", start: Word = Word.BACKUP_START
) -> str:
    job = ["Name=Backup.2026-11-25_10.00.00_03", f"Type={kind}", f"Level={level}"]
    work = Product().prepare(job, [f"PluginString={string}"], start, extended=True)
    return f"{phase(work.job, work.config)} {work.config.mode}"


@pytest.mark.parametrize(
    ("string", "kind", "level", "expected"),
    [
        ("", "B", "F", "F2 backup"),
        ("", "B", "I", "F3 backup"),
        ("mode=backup", "B", "D", "F3 backup"),
        ("", "R", "F", "F4 restore"),
        ("mode=restore target_cluster=b", "R", "F", "F5 restore"),
        ("target_format=vmdk", "R", "F", "F6 restore"),
        ("mode=seed", "B", "F", "F8.1 seed"),
        ("mode=bitmap-push", "B", "I", "F8.2 bitmap-push"),
        ("mode=failover-test vm=web", "B", "F", "F8.4 failover-test"),
        ("mode=seed", "R", "F", "F8.1 seed"),
        ("mode=estimate", "B", "F", "F2 estimate"),
    ],
)
def test_phases_and_the_first_message(
    string: str, kind: str, level: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    start = Word.BACKUP_START if kind == "B" else Word.RESTORE_START
    assert (
        prepare(f"{string} bacula_streams=plain", kind=kind, level=level, start=start) == expected
    )
    name, mode = expected.split()
    assert re.fullmatch(
        rf"replicator backend up \(v{re.escape(__version__)}\) phase={name} mode={mode} vm=(web|\*)",
        caplog.messages[0],
    )


def test_a_secret_in_the_string_is_warned_of_by_every_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prepare("user=u password=hunter22 bacula_streams=plain")
    assert caplog.messages[0].startswith("replicator backend up")
    assert caplog.records[1].levelname == "WARNING"
    assert caplog.messages[1].startswith("password stands in the plugin string")
    assert "hunter22" not in caplog.text


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("mode=restore", "mode: restore is for restore jobs"),
        ("mode=seed from=replica", "from: says what to back up; it contradicts mode = seed"),
    ],
)
def test_modes_that_do_not_fit_the_job(string: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(string)


def test_a_plugin_that_contradicts_itself() -> None:
    with pytest.raises(ProtocolError, match="BackupStart in a job of type R"):
        prepare("", kind="R")


def test_what_is_asked_for() -> None:
    lines = ["Name=x", "Type=E", "Level=F"]

    def ask(start: Word, string: str = "") -> tuple[str | None, str | None]:
        work = Product().prepare(lines, [f"PluginString={string}"], start, extended=True)
        return work.path, work.parameter

    assert ask(Word.ESTIMATE_START) == (None, None)
    assert ask(Word.ESTIMATE_START, "vm=web listing=/x y") == ("/x y", None)
    assert ask(Word.LISTING_START) == ("/", None)
    assert ask(Word.QUERY_START, "query=vm") == (None, "vm")
    assert ask(Word.QUERY_START) == (None, "")


def test_the_jobs_own_name() -> None:
    info = JobInfo(name="A.b.2026-11-25_10.00.00_03", job_id=1, kind=JobKind.BACKUP)
    assert (info.job, info.level) == ("A.b", Level.FULL)
