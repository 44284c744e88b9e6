# SPDX-License-Identifier: AGPL-3.0-or-later
"""Signed heads of a log, to leave the machine: who holds one can tell a log that was changed.

The text is a C2SP tlog-checkpoint (c2sp.org/tlog-checkpoint) in a C2SP signed note
(c2sp.org/signed-note), readable by the tools of transparency logs:

    origin, size in decimal, root in base64: a line each
    (an empty line)
    — name base64(key id, 4 bytes ‖ Ed25519 signature, 64 bytes)      one line for each signature

Whoever countersigns adds a line. Keys have their text form from there too. This module knows
neither databases nor events; only keys are read from and written to files, which blocks.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from eventstore import merkle

NAME_BYTES_MAX = 255
TEXT_BYTES_MAX = 4096
SIGNATURES_MAX = 16
KEY_FILE_BYTES_MAX = 1024

_ED25519 = b"\x01"
_KEY_BYTES = 32
_KEY_ID_BYTES = 4
_SIGNATURE_BYTES = 64
_PRIVATE = "PRIVATE+KEY+"
_SIGNATURE_MARK = "\u2014 "  # an em dash and a space
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)


class CheckpointError(ValueError):
    """A checkpoint, or a key, that is not to be believed; the message says why."""


class RollbackError(CheckpointError):
    """A log is smaller than it was: events that were there are gone."""


class ForkError(CheckpointError):
    """A log does not continue what it was: history is not the one that was seen before."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The head of the log that is called ``origin``: how many events, and the root over them.

    ``origin`` is one line of 1..255 bytes that no other log has. Raises CheckpointError.
    """

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        _check_line(self.origin, "origin")
        if not 0 <= self.size <= merkle.SIZE_MAX:
            raise CheckpointError(f"a log's size {self.size} is not within 0..2^63-1")
        if len(self.root) != merkle.HASH_BYTES:
            raise CheckpointError(f"a root has {len(self.root)} bytes, not {merkle.HASH_BYTES}")
        if self.size == 0 and self.root != merkle.EMPTY_ROOT:
            raise CheckpointError("the root of an empty log is not that of an empty tree")

    @property
    def text(self) -> str:
        """The three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{_encode(self.root)}\n"


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """The public half of a key. ``str`` gives its text form, ``name+key id+base64``, for `parse`.

    ``name`` has 1..255 bytes, no white space and no plus; ``public`` is the 32 bytes of an Ed25519
    key. Raises CheckpointError.
    """

    name: str
    public: bytes

    def __post_init__(self) -> None:
        _check_line(self.name, "key name")
        if "+" in self.name or any(letter.isspace() for letter in self.name):
            raise CheckpointError(f"the key name {self.name!r} has white space or a plus")
        if len(self.public) != _KEY_BYTES:
            raise CheckpointError(f"a public key has {len(self.public)} bytes, not {_KEY_BYTES}")

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{_encode(_ED25519 + self.public)}"

    @property
    def key_id(self) -> bytes:
        """The four bytes that tell this key from others of its name."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:_KEY_ID_BYTES]

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """The key of a text form. Raises CheckpointError if it is not exactly one."""
        name, key_id, public = _split_key(text)
        key = cls(name, public)
        if key.key_id.hex() != key_id:
            raise CheckpointError(f"the key of {name!r} does not have the id that its text names")
        return key

    def verify(self, message: bytes, signature: bytes) -> bool:
        """True if this key made ``signature`` over ``message``."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class CheckpointKey:
    """The private half of a key: whoever has it speaks for the log. It is shown nowhere.

    Made by `generate` or `load` only.
    """

    __slots__ = ("_private", "verifier")

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self.verifier = VerifierKey(name, private.public_key().public_bytes_raw())
        self._private = private

    def __repr__(self) -> str:
        return f"<CheckpointKey {self.verifier.name} {self.verifier.key_id.hex()}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not pickled or copied")

    @classmethod
    def generate(cls, name: str) -> CheckpointKey:
        """A new key. Raises CheckpointError for a bad name."""
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CheckpointKey:
        """The key in a file that `save` made.

        Raises CheckpointError if it is no such file, or others than its owner may touch it (mode,
        or an owner who is neither this user nor root), OSError if it can't be read.
        """
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{os.fspath(path)} is not a file")
            if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
                raise CheckpointError(
                    f"the key file {os.fspath(path)} can be read or changed by others "
                    f"(mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}): "
                    "its mode must be 0600"
                )
            raw = file.read(KEY_FILE_BYTES_MAX + 1)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = ""
        if len(raw) > KEY_FILE_BYTES_MAX or not (text.startswith(_PRIVATE) and text.endswith("\n")):
            raise CheckpointError(f"{os.fspath(path)} is not a checkpoint key")
        # Errors from here on are about a secret: none may show it.
        name, key_id, seed = _split_key(text[len(_PRIVATE) : -1])
        key = cls(name, Ed25519PrivateKey.from_private_bytes(seed))
        if key.verifier.key_id.hex() != key_id:
            raise CheckpointError(f"{os.fspath(path)} is damaged: the key does not have its id")
        return key

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file of mode 0600, durable when this returns.

        Raises FileExistsError rather than lose another key, otherwise OSError; then no file is
        left.
        """
        seed = _encode(_ED25519 + self._private.private_bytes_raw())
        text = f"{_PRIVATE}{self.verifier.name}+{self.verifier.key_id.hex()}+{seed}\n"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                os.fchmod(fd, 0o600)
                file.write(text.encode())
                file.flush()
                os.fsync(fd)
            directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            os.unlink(path)
            raise

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature over ``message``, 64 bytes."""
        return self._private.sign(message)


def sign(checkpoint: Checkpoint, key: CheckpointKey) -> str:
    """The text of a checkpoint with the signature of ``key``."""
    return f"{checkpoint.text}\n{_signature_line(checkpoint.text, key)}"


def cosign(text: str, keys: Sequence[VerifierKey], key: CheckpointKey) -> str:
    """``text`` with the signature of ``key`` as one more line.

    First `open_checkpoint` with ``keys``: nobody countersigns what he did not check. Raises
    CheckpointError, also if ``key`` has signed already or there is no room.
    """
    checkpoint = open_checkpoint(text, keys)
    _, signatures = _take_apart(text, TEXT_BYTES_MAX)
    if (key.verifier.name, key.verifier.key_id) in signatures:
        raise CheckpointError(f"{key.verifier.name} has signed this checkpoint already")
    signed = text + _signature_line(checkpoint.text, key)
    _take_apart(signed, TEXT_BYTES_MAX)
    return signed


def open_checkpoint(
    text: str, keys: Sequence[VerifierKey], *, limit: int = TEXT_BYTES_MAX
) -> Checkpoint:
    """The checkpoint of a text that **every** one of ``keys`` has signed.

    Well-formed signatures by others are not looked at (signed-note demands it, so that a text may
    be countersigned by those whom the reader does not know). Which log ``origin`` names is for the
    caller to compare. Raises CheckpointError naming the reason: over ``limit`` bytes or 16
    signatures, not of the format to the last byte, a signature that is missing, false or double.
    ValueError without any key.
    """
    if not keys:
        raise ValueError("a checkpoint is opened with at least one key")
    checkpoint, signatures = _take_apart(text, limit)
    for key in keys:
        signature = signatures.get((key.name, key.key_id))
        if signature is None:
            raise CheckpointError(f"the checkpoint is not signed by {key.name}")
        if not key.verify(checkpoint.text.encode(), signature):
            raise CheckpointError(f"the checkpoint's signature by {key.name} is false")
    return checkpoint


def check_progress(last: Checkpoint | None, new: Checkpoint, proof: Sequence[bytes]) -> None:
    """Return only if the log at ``new`` continues the log at ``last``, the one seen before.

    ``proof`` is the consistency proof between the two sizes, empty if they are equal or ``last`` is
    None (then any log is believed, this once). Raises RollbackError, ForkError, and CheckpointError
    if they are of two logs.
    """
    if last is None:
        last = Checkpoint(new.origin, 0, merkle.EMPTY_ROOT)
    if new.origin != last.origin:
        raise CheckpointError(f"the checkpoint is of log {new.origin!r}, not {last.origin!r}")
    if new.size < last.size:
        raise RollbackError(
            f"log {new.origin!r} has {new.size} events, but it had {last.size}: "
            "it was rolled back to an older state"
        )
    if new.size == last.size and new.root != last.root:
        raise ForkError(
            f"log {new.origin!r} with {new.size} events is not the one that was seen with as many: "
            "its history was changed"
        )
    try:
        merkle.verify_consistency(last.size, last.root, new.size, new.root, proof)
    except merkle.ProofError as error:
        raise ForkError(
            f"log {new.origin!r} with {new.size} events is not proven to continue the one that was "
            f"seen with {last.size}: its history was changed, or the proof is wrong ({error})"
        ) from error


def _take_apart(text: str, limit: int) -> tuple[Checkpoint, dict[tuple[str, bytes], bytes]]:
    """The checkpoint of a text and its signatures by key name and id, none of them verified."""
    try:
        count = len(text.encode())
    except UnicodeEncodeError as error:
        raise CheckpointError("the checkpoint is not valid text") from error
    if count > limit:
        raise CheckpointError(f"the checkpoint has {count} bytes, more than {limit}")
    # Not splitlines: it would also divide at letters that the format allows in a line.
    lines = text.split("\n")
    if len(lines) < 6 or lines[3] or lines[-1]:
        raise CheckpointError("the checkpoint is not three lines, an empty one, and signatures")
    origin, size, root = lines[:3]
    if not _SIZE.fullmatch(size):
        raise CheckpointError(f"the checkpoint's size {size[:40]!r} is no number")
    checkpoint = Checkpoint(origin, int(size), _decode(root, "the checkpoint's root"))
    signed_by = lines[4:-1]
    if len(signed_by) > SIGNATURES_MAX:
        raise CheckpointError(f"the checkpoint has more than {SIGNATURES_MAX} signatures")
    signatures: dict[tuple[str, bytes], bytes] = {}
    for name, key_id, signature in _signatures(signed_by):
        if (name, key_id) in signatures:
            raise CheckpointError(f"the checkpoint is signed twice by {name!r}")
        signatures[name, key_id] = signature
    return checkpoint, signatures


def _signatures(lines: Sequence[str]) -> Iterator[tuple[str, bytes, bytes]]:
    for line in lines:
        name, space, encoded = line.removeprefix(_SIGNATURE_MARK).partition(" ")
        if not (line.startswith(_SIGNATURE_MARK) and name and space):
            raise CheckpointError(f"the checkpoint has a line that is no signature: {line[:40]!r}")
        raw = _decode(encoded, f"the signature by {name[:40]!r}")
        if len(raw) <= _KEY_ID_BYTES:
            raise CheckpointError(f"the signature by {name[:40]!r} is too short")
        yield name, raw[:_KEY_ID_BYTES], raw[_KEY_ID_BYTES:]


def _signature_line(text: str, key: CheckpointKey) -> str:
    signature = key.verifier.key_id + key.sign(text.encode())
    return f"{_SIGNATURE_MARK}{key.verifier.name} {_encode(signature)}\n"


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe of that name would wait for somebody to write to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _split_key(text: str) -> tuple[str, str, bytes]:
    """(name, key id in hex, the 32 bytes) of a key's text. No message shows the text."""
    # Base64 has pluses of its own: only the first two divide.
    parts = text.split("+", 2)
    if len(parts) != 3:
        raise CheckpointError("a key's text is not name+id+base64")
    raw = _decode(parts[2], "the key")
    if raw[:1] != _ED25519 or len(raw) != 1 + _KEY_BYTES:
        raise CheckpointError("the key is not of Ed25519")
    return parts[0], parts[1], raw[1:]


def _check_line(text: str, what: str) -> None:
    try:
        count = len(text.encode())
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the {what} is not valid text") from error
    if not 1 <= count <= NAME_BYTES_MAX or not text.isprintable():
        raise CheckpointError(
            f"the {what} {text[:40]!r} is not a line of 1..{NAME_BYTES_MAX} bytes"
        )


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _decode(text: str, what: str) -> bytes:
    """Only the one canonical base64 of some bytes: else a text could be varied and stay signed."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or _encode(raw) != text:
        raise CheckpointError(f"{what} is not base64")
    return raw
