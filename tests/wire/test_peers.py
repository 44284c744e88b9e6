# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which VMs a peer may push: by the scope of its key, by the names in its certificate."""

from __future__ import annotations

import pytest

from replicator.errors import UsageError
from replicator.wire.keys import PreSharedKey
from replicator.wire.peers import CertificatePeer, KeyPeer, parse_allow

VM = "5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01"


@pytest.mark.parametrize(
    ("scope", "allowed"), [(None, True), ("web", True), (VM, True), ("db", False), ("we*", False)]
)
def test_a_key_pushes_any_vm_or_the_one_that_it_is_for(scope: str | None, allowed: bool) -> None:
    peer = KeyPeer(PreSharedKey.from_hex("ab" * 32, name="web.key", vm=scope))
    assert peer.may_push(VM, "web") is allowed
    assert peer.name == "the key web.key"


@pytest.mark.parametrize(
    ("names", "allow", "allowed"),
    [
        (("web",), "", True),
        ((VM,), "", True),
        (("other", "web"), "", True),
        (("other",), "", False),
        ((), "", False),
        ((), "other: *", False),
        # Names are text, not patterns, however they look: the authority does not write our patterns.
        (("*",), "", False),
        (("w?b",), "", False),
        (("WEB",), "", False),
        (("site-a",), "site-a: *", True),
        (("site-a",), "site-a: db, we?", True),
        (("site-a",), f"site-a: {VM}", True),
        (("site-a",), f"site-a: {VM[:8]}*", False),
        (("site-a",), "site-a: db*; site-b: web", False),
        (("site-a", "site-b"), "site-a: db*; site-b: web", True),
        # An entry stands in place of the name's own meaning.
        (("web",), "web: db", False),
        (("spiffe://site/a:1",), "spiffe://site/a:1: web", True),
        (("spiffe://site/a",), "spiffe://site/a:web", True),
    ],
)
def test_a_certificate_pushes_what_its_names_may(
    names: tuple[str, ...], allow: str, allowed: bool
) -> None:
    assert CertificatePeer(names, parse_allow(allow)).may_push(VM, "web") is allowed


def test_a_certificate_is_called_by_its_names() -> None:
    assert CertificatePeer(("a", "b"), {}).name == "the certificate a, b"
    assert CertificatePeer((), {}).name == "the certificate without a name"


def test_the_map_is_read_as_written() -> None:
    assert parse_allow(" a: x , y* ;; urn:b:c: z;d:w; ") == {
        "a": ("x", "y*"),
        "urn:b:c": ("z",),
        "d": ("w",),
    }
    assert parse_allow("") == {}


@pytest.mark.parametrize(
    ("text", "part"),
    [("web", "'web'"), ("a: x; : y", "': y'"), ("a:", "'a:'"), ("a: ,", "'a: ,'"), ("a: x; a: y", "'a' is given twice")],
)  # fmt: skip
def test_a_bad_map_is_refused_by_its_key_and_entry(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=r"^dr_allow: ") as caught:
        parse_allow(text)
    assert part in str(caught.value)
