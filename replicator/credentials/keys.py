# SPDX-License-Identifier: AGPL-3.0-or-later
"""The pre-shared keys that ``dr_auth_token`` names: a current one and, while they are changed, a next one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from replicator.config import Config, is_key_text
from replicator.errors import UsageError
from replicator.private_files import read_file
from replicator.wire.keys import Keyring, PreSharedKey

_FILE_BYTES_MAX: Final = 8192
_KEYS_MAX: Final = 2


def key_paths(config: Config) -> list[Path]:
    """The files (and the folder) that ``load_keyring`` looks at, whether they are there or not."""
    token = config.dr_auth_token
    if not token or is_key_text(token):
        return []
    path = Path(token)
    return [path, *sorted(path.glob("*.key"))] if path.is_dir() else [path]


def load_keyring(config: Config) -> Keyring:
    """The keys that a receiver accepts: given themselves, in a file, or in a folder of ``VM.key`` files.

    A key from a folder may push only the VM (UUID or name) that its file is named after. Raises UsageError. Blocks.
    """
    token = config.dr_auth_token
    if not token:
        raise UsageError("dr_auth_token: missing; make one with: openssl rand -hex 32")
    try:
        if is_key_text(token):
            return Keyring(_parse(token.split(","), "dr_auth_token", None))
        path = Path(token)
        if not path.is_dir():
            return Keyring(_read(path, None))
        files = sorted(path.glob("*.key"))
        if not files:
            raise UsageError(f"no *.key file in {path}")
        return Keyring([key for file in files for key in _read(file, file.stem)])
    except UsageError as error:
        raise UsageError(f"dr_auth_token: {error}") from None


def load_source_keys(config: Config) -> Keyring:
    """The keys that a source proves: the current one, then the next one if there is one. Raises UsageError. Blocks."""
    if config.dr_auth_token and Path(config.dr_auth_token).is_dir():
        raise UsageError("dr_auth_token: a source pushes with one key; name its file")
    return load_keyring(config)


def _read(path: Path, vm: str | None) -> list[PreSharedKey]:
    data = read_file(path, _FILE_BYTES_MAX, private=True)
    try:
        return _parse(data.decode("ascii", "replace").split("\n"), path.name, vm)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _parse(texts: list[str], name: str, vm: str | None) -> list[PreSharedKey]:
    """One or two keys; the second is the next one."""
    texts = [text.strip() for text in texts if text.strip()]
    if len(texts) > _KEYS_MAX:
        raise UsageError(f"{len(texts)} keys; two at most: the current one and the next one")
    if not texts:
        raise UsageError("it holds no key; make one with: openssl rand -hex 32")
    names = (name, f"{name} (next)")
    return [
        PreSharedKey.from_hex(text, name=label, vm=vm)
        for text, label in zip(texts, names, strict=False)
    ]


__all__ = ["key_paths", "load_keyring", "load_source_keys"]
