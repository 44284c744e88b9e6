# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pushes that prove themselves by key or certificate over real sockets; keys and certificates changed between them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from receiver.service import sessions
from replicator.config import check
from replicator.credentials import ReceiverCredentials, SourceCredentials, reload_on_hangup
from replicator.errors import AuthenticationError, PeerRefusedError, WireError
from replicator.push.connection import ConnectionLostError
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.wire.handshake import SUITE_READABLE, SUITE_SEALED
from replicator.wire.stream import AuthenticatedStream
from replicator.wire.tls import TlsStream
from tests.limits import HANG_S
from tests.sites import ReceiverSite, SourceSite, receiver_site, source_site
from tests.wire.tls_lab import authorities, issue, write

KEYS = [f"{number:02x}" * 32 for number in range(1, 5)]
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def side(folder: Path, name: str, *names: str, ca: str = "ours", **options: Any) -> dict[str, Any]:
    """A certificate in files, as the configuration names them."""
    cert, key = write(folder, issue(*(names or (name,)), ca=ca, **options), name)
    trusted = folder / "ca.pem"
    if not trusted.exists():
        trusted.write_text(authorities())
    return {
        "dr_auth_token": "",
        "dr_auth_cert": str(cert),
        "dr_auth_key": str(key),
        "dr_ca_cert": str(trusted),
    }


def at_receiver(folder: Path, **options: str) -> dict[str, Any]:
    return side(folder, "receiver", "127.0.0.1") | options


def write_key(path: Path, *keys: str) -> Path:
    """As an operator should: whole, private, in one step."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text("".join(f"{key}\n" for key in keys))
    new.rename(path)
    return path


def disk(folder: Path) -> dict[str, Path]:
    path = folder / "disk.raw"
    if not path.exists():
        path.write_bytes(os.urandom(200_000))
    return {"disk-0": path}


@asynccontextmanager
async def source(
    rx: ReceiverSite, folder: Path, options: dict[str, Any], name: str = "web"
) -> AsyncIterator[SourceSite]:
    values = dict(options)
    token = values.pop("dr_auth_token", "")
    async with source_site(
        folder / "sx", rx.port, disk(folder), token=token, name=name, **values
    ) as sx:
        yield sx


async def test_a_push_over_mtls_and_one_by_key_land_on_the_same_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    accept = ReceiverCredentials.accept

    async def noted(self: ReceiverCredentials, *args: Any, **options: Any) -> Any:
        made.append(await accept(self, *args, **options))
        return made[-1]

    monkeypatch.setattr(ReceiverCredentials, "accept", noted)
    async with receiver_site(tmp_path / "rx", **at_receiver(tmp_path, dr_auth_token=KEYS[0])) as rx:
        async with source(rx, tmp_path, side(tmp_path, "web")) as sx:
            await sx.push(Want.SEED)
            sx.write("disk-0", 70_000, b"changed")
            await sx.push(Want.PUSH)
            assert await rx.read(None) == sx.content("disk-0")
            assert len(rx.store.vm.points) == 2
        async with source(rx, tmp_path, {"dr_auth_token": KEYS[0]}) as sx:
            assert (await sx.push(Want.PUSH)).point.number == 3
    assert [type(stream) for stream, _ in made] == [TlsStream, TlsStream, AuthenticatedStream]
    assert [peer.name for _, peer in made] == ["the certificate web"] * 2 + [
        "the key dr_auth_token"
    ]


@pytest.mark.parametrize(
    ("names", "allow", "allowed"),
    [
        (("web",), "", True),
        (("site-a.example",), "", False),
        (("site-a.example",), "site-a.example: db, we*", True),
        (("web",), "web: db", False),
    ],
)
async def test_a_certificate_pushes_only_what_its_names_may(
    tmp_path: Path, names: tuple[str, ...], allow: str, allowed: bool
) -> None:
    async with (
        receiver_site(tmp_path / "rx", **at_receiver(tmp_path, dr_allow=allow)) as rx,
        source(rx, tmp_path, side(tmp_path, "source", *names)) as sx,
    ):
        if allowed:
            await sx.push(Want.SEED)
            return
        with pytest.raises(PeerRefusedError, match="may not push VM web") as caught:
            await sx.push(Want.SEED)
        assert caught.value.code == "wrong-key"
        assert f"the certificate {', '.join(names)}" in caught.value.reason
        assert rx.stores.all == []


async def test_a_key_of_a_folder_pushes_its_own_vm_only(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    write_key(folder / "web.key", KEYS[0], KEYS[1])
    write_key(folder / "db.key", KEYS[2])
    async with receiver_site(tmp_path / "rx", dr_auth_token=str(folder)) as rx:
        async with source(rx, tmp_path, {"dr_auth_token": KEYS[1]}) as sx:
            await sx.push(Want.SEED)
        async with source(rx, tmp_path, {"dr_auth_token": KEYS[2]}) as sx:
            with pytest.raises(PeerRefusedError, match=r"the key db\.key may not push VM web"):
                await sx.push(Want.PUSH)


#: What the source and the receiver are set to, and what each says.
MISMATCHED: dict[str, tuple[str, str, type[Exception], str, str]] = {
    "certificate against keys only": (
        "certificate", "key", WireError,
        "the receiver does not speak TLS: it takes a pre-shared key (dr_auth_token)",
        "the source offers TLS, but this receiver takes pre-shared keys only",
    ),
    "key against certificates only": (
        "key", "certificate", WireError,
        "it takes certificates only (dr_auth_cert, dr_auth_key, dr_ca_cert)",
        "this receiver takes certificates only (dr_auth_token is not set)",
    ),
    "another key": (
        "other key", "key", AuthenticationError,
        "token mismatch between source and receiver",
        "token mismatch between source and receiver (so the other side says; not proven)",
    ),
    "another authority": (
        "other authority", "certificate", AuthenticationError,
        "refused the certificate of this side (dr_auth_cert): dr_ca_cert on that side",
        "the source's certificate was issued by an authority that dr_ca_cert on this side does not hold",
    ),
    "a readable source": (
        "readable", "key", WireError,
        "no cipher in common: dr_cipher differs on source and receiver",
        "dr_cipher is none on the source and aes-256-gcm on the receiver",
    ),
    "a receiver of another name": (
        "other name", "certificate", AuthenticationError,
        "does not name dr_host: Hostname mismatch, certificate is not valid for 'localhost'",
        "the source refused the certificate of this side",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHED)
async def test_sides_that_do_not_fit_say_so_and_nothing_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    ours, theirs, kind, at_source, at_receiver_log = MISMATCHED[case]
    options: dict[str, dict[str, Any]] = {
        "key": {"dr_auth_token": KEYS[0]},
        "other key": {"dr_auth_token": KEYS[1]},
        "readable": {"dr_auth_token": KEYS[0], "dr_cipher": "none"},
        "certificate": side(tmp_path, "web"),
        "other authority": side(tmp_path, "theirs", "web", ca="theirs"),
        "other name": side(tmp_path, "web") | {"dr_host": "localhost"},
    }
    receiver = options["key"] if theirs == "key" else at_receiver(tmp_path)
    async with (
        receiver_site(tmp_path / "rx", **receiver) as rx,
        source(rx, tmp_path, options[ours]) as sx,
    ):
        with pytest.raises(kind) as caught:
            await sx.push(Want.SEED)
        assert type(caught.value) is kind
        assert not isinstance(caught.value, ConnectionLostError)
        assert at_source in str(caught.value)
        # The receiver may still be about to log it when the source knows.
        await logged(caplog, at_receiver_log)
        assert rx.stores.all == []
    assert not any(key in caplog.text for key in KEYS)


@pytest.mark.parametrize(
    ("source_cipher", "receiver_cipher", "suite"),
    [
        ("aes-256-gcm", "aes-256-gcm", SUITE_SEALED),
        ("aes-256-gcm", "none", SUITE_SEALED),
        ("none", "none", SUITE_READABLE),
    ],
)
async def test_frames_are_encrypted_unless_both_sides_say_otherwise(
    tmp_path: Path, source_cipher: str, receiver_cipher: str, suite: int
) -> None:
    async with receiver_site(
        tmp_path / "rx", dr_auth_token=KEYS[0], dr_cipher=receiver_cipher
    ) as rx:
        options = {"dr_auth_token": KEYS[0], "dr_host": "127.0.0.1", "dr_port": str(rx.port)}
        config = check(options | {"dr_cipher": source_cipher})
        async with Link(config, SourceCredentials(config)).connect() as connection:
            stream = connection._stream.stream
            assert isinstance(stream, AuthenticatedStream)
            assert stream._session.suite == suite


# --- changes while both sides run --------------------------------------------------------------


async def test_a_key_is_changed_without_a_gap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps of docs/operating.md, a push after each; neither process is restarted."""
    old, new = KEYS[:2]
    theirs = write_key(tmp_path / "receiver.key", old)
    ours = write_key(tmp_path / "source.key", old)
    async with (
        receiver_site(tmp_path / "rx", dr_auth_token=str(theirs)) as rx,
        source(rx, tmp_path, {"dr_auth_token": str(ours)}) as sx,
    ):
        await sx.push(Want.SEED)
        write_key(theirs, old, new)
        await sx.push(Want.PUSH)
        write_key(ours, new)
        await sx.push(Want.PUSH)
        write_key(theirs, new)
        await sx.push(Want.PUSH)
        write_key(theirs, KEYS[2])
        with pytest.raises(AuthenticationError, match="token mismatch"):
            await sx.push(Want.PUSH)
        # The old key is worth nothing any more, also where it was kept.
        write_key(ours, old)
        with pytest.raises(AuthenticationError, match="token mismatch"):
            await sx.push(Want.PUSH)
    assert not any(key in caplog.text for key in KEYS)


async def test_a_source_with_two_keys_finds_the_one_that_is_taken_and_keeps_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    accept = ReceiverCredentials.accept

    async def noted(self: ReceiverCredentials, *args: Any, **options: Any) -> Any:
        tried.append("")
        accepted = await accept(self, *args, **options)
        tried[-1] = accepted[1].name
        return accepted

    monkeypatch.setattr(ReceiverCredentials, "accept", noted)
    caplog.set_level(logging.INFO, "replicator.credentials")
    theirs = write_key(tmp_path / "receiver.key", KEYS[1])
    ours = write_key(tmp_path / "source.key", KEYS[0], KEYS[1])
    async with (
        receiver_site(tmp_path / "rx", dr_auth_token=str(theirs)) as rx,
        source(rx, tmp_path, {"dr_auth_token": str(ours)}) as sx,
    ):
        await sx.push(Want.SEED)
        assert tried == ["", "the key receiver.key"]
        (said,) = (r.message for r in caplog.records if "from now on" in r.message)
        assert said == (
            "the receiver takes the key source.key (next), not the key before it in dr_auth_token;"
            " it is tried first from now on"
        )
        for _ in range(2):
            await sx.push(Want.PUSH)
        assert tried[2:] == ["the key receiver.key"] * 2
        # And back: the current one is taken again, the next one no more.
        write_key(theirs, KEYS[0])
        await sx.push(Want.PUSH)
        await sx.push(Want.PUSH)
        assert tried[4:] == ["", "the key receiver.key", "the key receiver.key"]
    assert len([r for r in caplog.records if "is tried first from now on" in r.message]) == 1
    assert [r.message for r in caplog.records if r.message.startswith("the receiver takes")][
        1:
    ] == ["the receiver takes the key source.key"]


async def test_certificates_are_renewed_while_both_sides_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicator.credentials")
    ours, theirs = side(tmp_path, "web"), at_receiver(tmp_path)
    async with (
        receiver_site(tmp_path / "rx", **theirs) as rx,
        source(rx, tmp_path, ours) as sx,
    ):
        await sx.push(Want.SEED)
        # A new authority: first both are trusted, then both sides are issued anew, then the old one goes.
        trusted = tmp_path / "ca.pem"
        trusted.write_text(authorities() + authorities("next"))
        await sx.push(Want.PUSH)
        at_receiver(tmp_path)
        write(tmp_path, issue("127.0.0.1", ca="next"), "receiver")
        await sx.push(Want.PUSH)
        write(tmp_path, issue("web", ca="next"), "web")
        await sx.push(Want.PUSH)
        trusted.write_text(authorities("next"))
        await sx.push(Want.PUSH)
        write(tmp_path, issue("web"), "web")
        with pytest.raises(AuthenticationError, match="refused the certificate of this side"):
            await sx.push(Want.PUSH)
    assert "credentials in use: certificate" in caplog.text


@pytest.mark.parametrize("expired", ["receiver", "web"])
async def test_an_expired_certificate_is_named_where_it_lies_and_keys_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expired: str
) -> None:
    ours, theirs = side(tmp_path, "web"), at_receiver(tmp_path, dr_auth_token=KEYS[0])
    name = {"receiver": "127.0.0.1", "web": "web"}[expired]
    write(tmp_path, issue(name, not_before=NOW - 9 * DAY, not_after=NOW - DAY), expired)
    said = f"dr_auth_cert: certificate {tmp_path}/{expired}.pem expired 1 day ago ("
    async with (
        receiver_site(tmp_path / "rx", **theirs) as rx,
        source(rx, tmp_path, ours) as sx,
    ):
        with pytest.raises(AuthenticationError) as caught:
            await sx.push(Want.SEED)
        if expired == "web":
            # Nobody was connected to.
            assert str(caught.value).startswith(said)
            assert str(caught.value).endswith(": renew it")
            assert "TLS" not in caplog.text
        else:
            assert "has expired: renew it" in str(caught.value)
            await logged(caplog, said)
            ReceiverCredentials(rx.config).tell()
            (record,) = (r for r in caplog.records if r.message.startswith("certificate "))
            assert record.levelno == logging.ERROR
            assert record.message.endswith("no source can connect with a certificate")
        by_key = check({"dr_auth_token": KEYS[0], "dr_host": "127.0.0.1", "dr_port": str(rx.port)})
        async with Link(by_key, SourceCredentials(by_key)).connect():
            pass
        # Renewed, neither side is started again.
        write(tmp_path, issue(name), expired)
        assert (await sx.push(Want.SEED)).point.number == 1


async def test_what_cannot_be_read_again_is_logged_once_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_key(tmp_path / "source.key", KEYS[0])
    config = check({"dr_auth_token": str(path), "dr_host": "dr.example"})
    credentials = SourceCredentials(config)
    before = credentials.loaded
    for spoil in (
        path.unlink,
        lambda: write_key(path, "no key"),
        lambda: path.chmod(0o644),
    ):
        caplog.clear()
        spoil()
        for _ in range(3):
            await credentials.refresh()
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.message.startswith(
            f"credentials cannot be read again, those read before stay in use: dr_auth_token: {path}"
        )
        assert credentials.loaded is before
        assert credentials.warnings(0.0) == [
            f"credentials were not read again: {credentials.trouble}"
        ]
    write_key(path, KEYS[1])
    await credentials.refresh()
    assert credentials.loaded is not before
    assert credentials.warnings(0.0) == []


async def test_a_new_vms_key_is_taken_without_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    write_key(folder / "db.key", KEYS[0])
    async with (
        receiver_site(tmp_path / "rx", dr_auth_token=str(folder)) as rx,
        source(rx, tmp_path, {"dr_auth_token": KEYS[1]}) as sx,
    ):
        with pytest.raises(AuthenticationError):
            await sx.push(Want.SEED)
        write_key(folder / "web.key", KEYS[1])
        await sx.push(Want.SEED)


async def test_sighup_reads_all_again_and_says_what_is_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "replicator.credentials")
    certificate = issue("web", not_before=NOW - DAY, not_after=NOW + 12 * DAY + DAY / 2)
    options = side(tmp_path, "web")
    write(tmp_path, certificate, "web")
    credentials = ReceiverCredentials(check(options | {"dr_auth_token": KEYS[0]}))

    async with trio.open_nursery() as nursery:
        await nursery.start(reload_on_hangup, credentials)
        os.kill(os.getpid(), signal.SIGHUP)
        await logged(caplog, "expires in 12 days")
        in_use = next(r.message for r in caplog.records if "in use" in r.message)
        assert "key dr_auth_token (fingerprint " in in_use
        assert f"certificate {tmp_path}/web.pem (SHA-256 " in in_use
        assert f") until {NOW + 12 * DAY + DAY / 2:%Y-%m-%d}" in in_use
        (tmp_path / "ca.pem").write_text("nothing")
        os.kill(os.getpid(), signal.SIGHUP)
        await logged(caplog, "cannot be read again")
        nursery.cancel_scope.cancel()
    assert KEYS[0] not in caplog.text


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until it is."""
    with trio.fail_after(HANG_S):
        while text not in caplog.text:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_who_connects_and_goes_is_no_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with receiver_site(tmp_path / "rx", **at_receiver(tmp_path)) as rx:
        async with await trio.open_tcp_stream("127.0.0.1", rx.port):
            pass
        await logged(caplog, "closed the connection at once")


@pytest.mark.parametrize(
    ("begun", "text"),
    [(b"", "nothing came in 0.05 s"), (b"\x16\x03\x01", "the handshake was not done in 0.0")],
)
async def test_who_says_too_little_is_let_go_within_one_deadline(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    begun: bytes,
    text: str,
) -> None:
    monkeypatch.setattr(sessions, "HANDSHAKE_S", 0.05)
    async with (
        receiver_site(tmp_path / "rx", **at_receiver(tmp_path)) as rx,
        await trio.open_tcp_stream("127.0.0.1", rx.port) as stream,
    ):
        await stream.send_all(begun)
        await logged(caplog, text)
