# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is wrong with the files of keys and certificates is said in one line that names the key, the file and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificates

from replicator.config import Config, check
from replicator.credentials import (
    ReceiverCredentials,
    SourceCredentials,
    certificates,
    check_own,
    expiry_warnings,
)
from replicator.errors import AuthenticationError, UsageError
from replicator.wire.keys import KEY_BYTES_MAX
from tests.wire.tls_lab import authorities, issue, write

KEYS = [f"{number:02x}" * 32 for number in range(4)]
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@dataclass
class Files:
    """A side's three files, all good."""

    folder: Path
    cert: Path
    key: Path
    ca: Path

    def config(self, **options: Any) -> Config:
        values = {
            "dr_auth_cert": str(self.cert),
            "dr_auth_key": str(self.key),
            "dr_ca_cert": str(self.ca),
        }
        return check(values | options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    cert, key = write(tmp_path, issue("source.example"), "source")
    ca = tmp_path / "ca.pem"
    ca.write_text(authorities())
    return Files(tmp_path, cert, key, ca)


def encrypt(files: Files) -> None:
    key = load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    )


def pipe_in_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, tuple[Callable[[Files], Any], str]] = {
    "certificate missing": (lambda f: f.cert.unlink(), "dr_auth_cert: {cert}: No such file or directory"),
    "key missing": (lambda f: f.key.unlink(), "dr_auth_key: {key}: No such file or directory"),
    "authority missing": (lambda f: f.ca.unlink(), "dr_ca_cert: {ca}: No such file or directory"),
    "certificate not PEM": (lambda f: f.cert.write_text("no"), "dr_auth_cert: {cert} holds no certificate in PEM form"),
    "certificate damaged": (
        lambda f: f.cert.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        "dr_auth_cert: {cert} holds no certificate in PEM form",
    ),
    "key in its place": (lambda f: shutil.copy(f.key, f.cert), "dr_auth_cert: {cert} holds no certificate in PEM form"),
    "authority not PEM": (lambda f: f.ca.write_bytes(b"\xff\0"), "dr_ca_cert: {ca} holds no certificate in PEM form"),
    "authority empty": (lambda f: f.ca.write_bytes(b""), "dr_ca_cert: {ca} holds no certificate in PEM form"),
    "key not PEM": (lambda f: f.key.write_text("no"), "dr_auth_key: {key} holds no private key in PEM form"),
    "key open to others": (
        lambda f: f.key.chmod(0o640),
        "dr_auth_key: {key} holds a secret and is open to others (mode 0640): chmod 600 {key}",
    ),
    "key of another certificate": (
        lambda f: f.key.write_bytes(issue("other.example").private_key_pem.bytes()),
        "dr_auth_key: {key} is not the key of the certificate {cert}",
    ),
    "key with a passphrase": (
        encrypt,
        "dr_auth_key: {key} is protected by a passphrase; write it without one (openssl pkey -in FILE -out NEW), mode 0600",
    ),
    "folder": (lambda f: folder_in_place(f.ca), "dr_ca_cert: {ca}: Is a directory"),
    "pipe": (lambda f: pipe_in_place(f.cert), "dr_auth_cert: {cert} is not a file"),
    "huge": (lambda f: f.cert.write_bytes(bytes(1 << 20) + b"x"), "dr_auth_cert: {cert}: larger than 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("receiver", [False, True], ids=["source", "receiver"])
def test_a_bad_file_is_named_with_what_to_do(files: Files, case: str, receiver: bool) -> None:
    spoil, expected = BROKEN[case]
    config = files.config() if receiver else files.config(dr_host="dr.example")
    make = ReceiverCredentials if receiver else SourceCredentials
    make(config)
    spoil(files)
    with pytest.raises(UsageError) as caught:
        make(config)
    assert str(caught.value) == expected.format(cert=files.cert, key=files.key, ca=files.ca)


def test_files_of_the_last_check_that_changed_before_they_were_used_are_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and OpenSSL's own reading somebody puts another key in place."""

    def swapped(*_: Any) -> None:
        files.key.write_bytes(issue("other.example").private_key_pem.bytes())

    monkeypatch.setattr(certificates, "_check_key", swapped)
    with pytest.raises(UsageError, match=r"^dr_auth_cert: .*source\.pem cannot be used: "):
        ReceiverCredentials(files.config())


# --- keys --------------------------------------------------------------------------------------


def key_file(folder: Path, *keys: str, name: str = "dr.key", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_text("".join(f"{key}\n" for key in keys))
    path.chmod(mode)
    return path


def names(config: Config) -> list[tuple[str, str | None]]:
    return [(key.name, key.vm) for key in ReceiverCredentials(config).loaded.keys.values()]


def test_a_current_and_a_next_key_stand_in_the_configuration_or_in_a_file(tmp_path: Path) -> None:
    config = check({"dr_auth_token": f"{KEYS[0]}, {KEYS[1]}"})
    assert names(config) == [("dr_auth_token", None), ("dr_auth_token (next)", None)]
    config = check({"dr_auth_token": str(key_file(tmp_path, KEYS[0], "", f" {KEYS[1]} "))})
    assert names(config) == [("dr.key", None), ("dr.key (next)", None)]
    long = ("cd" * KEY_BYTES_MAX, "ef" * KEY_BYTES_MAX)
    assert len(names(check({"dr_auth_token": str(key_file(tmp_path, *long))}))) == 2


def test_a_folder_holds_a_current_and_a_next_key_for_each_vm(tmp_path: Path) -> None:
    key_file(tmp_path, KEYS[0], KEYS[1], name="web.key")
    key_file(tmp_path, KEYS[2], name="db.key")
    (tmp_path / "README").write_text("not a key")
    assert names(check({"dr_auth_token": str(tmp_path)})) == [
        ("db.key", "db"),
        ("web.key", "web"),
        ("web.key (next)", "web"),
    ]
    with pytest.raises(UsageError, match="dr_auth_token: a source pushes with one key"):
        SourceCredentials(check({"dr_auth_token": str(tmp_path), "dr_host": "dr.example"}))


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"web.key": KEYS[:1], "db.key": KEYS[:1]}, "the keys 'db.key' and 'web.key' are the same key"),
        ({"web.key": KEYS[:2], "db.key": KEYS[1:2]}, "the keys 'db.key' and 'web.key (next)' are the same key"),
        ({"web.key": KEYS[:1] * 2}, "the keys 'web.key' and 'web.key (next)' are the same key"),
        ({"web.key": KEYS[:3]}, "web.key: 3 keys; two at most: the current one and the next one"),
        ({"web.key": []}, "web.key: it holds no key; make one with: openssl rand -hex 32"),
        ({"web.key": [KEYS[0], "ab" * 8]}, "web.key: the key 'web.key (next)' has 64 bits; at least 256"),
        ({"web.key": ["g" * 64]}, "web.key: the key 'web.key' is not a string of hex digits"),
        ({"web.key": ["ab" * 4097]}, "web.key: larger than 8192 bytes"),
        ({}, "no *.key file in "),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_told_apart_or_used_are_refused(
    tmp_path: Path, held: dict[str, list[str]], expected: str
) -> None:
    for name, keys in held.items():
        key_file(tmp_path, *keys, name=name)
    with pytest.raises(UsageError) as caught:
        ReceiverCredentials(check({"dr_auth_token": str(tmp_path)}))
    assert str(caught.value).startswith("dr_auth_token: ")
    assert expected in str(caught.value)
    assert not any(key in str(caught.value) for key in KEYS)


def test_each_key_file_must_be_private(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEYS[0], name="web.key", mode=0o604)
    for token in (path, tmp_path):
        with pytest.raises(UsageError, match=rf"^dr_auth_token: .*chmod 600 {path}$"):
            ReceiverCredentials(check({"dr_auth_token": str(token)}))


def test_three_keys_in_the_configuration_are_too_many() -> None:
    with pytest.raises(UsageError, match="dr_auth_token: 3 keys; two at most") as caught:
        ReceiverCredentials(check({"dr_auth_token": ",".join(KEYS[:3])}))
    assert KEYS[0] not in str(caught.value)


# --- what contradicts itself -------------------------------------------------------------------

ALL = {"dr_auth_cert": "/c", "dr_auth_key": "/k", "dr_ca_cert": "/a"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dr_auth_cert": "/c"}, "dr_auth_key: missing; mTLS takes dr_auth_cert, dr_auth_key, dr_ca_cert, all three"),
        ({"dr_auth_cert": "/c", "dr_auth_key": "/k"}, "dr_ca_cert: missing"),
        ({"dr_ca_cert": "/a"}, "dr_auth_cert: missing"),
        ({"dr_auth_cert": "c.pem"}, "dr_auth_cert: expected an absolute path"),
        ({**ALL, "dr_host": "h", "dr_auth_token": KEYS[0]}, "dr_auth_token: contradicts dr_auth_cert; a source proves a"),
        ({**ALL, "dr_host": "h", "dr_cipher": "none"}, "dr_cipher: none contradicts dr_auth_cert; TLS always encrypts"),
        ({"dr_cipher": "rot13"}, "dr_cipher: expected one of aes-256-gcm, none"),
        ({**ALL, "dr_host": "h", "dr_allow": "a: b"}, "dr_allow: belongs on the receiver; remove it here"),
        ({"dr_allow": "a: b"}, "dr_allow: says what certificates may push; set dr_auth_cert, dr_auth_key, dr_ca_cert too"),
        ({**ALL, "dr_allow": "a b"}, "dr_allow: expected NAME: VM, VM, got 'a b'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_key(values: dict[str, str], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(values)
    assert str(caught.value).startswith(expected)


def test_a_receiver_may_take_both_kinds_and_must_take_one(files: Files) -> None:
    both = ReceiverCredentials(files.config(dr_auth_token=KEYS[0]))
    assert both.summary() == "1 key and mTLS"
    (hint,) = both.loaded.keys
    assert str(both.loaded) == (
        f"key dr_auth_token (fingerprint {hint[:4].hex()}), {both.loaded.certificates.own}, {both.loaded.certificates.authority}"  # type: ignore[union-attr]
    )
    assert KEYS[0] not in repr(both.loaded)
    assert ReceiverCredentials(files.config()).summary() == "mTLS"
    assert ReceiverCredentials(check({"dr_auth_token": ",".join(KEYS[:2])})).summary() == "2 keys"
    with pytest.raises(UsageError, match="dr_auth_token: missing"):
        ReceiverCredentials(check({}))


def test_what_is_in_use_is_told_apart_by_fingerprints(files: Files) -> None:
    """Of the same names: other keys and certificates have others, and the certificate's are those that openssl shows."""
    ring = [
        str(ReceiverCredentials(files.config(dr_auth_token=key)).loaded).partition(", ")[0]
        for key in KEYS[:2]
    ]
    assert len(set(ring)) == 2
    files.ca.write_text(authorities() + authorities("next"))
    held = ReceiverCredentials(files.config()).loaded.certificates
    assert held is not None
    digests = [
        each.fingerprint(SHA256()).hex()[:8]
        for path in (files.cert, files.ca)
        for each in load_pem_x509_certificates(path.read_bytes())
    ]
    assert str(held.own).startswith(f"certificate {files.cert} (SHA-256 {digests[0]}) until ")
    assert f"(SHA-256 {digests[1]} {digests[2]}) until " in str(held.authority)
    files.ca.write_text(authorities() * 6)
    held = ReceiverCredentials(files.config()).loaded.certificates
    assert held is not None
    assert held.authority.fingerprint == " ".join([digests[1]] * 4) + " and 2 more"


# --- until when --------------------------------------------------------------------------------


#: What a certificate that does not hold means on a receiver.
WITHOUT = "; until then no source can connect with a certificate"


def dated(files: Files, before: timedelta, after: timedelta) -> Files:
    certificate = issue("source.example", not_before=NOW + before, not_after=NOW + after)
    files.cert, files.key = write(files.folder, certificate, "dated")
    return files


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (31 * DAY, None),
        (12 * DAY + timedelta(hours=1), "expires in 12 days ("),
        (DAY + timedelta(hours=1), "expires in 1 day ("),
        (timedelta(hours=1), "expires in less than a day ("),
        (-DAY - timedelta(hours=1), "expired 1 day ago ("),
    ],
)
def test_a_certificate_is_warned_of_30_days_ahead(
    files: Files, after: timedelta, expected: str | None
) -> None:
    dated(files, -40 * DAY, after)
    credentials = ReceiverCredentials(files.config())
    found = credentials.warnings(NOW.timestamp())
    # A status that has no process to ask looks at the same files, and needs no key.
    files.key.unlink()
    plain = [line.removesuffix(WITHOUT) for line in found]
    assert expiry_warnings(files.config(), NOW.timestamp()) == plain
    # Only of one that does not hold, and only of a receiver's own.
    assert (plain != found) == (after < timedelta())
    if expected is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith(f"certificate {files.cert} {expected}")


def test_the_authority_is_warned_of_as_well(files: Files) -> None:
    credentials = ReceiverCredentials(files.config())
    _, (path, end) = credentials.expires()
    assert path == str(files.ca)
    assert credentials.warnings(end - 86_400)[-1].startswith(f"authority {files.ca} expires in 1 d")
    assert credentials.warnings(end + 1)[-1].startswith(f"authority {files.ca} expired less than")


def test_ends_are_told_in_unix_seconds(files: Files) -> None:
    dated(files, -DAY, 12 * DAY)
    end = (NOW + 12 * DAY).replace(microsecond=0).timestamp()
    assert ReceiverCredentials(files.config()).expires()[0] == (str(files.cert), end)
    assert ReceiverCredentials(check({"dr_auth_token": KEYS[0]})).expires() == []


def test_what_cannot_be_read_is_a_warning_of_status(files: Files) -> None:
    files.ca.unlink()
    assert expiry_warnings(files.config(), 0.0) == [
        f"dr_ca_cert: {files.ca}: No such file or directory"
    ]
    assert expiry_warnings(check({}), 0.0) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (-9 * DAY, -DAY, r"expired 1 day ago \(.*\): renew it$"),
        (DAY, 9 * DAY, "is not valid before .*: set this host's clock, or renew it$"),
    ],
)
async def test_a_source_says_itself_that_its_certificate_does_not_hold(
    files: Files, before: timedelta, after: timedelta, expected: str
) -> None:
    dated(files, before, after)
    config = files.config(dr_host="dr.example")
    credentials = SourceCredentials(config)
    # Before it connects to anybody, and before a command touches anything.
    with pytest.raises(AuthenticationError, match=f"^dr_auth_cert: certificate .* {expected}"):
        await credentials.proofs()
    with pytest.raises(UsageError, match=f"^dr_auth_cert: certificate .* {expected}"):
        check_own(config)
    # Renewed under a process that lives on.
    dated(files, -DAY, DAY)
    assert len(await credentials.proofs()) == 1
    check_own(config)
