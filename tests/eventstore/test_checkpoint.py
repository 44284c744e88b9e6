# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import base64
import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from eventstore import checkpoint, merkle
from eventstore.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointKey,
    ForkError,
    RollbackError,
    VerifierKey,
    check_progress,
    cosign,
    open_checkpoint,
    sign,
)

# The key, text and signature of the tests of Go's golang.org/x/mod/sumdb/note.
GO_PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
GO_SIGNATURE = (
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
)
OTHER_PUBLIC = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"

LEAVES = [merkle.leaf_hash(bytes([number])) for number in range(20)]
ORIGIN = "site-a.example/vms/events"


def key(name: str, seed: int = 1) -> CheckpointKey:
    return CheckpointKey(name, Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


SITE = key("site-a.example")
WITNESS = key("site-b.example", 2)


def node(level: int, index: int) -> bytes:
    if level == 0:
        return LEAVES[index]
    return merkle.node_hash(node(level - 1, 2 * index), node(level - 1, 2 * index + 1))


def at(size: int, leaves: list[bytes] = LEAVES) -> Checkpoint:
    frontier = merkle.Frontier()
    frontier.extend(leaves[:size])
    return Checkpoint(ORIGIN, size, frontier.root())


def go_key_file(path: Path, text: str = GO_PRIVATE + "\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_and_signatures_are_those_of_the_published_note(tmp_path: Path) -> None:
    public = VerifierKey.parse(GO_PUBLIC)
    assert (public.name, public.key_id.hex(), str(public)) == (
        "PeterNeumann",
        "c74f20a3",
        GO_PUBLIC,
    )
    private = CheckpointKey.load(go_key_file(tmp_path / "key"))
    assert private.verifier == public
    raw = base64.b64decode(GO_SIGNATURE)
    assert public.key_id + private.sign(GO_TEXT.encode()) == raw
    assert public.verify(GO_TEXT.encode(), raw[4:])
    assert not public.verify(GO_TEXT.encode() + b"\n", raw[4:])
    assert not VerifierKey.parse(OTHER_PUBLIC).verify(GO_TEXT.encode(), raw[4:])


def test_a_signed_checkpoint_has_exactly_this_text() -> None:
    text = sign(Checkpoint("origin", 0, merkle.EMPTY_ROOT), SITE)
    lines = text.split("\n")
    assert lines[:4] == ["origin", "0", "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=", ""]
    assert lines[4].startswith("\u2014 site-a.example ")
    raw = base64.b64decode(lines[4].split(" ")[2])
    assert (len(raw), raw[:4]) == (68, SITE.verifier.key_id)
    assert lines[5:] == [""]


@given(
    st.sampled_from([1, 15, merkle.SIZE_MAX]),
    st.sampled_from(["o", "a b", "\u00e9" * 127, ORIGIN]),
)
def test_what_was_signed_is_what_is_opened(size: int, origin: str) -> None:
    wanted = Checkpoint(origin, size, at(min(size, 15)).root)
    text = sign(wanted, SITE)
    assert open_checkpoint(text, [SITE.verifier]) == wanted
    both = cosign(text, [SITE.verifier], WITNESS)
    assert both.startswith(text)
    assert open_checkpoint(both, [SITE.verifier, WITNESS.verifier]) == wanted
    # Whoever does not know the witness can still read it.
    assert open_checkpoint(both, [SITE.verifier]) == wanted


def test_every_key_must_have_signed() -> None:
    text = sign(at(5), SITE)
    with pytest.raises(CheckpointError, match="not signed by site-b"):
        open_checkpoint(text, [SITE.verifier, WITNESS.verifier])
    with pytest.raises(CheckpointError, match="not signed by site-a"):
        # Another key of the same name.
        open_checkpoint(text, [key("site-a.example", 3).verifier])
    with pytest.raises(ValueError, match="at least one key"):
        open_checkpoint(text, [])


def test_no_byte_of_a_signed_checkpoint_can_be_changed() -> None:
    text = sign(at(5), SITE)
    raw = text.encode()
    for place in range(len(raw)):
        for changed in (
            raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :],
            raw[:place] + raw[place + 1 :],
            raw[:place] + b"0" + raw[place:],
            raw[:place] + b"\n" + raw[place:],
        ):
            with pytest.raises(CheckpointError):
                open_checkpoint(changed.decode(errors="surrogateescape"), [SITE.verifier])
    for longer in (text + "\n", text + "x", "\n" + text, "\ufeff" + text):
        with pytest.raises(CheckpointError):
            open_checkpoint(longer, [SITE.verifier])


def signed_lines(body: str) -> str:
    """A text whose signature is right whatever it says."""
    signature = SITE.verifier.key_id + SITE.sign(body.encode())
    return f"{body}\n\u2014 site-a.example {base64.b64encode(signature).decode()}\n"


ROOT = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"o\n5\n{ROOT}\nextension\n", "three lines"),
        (f"o\n5\n{ROOT}", "three lines"),
        ("o\n5\n", "three lines"),
        ("\n\n\n", "no number"),
        (f"\n5\n{ROOT}\n", "origin '' is not a line"),
        (f"{'o' * 256}\n5\n{ROOT}\n", "not a line of 1..255 bytes"),
        (f"o\to\n5\n{ROOT}\n", "not a line"),
        (f"o\r\n5\n{ROOT}\n", "not a line"),
        (f"o\n05\n{ROOT}\n", "no number"),
        (f"o\n+5\n{ROOT}\n", "no number"),
        (f"o\n-5\n{ROOT}\n", "no number"),
        (f"o\n5_0\n{ROOT}\n", "no number"),
        (f"o\n\u0665\n{ROOT}\n", "no number"),
        (f"o\n{'9' * 20}\n{ROOT}\n", "no number"),
        (f"o\n{1 << 63}\n{ROOT}\n", "not within"),
        (f"o\n0\n{ROOT}\n", "empty log"),
        (f"o\n5\n{ROOT[:-1]}\n", "root is not base64"),
        (f"o\n5\n{ROOT[:-2]}B=\n", "root is not base64"),
        (f"o\n5\n{ROOT[:-4]}\n", "root has 30 bytes"),
        (f"o\n5\n {ROOT}\n", "root is not base64"),
    ],
)
def test_a_text_of_another_form_is_refused_even_with_a_right_signature(
    body: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(signed_lines(body), [SITE.verifier])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-- site-b AAAAAAA=\n", "no signature"),
        ("\u2014 AAAAAAA=\n", "no signature"),
        ("\u2014  AAAAAAA=\n", "no signature"),
        ("a comment\n", "no signature"),
        ("\n", "no signature"),
        ("\u2014 site-b AAAA\n", "too short"),
        ("\u2014 site-b !!!!\n", "not base64"),
        ("\u2014 site-b AAAAAAB=\n", "not base64"),
        ("\u2014 site-b AAAAAAA= x\n", "not base64"),
        ("\u2014 site-b AAAAAAA=", "three lines"),
    ],
)
def test_a_line_that_is_no_signature_is_refused(line: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(sign(at(5), SITE) + line, [SITE.verifier])


def test_a_false_signature_hides_behind_no_other() -> None:
    good = sign(at(5), SITE)
    line = good.split("\n")[4] + "\n"
    with pytest.raises(CheckpointError, match="signed twice by 'site-a"):
        open_checkpoint(good + line, [SITE.verifier])
    false = base64.b64encode(WITNESS.verifier.key_id + bytes(64)).decode()
    text = f"{good}\u2014 site-b.example {false}\n"
    assert open_checkpoint(text, [SITE.verifier]) == at(5)
    with pytest.raises(CheckpointError, match="signature by site-b"):
        open_checkpoint(text, [SITE.verifier, WITNESS.verifier])


def test_a_text_without_end_is_refused_unread() -> None:
    text = sign(at(5), SITE)
    assert open_checkpoint(text, [SITE.verifier], limit=len(text.encode())) == at(5)
    with pytest.raises(CheckpointError, match="more than 10"):
        open_checkpoint(text, [SITE.verifier], limit=10)
    with pytest.raises(CheckpointError, match="has 4097 bytes, more than 4096"):
        open_checkpoint(text + "x" * (4097 - len(text.encode())), [SITE.verifier])
    for number in range(15):
        text = cosign(text, [SITE.verifier], key(f"w{number}"))
    with pytest.raises(CheckpointError, match="more than 16 signatures"):
        cosign(text, [SITE.verifier], WITNESS)
    with pytest.raises(CheckpointError, match="not valid text"):
        open_checkpoint("\ud800", [SITE.verifier])


def test_nobody_countersigns_unseen_or_twice() -> None:
    text = sign(at(5), SITE)
    with pytest.raises(CheckpointError, match="is false"):
        cosign(text.replace("\n5\n", "\n6\n"), [SITE.verifier], WITNESS)
    both = cosign(text, [SITE.verifier], WITNESS)
    with pytest.raises(CheckpointError, match="signed this checkpoint already"):
        cosign(both, [SITE.verifier], WITNESS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Checkpoint("", 0, merkle.EMPTY_ROOT),
        lambda: Checkpoint("a\nb", 0, merkle.EMPTY_ROOT),
        lambda: Checkpoint("\ud800", 0, merkle.EMPTY_ROOT),
        lambda: Checkpoint("o", -1, bytes(32)),
        lambda: Checkpoint("o", 1, bytes(31)),
        lambda: Checkpoint("o", 0, bytes(32)),
        lambda: VerifierKey("a b", bytes(32)),
        lambda: VerifierKey("a+b", bytes(32)),
        lambda: VerifierKey("", bytes(32)),
        lambda: VerifierKey("a", bytes(33)),
        lambda: CheckpointKey.generate("a\u00a0b"),
    ],
)
def test_what_could_not_be_read_back_is_not_made(make: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError):
        make()


def test_no_part_and_no_variant_of_a_key_is_a_key() -> None:
    for start in range(len(GO_PUBLIC)):
        for end in range(start, len(GO_PUBLIC) + 1):
            if (start, end) != (0, len(GO_PUBLIC)):
                with pytest.raises(CheckpointError):
                    VerifierKey.parse(GO_PUBLIC[start:end])
    for place, letter in enumerate(GO_PUBLIC):
        with pytest.raises(CheckpointError):
            VerifierKey.parse(GO_PUBLIC[:place] + chr(ord(letter) + 1) + GO_PUBLIC[place + 1 :])
    # Go's own cases: too long with a right id, an unknown algorithm with a right id.
    for text in (
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        GO_PUBLIC + "\n",
    ):
        with pytest.raises(CheckpointError):
            VerifierKey.parse(text)


# Keys in files.


def test_a_saved_key_signs_as_before_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    made = CheckpointKey.generate("site-a.example")
    path = tmp_path / "checkpoint.key"
    before = os.umask(0)
    try:
        made.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = CheckpointKey.load(path)
    assert loaded.verifier == made.verifier
    assert loaded.sign(b"text") == made.sign(b"text")
    assert CheckpointKey.generate("site-a.example").verifier != made.verifier


def test_saving_never_replaces_a_key(tmp_path: Path) -> None:
    path = go_key_file(tmp_path / "key")
    with pytest.raises(FileExistsError):
        SITE.save(path)
    assert path.read_text() == GO_PRIVATE + "\n"


def test_a_key_that_could_not_be_made_durable_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        SITE.save(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = go_key_file(tmp_path / "key", mode=mode)
    with pytest.raises(CheckpointError, match=rf"by others \(mode {mode:04o}.* must be 0600"):
        CheckpointKey.load(path)


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = go_key_file(tmp_path / "key")
    real = os.fstat

    def strange(fd: int) -> os.stat_result:
        fields = list(real(fd))
        fields[4] = 12345
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", strange)
    with pytest.raises(CheckpointError, match="owner 12345"):
        CheckpointKey.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        GO_PRIVATE,
        GO_PRIVATE + "\n\n",
        GO_PUBLIC + "\n",
        GO_PRIVATE[:-4] + "\n",
        GO_PRIVATE.replace("c74f", "c84f") + "\n",
        GO_PRIVATE + "\n" + "x" * 2000,
        "PRIVATE+KEY+\n",
    ],
)
def test_what_is_no_key_file_is_refused_and_never_shown(tmp_path: Path, text: str) -> None:
    path = go_key_file(tmp_path / "key", text)
    with pytest.raises(CheckpointError) as caught:
        CheckpointKey.load(path)
    error: BaseException | None = caught.value
    while error is not None:
        assert "AYEKF" not in repr(error)
        error = error.__cause__ or error.__context__


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(CheckpointError, match="is not a file"):
        CheckpointKey.load(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        CheckpointKey.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        CheckpointKey.load(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(CheckpointError, match="is not a checkpoint key"):
        CheckpointKey.load(tmp_path / "binary")


def test_a_private_key_is_shown_nowhere(tmp_path: Path) -> None:
    private = CheckpointKey.load(go_key_file(tmp_path / "key"))
    secret = base64.b64decode(GO_PRIVATE.split("+", 4)[4])[1:]
    for shown in (repr(private), str(private), f"{private}", f"{[private]}"):
        assert shown.strip("[]") == "<CheckpointKey PeterNeumann c74f20a3>"
        assert secret.hex() not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(private)
    with pytest.raises(TypeError, match="not pickled"):
        copy.copy(private)


# Progress, as a witness sees it.


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_log_that_grew_is_believed_with_its_proof(a: int, b: int) -> None:
    old, new = sorted((a, b))
    proof = merkle.consistency_proof(old, new, node)
    check_progress(at(old), at(new), proof)
    check_progress(None, at(new), [])


def test_a_rolled_back_log_is_named() -> None:
    with pytest.raises(RollbackError, match=rf"log '{ORIGIN}' has 5 events, but it had 9"):
        check_progress(at(9), at(5), merkle.consistency_proof(5, 9, node))


def test_a_forked_history_is_named_whatever_its_proof() -> None:
    forked = [*LEAVES[:3], merkle.leaf_hash(b"forged"), *LEAVES[4:]]

    def forged(level: int, index: int) -> bytes:
        if level == 0:
            return forked[index]
        return merkle.node_hash(forged(level - 1, 2 * index), forged(level - 1, 2 * index + 1))

    # The chain of the fork is valid in itself.
    check_progress(at(9, forked), at(12, forked), merkle.consistency_proof(9, 12, forged))
    for reader in (node, forged):
        with pytest.raises(ForkError, match=r"with 12 events is not proven .* seen with 9"):
            check_progress(at(9), at(12, forked), merkle.consistency_proof(9, 12, reader))
    with pytest.raises(ForkError, match="with 9 events is not the one"):
        check_progress(at(9), at(9, forked), [])


def test_a_proof_of_another_size_or_none_is_not_progress() -> None:
    for proof in ([], merkle.consistency_proof(8, 12, node), merkle.consistency_proof(9, 13, node)):
        with pytest.raises(ForkError, match="or the proof is wrong"):
            check_progress(at(9), at(12), proof)
    with pytest.raises(ForkError, match="too long"):
        check_progress(None, at(12), [bytes(32)])


def test_checkpoints_of_two_logs_are_not_compared() -> None:
    other = Checkpoint("another.example/log", 12, at(12).root)
    with pytest.raises(CheckpointError, match="is of log 'another"):
        check_progress(at(9), other, merkle.consistency_proof(9, 12, node))


def test_checkpoints_can_be_used_without_a_store() -> None:
    """Whoever only verifies needs no database: the module's imports say so."""
    code = (
        "import sys, importlib.util as u, types; "
        "p = types.ModuleType('eventstore'); p.__path__ = [sys.argv[1]]; "
        "sys.modules['eventstore'] = p; "
        "import eventstore.checkpoint; "
        "assert not {'lmdb', 'eventsourcing'} & sys.modules.keys()"
    )
    folder = str(Path(checkpoint.__file__).parent)
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=240)
