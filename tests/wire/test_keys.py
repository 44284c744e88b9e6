# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import hashlib
import hmac

import pytest

from replicator.errors import UsageError
from replicator.wire.keys import Keyring, PreSharedKey

HEX = hashlib.sha256(b"a test's key").hexdigest()


def test_the_hint_is_a_truncated_mac_of_a_constant() -> None:
    key = PreSharedKey.from_hex(HEX)
    assert key.hint == hmac.digest(bytes.fromhex(HEX), b"replctl key hint", "sha256")[:8]


@pytest.mark.parametrize("text", ["", HEX[:-2], HEX[:-1], HEX[:-1] + "g", "ab" * 1025, HEX + "é"])
def test_a_short_long_or_malformed_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(UsageError, match="dr_auth_token") as caught:
        PreSharedKey.from_hex(text)
    assert HEX[:16] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_white_space_around_a_key_read_from_a_file_does_no_harm() -> None:
    assert PreSharedKey.from_hex(f" {HEX}\n").hint == PreSharedKey.from_hex(HEX).hint


def test_repr_shows_the_name_and_the_scope_but_nothing_of_the_secret() -> None:
    key = PreSharedKey.from_hex(HEX, name="to site B", vm="web")
    assert repr(key) == "PreSharedKey(name='to site B', vm='web')"
    assert str(key) == repr(key)


def test_a_keyring_finds_by_hint_and_answers_an_unknown_hint_with_a_decoy() -> None:
    known = PreSharedKey.from_hex(HEX)
    ring = Keyring([known])
    assert ring.find(known.hint) == (known, True)
    decoy, found = ring.find(b"unknown!")
    assert not found
    assert decoy is not known
    assert len(decoy.secret) == len(known.secret)
    # Two rings share no decoy: knowing one installation says nothing about another.
    assert Keyring([]).find(b"unknown!")[0].secret != decoy.secret


def test_a_keyring_is_a_mapping_of_what_was_put_in() -> None:
    keys = [PreSharedKey.from_hex(hashlib.sha256(bytes([i])).hexdigest()) for i in range(3)]
    ring = Keyring(keys)
    assert dict(ring) == {key.hint: key for key in keys}
    assert len(ring) == 3
    assert HEX not in repr(ring)


def test_one_key_with_two_scopes_is_refused() -> None:
    keys = [PreSharedKey.from_hex(HEX, name=name, vm=name) for name in ("web", "mail")]
    with pytest.raises(UsageError, match="'web' and 'mail' are the same key"):
        Keyring(keys)
