# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a caller says: only valid values can be built, and secrets do not show."""

from __future__ import annotations

import pytest

from replicator.iscsi import Chap, IscsiSettings, Portal
from replicator.iscsi.settings import check_name
from tests.iscsi.lab import INITIATOR


def test_secrets_are_in_no_repr() -> None:
    chap = Chap("alice", "secretsecret1", "target-a", "othersecret12")
    for text in (repr(chap), str(chap), repr(IscsiSettings(INITIATOR, chap))):
        assert "alice" in text
        assert "secret1" not in text


@pytest.mark.parametrize("text", ["", ":3260", "h:0", "h:65536", "[::1", "a b", "h:1:2", "-x"])
def test_what_is_no_portal(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        Portal.parse(text)


@pytest.mark.parametrize(("text", "shown"), [("h", "h:3260"), ("[::1]:5,2", "[::1]:5")])
def test_portals(text: str, shown: str) -> None:
    assert str(Portal.parse(text)) == shown


@pytest.mark.parametrize(
    "name", ["", "iqn.", "worker", "iqn.2026-01.example:a b", "iqn." + "x" * 230]
)
def test_what_is_no_iscsi_name(name: str) -> None:
    with pytest.raises(ValueError, match="iSCSI name"):
        check_name(name)


def test_names_in_lower_case() -> None:
    assert check_name("IQN.2026-01.Example:A") == "iqn.2026-01.example:a"


@pytest.mark.parametrize(
    ("user", "secret", "target_secret"),
    [("", "x", ""), ("a", "", ""), ("a", "same", "same"), ("a", "x" * 256, "")],
)
def test_chap_that_cannot_work(user: str, secret: str, target_secret: str) -> None:
    with pytest.raises(ValueError, match="CHAP"):
        Chap(user, secret, "", target_secret)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 0},
        {"depth": 129},
        {"read_size": 1000},
        {"read_size": 16 << 20},
        {"task_timeout_s": 0},
    ],
)
def test_limits_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"depth|read size|timeouts"):
        IscsiSettings(INITIATOR, **wrong)  # type: ignore[arg-type]
