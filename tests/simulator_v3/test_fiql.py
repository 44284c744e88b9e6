# SPDX-License-Identifier: AGPL-3.0-or-later
"""Filters without a simulator: what passes, and what is no filter."""

from __future__ import annotations

import pytest

from replicator.simulator.v3.checks import InvalidError
from replicator.simulator.v3.fiql import parse

KNOWN = frozenset({"name", "size", "tags", "on"})
ITEM = {"name": "Web.1 (old)", "size": 5, "tags": ["a", "b"], "on": True}


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", True),
        ("name==web.1 ", False),
        ("name==.*1.*", True),
        ("name==WEB.*", True),
        ("name==w[e]b.*", False),  # no regular expression of the client's
        ("name!=web.*", False),
        ("size==5", True),
        ("size=gt=4;size=le=5", True),
        ("size=lt=5,tags==b", True),
        ("size=lt=5,tags==c", False),
        ("size==5,size==6;name==nobody", True),  # and binds stronger than or
        ("(size==5,size==6);name==nobody", False),
        ("on==true", True),
        ("name=gt=1", False),
    ],
)
def test_what_passes(text: str, passes: bool) -> None:
    assert parse(text, KNOWN)(ITEM) == passes


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "name=",
        "shoe==1",
        "name==a;",
        "(name==a",
        "name==a)",
        "size=gt=x",
        "(" * 20 + "name==a",
        "name==a;" * 300 + "name==a",
    ],
)
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(InvalidError):
        parse(text, KNOWN)
