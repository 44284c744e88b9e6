# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the configuration to Prism's settings: secrets out of files, warnings of what is weak, contradictions refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from replicator import prism_access
from replicator.addresses import is_iqn, parse_dsip
from replicator.config import check
from replicator.errors import StateError, UsageError
from replicator.prism_access import initiator_name, prism_settings, read_passfile

SECRET = "s3cret#of-mine"
ELSEWHERE = "els3where"


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_all_that_the_configuration_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    passfile = private(tmp_path / "pass", f"# of svc-dr\n\npassword = {SECRET}\n", mode)
    other = private(tmp_path / "element", f'password="{ELSEWHERE} "\n')
    ca = private(tmp_path / "ca.pem", "")
    with caplog.at_level(logging.DEBUG):
        found = prism_settings(
            check(
                {
                    "prism_central": "pc.example:9441",
                    "user": "svc-dr",
                    "passfile": str(passfile),
                    "prism_ca_cert": str(ca),
                    "prism_element": "cluster-a=192.0.2.20, cluster-b = [2001:db8::1]:9442",
                    "prism_element_user": "admin",
                    "prism_element_passfile": str(other),
                    "prism_v3_expose": "vg-image",
                    "prism_rate_rpm": "60",
                    "cluster": "cluster-a",
                }
            )
        )
    assert (found.host, found.port, found.rate_rpm, found.cluster) == (
        "pc.example",
        9441,
        60,
        "cluster-a",
    )
    assert (found.account.user, found.account.password) == ("svc-dr", SECRET)
    assert (found.for_element().user, found.for_element().password) == ("admin", f"{ELSEWHERE} ")
    assert (found.ca, found.insecure, found.expose) == (ca, False, "vg-image")
    assert found.element_address("u", "cluster-b", None) == ("2001:db8::1", 9442)
    assert caplog.records == []
    assert SECRET not in repr(found)


def test_what_is_weak_is_warned_of_in_every_job(caplog: pytest.LogCaptureFixture) -> None:
    values = {"prism_central": "pc.example", "user": "u", "password": SECRET}
    config = check({**values, "prism_insecure": "yes"})
    for job in range(2):
        caplog.clear()
        settings = prism_settings(config)
        assert (job, settings.account.password, settings.insecure) == (job, SECRET, True)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        first, second = (record.getMessage() for record in caplog.records)
        assert first.startswith("password stands in the configuration: ")
        assert "passfile" in first
        assert second.startswith("prism_insecure: ")
        assert SECRET not in caplog.text


def test_an_api_key_in_place_of_a_password(tmp_path: Path) -> None:
    key = private(tmp_path / "key", f"{SECRET}\n")
    config = check({"prism_central": "2001:db8::5", "prism_api_key": str(key)})
    settings = prism_settings(config)
    assert (settings.account.api_key, settings.account.user) == (SECRET, "")
    assert (settings.host, settings.port) == ("2001:db8::5", 9440)
    for text in ("", "a b", "a\nb", "ä"):
        private(key, text)
        with pytest.raises(UsageError, match=r"^prism_api_key: .*expected the key alone, in one"):
            prism_settings(config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it holds no password"),
        ("password =\n", "it holds no password"),
        ('password = ""\n', "it holds no password"),
        (f"{SECRET}\n", "expected one line: password = …"),
        (f"user = u\npassword = {SECRET}\n", "expected one line: password = …"),
        (f"password = {SECRET}\npassword = {SECRET}\n", "password is given twice"),
        (f"password = {SECRET}\n" + "#" * 5000, "larger than 4096 bytes"),
    ],
)
def test_a_passfile_that_is_none(tmp_path: Path, text: str, expected: str) -> None:
    path = private(tmp_path / "pass", text)
    with pytest.raises(UsageError) as caught:
        read_passfile(path, "passfile")
    assert str(caught.value).startswith(f"passfile: {path}: ")
    assert expected in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
@pytest.mark.parametrize("key", ["passfile", "prism_element_passfile", "prism_api_key"])
def test_a_secrets_file_that_is_open_to_others_is_refused(
    tmp_path: Path, key: str, mode: int
) -> None:
    path = private(tmp_path / "pass", f"password = {SECRET}\n", mode)
    values = {"prism_central": "pc.example", key: str(path)}
    if key == "passfile":
        values["user"] = "u"
    elif key == "prism_element_passfile":
        values |= {"prism_element_user": "u", "user": "u", "password": "p"}
    expected = rf"^{key}: {re.escape(str(path))} holds a secret .*: chmod 600"
    with pytest.raises(UsageError, match=expected):
        prism_settings(check(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "prism_central: missing"),
        ({"prism_central": "pc"}, "user: missing"),
        ({"prism_central": "pc", "user": "u"}, "passfile: missing"),
        ({"prism_central": "pc", "user": "u", "passfile": "/nonexistent"}, "passfile: /nonexist"),
        (
            {"prism_central": "pc", "user": "u", "password": "p", "prism_ca_cert": "/nonexistent"},
            "prism_ca_cert: /nonexistent is not a file",
        ),
    ],
)
def test_what_is_missing_is_named(values: Mapping[str, str], expected: str) -> None:
    with pytest.raises(UsageError, match=f"^{expected}"):
        prism_settings(check(dict(values)))


PASSWORD = {"user": "u", "password": "p"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prism_central": "pc:9441", "prism_port": "9440"}, "prism_port: 9440 contradicts"),
        ({"prism_central": "https://pc"}, "prism_central: expected HOST or HOST:PORT"),
        ({"prism_central": "pc:0"}, "prism_central: expected"),
        ({"prism_central": "pc:65536"}, "prism_central: expected"),
        ({"prism_central": "a..b"}, "prism_central: expected"),
        ({"prism_central": "u@pc"}, "prism_central: expected"),
        ({**PASSWORD, "passfile": "/p"}, "passfile: contradicts password"),
        ({"password": "p"}, "user: missing; it says whose password password gives"),
        ({"passfile": "/p"}, "user: missing; it says whose password passfile"),
        ({"prism_api_key": "/k", "user": "u"}, "prism_api_key: contradicts user"),
        ({"prism_api_key": "/k", "password": "p"}, "prism_api_key: contradicts password"),
        ({"prism_api_key": "/k", "prism_api_version": "v3"}, "prism_api_key: v3 takes no API"),
        (
            {"data_path": "rest", "prism_api_version": "v4"},
            "data_path: rest cannot be had with prism_api_version = v4",
        ),
        ({"prism_insecure": "yes", "prism_ca_cert": "/c"}, "prism_ca_cert: contradicts prism_ins"),
        ({"prism_element_user": "u"}, "prism_element_passfile: missing"),
        ({"prism_element_passfile": "/p"}, "prism_element_user: missing"),
        ({"prism_element": "a"}, "prism_element: expected cluster=address, got 'a'"),
        ({"prism_element": "=1.2.3.4"}, "prism_element: expected cluster=address"),
        ({"prism_element": "a=x y"}, "prism_element: expected cluster=address"),
        ({"prism_element": "a=h1,a=h2"}, "prism_element: 'a' is given twice"),
        ({"dsip": "dsip.example"}, "dsip: expected an IP address, or IP:PORT"),
        ({"dsip": "192.0.2.1:x"}, "dsip: expected"),
        ({"dsip": "192.0.2.1:0"}, "dsip: expected"),
        ({"iscsi_initiator": "host-1"}, "iscsi_initiator: expected an IQN"),
        ({"iscsi_initiator": "iqn.2026-13.org.example:a"}, "iscsi_initiator: expected an IQN"),
        ({"iscsi_initiator": "iqn.2026-01.org.example:A"}, "iscsi_initiator: expected an IQN"),
        ({"iscsi_chap": "both"}, "iscsi_chap: expected one of mutual, none, one-way"),
        ({"prism_v3_expose": "nfs"}, "prism_v3_expose: expected one of "),
    ],
)
def test_what_contradicts_itself_is_refused(values: Mapping[str, str], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(dict(values))
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("192.0.2.9", ("192.0.2.9", 3260)),
        ("192.0.2.9:3261", ("192.0.2.9", 3261)),
        ("2001:db8::9", ("2001:db8::9", 3260)),
        ("[2001:db8::9]:3261", ("2001:db8::9", 3261)),
    ],
)
def test_data_services_addresses(text: str, expected: tuple[str, int] | None) -> None:
    assert parse_dsip(text) == expected


def test_the_initiators_name_is_the_configured_one_the_hosts_or_one_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "iqn.2026-01.org.example:dr-service-01"
    values = {"state_dir": str(tmp_path)}
    hosts = tmp_path / "initiatorname.iscsi"
    hosts.write_text("# made at install\nInitiatorName=iqn.1993-08.org.debian:01:9c27\n")
    config = check(values)
    assert initiator_name(check({**values, "iscsi_initiator": given}), hosts) == given
    assert initiator_name(config, hosts) == "iqn.1993-08.org.debian:01:9c27"
    assert not (tmp_path / prism_access.INITIATOR_FILE).exists()
    for text in (None, "InitiatorName=nonsense\n", "InitiatorName=\n"):
        hosts.unlink() if text is None else hosts.write_text(text)
        monkeypatch.setattr("socket.gethostname", lambda: "Back_Up.01")
        made = initiator_name(config, hosts)
        assert re.fullmatch(r"iqn\.2026-01\.internal\.replicator:back-up\.01-[0-9a-f]{8}", made)
        assert is_iqn(made)
        # The host may be renamed: what the cluster knows it by stays.
        monkeypatch.setattr("socket.gethostname", lambda: "other")
        assert initiator_name(config, hosts) == made
    (tmp_path / prism_access.INITIATOR_FILE).write_text("?")
    with pytest.raises(StateError, match="holds no initiator name: remove it, or set iscsi_init"):
        initiator_name(config, hosts)
    with pytest.raises(StateError, match="No such file"):
        initiator_name(check({"state_dir": str(tmp_path / "none")}), hosts)


@pytest.mark.parametrize("name", ["", "-_-", "x" * 200, "ÄÖ"])
def test_a_name_can_be_made_on_any_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    made = initiator_name(check({"state_dir": str(tmp_path)}), tmp_path / "none")
    assert is_iqn(made)
