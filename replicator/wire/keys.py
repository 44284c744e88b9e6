# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pre-shared keys, and the ring of those that a receiver accepts. Nothing here shows a secret."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from replicator.errors import UsageError

KEY_BYTES_MIN: Final = 32
KEY_BYTES_MAX: Final = 1024
HINT_BYTES: Final = 8

_LABEL_HINT: Final = b"replctl key hint"


@dataclass(frozen=True, slots=True, eq=False)
class PreSharedKey:
    """A key that source and receiver both hold. Neither ``repr`` nor any error shows the secret.

    ``vm`` is the scope: the one VM that this key may push, or ``None`` for any. ``name`` is for
    logs. Build it with :meth:`from_hex`.
    """

    name: str
    vm: str | None
    secret: bytes = field(repr=False)
    hint: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not KEY_BYTES_MIN <= len(self.secret) <= KEY_BYTES_MAX:
            raise UsageError(
                f"the key {self.name!r} has {len(self.secret) * 8} bits; at least "
                f"{KEY_BYTES_MIN * 8} are needed (make one with: openssl rand -hex 32)"
            )
        digest = hmac.digest(self.secret, _LABEL_HINT, "sha256")
        object.__setattr__(self, "hint", digest[:HINT_BYTES])

    @classmethod
    def from_hex(
        cls, text: str, *, name: str = "dr_auth_token", vm: str | None = None
    ) -> PreSharedKey:
        """Make a key from hex digits. Raises :class:`UsageError` when bad, or under 256 bits."""
        try:
            secret = bytes.fromhex(text)
        except ValueError:
            # Not chained: the cause would tell about the text.
            raise UsageError(f"the key {name!r} is not a string of hex digits") from None
        return cls(name, vm, secret)


class Keyring(Mapping[bytes, PreSharedKey]):
    """The keys that a receiver accepts, by hint. Immutable."""

    def __init__(self, keys: Iterable[PreSharedKey]) -> None:
        """Raises :class:`UsageError` when two keys are the same: their scope would be ambiguous."""
        self._keys: dict[bytes, PreSharedKey] = {}
        for key in keys:
            other = self._keys.setdefault(key.hint, key)
            if other is not key:
                raise UsageError(f"the keys {other.name!r} and {key.name!r} are the same key")
        # Stands in for an unknown key, so that the answer and the work are those for a known one.
        self._decoy: Final = PreSharedKey("unknown", None, secrets.token_bytes(KEY_BYTES_MIN))

    def __getitem__(self, hint: bytes) -> PreSharedKey:
        return self._keys[hint]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, hint: bytes) -> tuple[PreSharedKey, bool]:
        """The key for a hint and ``True``, or a decoy that nobody holds and ``False``."""
        key = self._keys.get(hint)
        return (self._decoy, False) if key is None else (key, True)
