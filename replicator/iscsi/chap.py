# SPDX-License-Identifier: AGPL-3.0-or-later
"""CHAP in a login (RFC 7143, 12.1): our answer to the target's challenge, and the check of its answer to ours. No I/O."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

from replicator.iscsi.keys import decode_binary, encode_binary
from replicator.iscsi.pdu import PduError
from replicator.iscsi.settings import Chap

#: By IANA's number. MD5 is offered first: some targets (tgt) take 7 for SHA-1, so that only a target that
#: refuses MD5 is to come to it. An attacker in between could choose MD5 in any order: CHAP does not protect the choice.
_DIGESTS: Final = {"5": "md5", "7": "sha256", "8": "sha3_256"}


class ChapExchange:
    """One CHAP exchange. ``challenge`` is ours, fresh random bytes, for a target that has to prove itself."""

    def __init__(self, chap: Chap, challenge: bytes) -> None:
        self._chap = chap
        self._challenge = challenge
        self._identifier = challenge[0]
        self._algorithm = ""

    def offer(self) -> list[tuple[str, str]]:
        """The algorithms that we know."""
        return [("CHAP_A", ",".join(_DIGESTS))]

    def answer(self, keys: Mapping[str, str]) -> list[tuple[str, str]]:
        """Our name and response to the target's challenge, and our own challenge if the target has to prove itself.

        Raises PduError.
        """
        algorithm, identifier = keys.get("CHAP_A", ""), keys.get("CHAP_I", "")
        if algorithm not in _DIGESTS:
            raise PduError("no CHAP algorithm of those that were offered")
        if not (identifier.isascii() and identifier.isdigit()) or int(identifier) > 255:
            raise PduError("a CHAP identifier that is none")
        challenge = decode_binary(keys.get("CHAP_C", ""))
        if challenge == self._challenge:
            raise PduError("our own CHAP challenge, sent back to us")
        self._algorithm = algorithm
        response = self._digest(int(identifier), self._chap.secret, challenge)
        pairs = [("CHAP_N", self._chap.user), ("CHAP_R", encode_binary(response))]
        if self._chap.mutual:
            pairs.append(("CHAP_I", str(self._identifier)))
            pairs.append(("CHAP_C", encode_binary(self._challenge)))
        return pairs

    def proves(self, keys: Mapping[str, str]) -> bool:
        """Whether the target's name and response show that it knows its secret. Raises PduError if they are malformed."""
        if not self._chap.mutual:
            return True
        if "CHAP_N" not in keys or "CHAP_R" not in keys:
            return False
        expected = self._digest(self._identifier, self._chap.target_secret, self._challenge)
        name_fits = not self._chap.target_user or hmac.compare_digest(
            keys["CHAP_N"].encode(), self._chap.target_user.encode()
        )
        return hmac.compare_digest(decode_binary(keys["CHAP_R"]), expected) and name_fits

    def _digest(self, identifier: int, secret: str, challenge: bytes) -> bytes:
        # The protocol's choice, not ours: the secret is random and used for this alone.
        digest = hashlib.new(_DIGESTS[self._algorithm], usedforsecurity=False)
        digest.update(bytes([identifier]) + secret.encode() + challenge)
        return digest.digest()


__all__ = ["ChapExchange"]
