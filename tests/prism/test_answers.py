# SPDX-License-Identifier: AGPL-3.0-or-later
"""Answers read field by field: whatever comes is a value in bounds, or an error that names the host and the field."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.prism.answers import Node
from replicator.prism.errors import PrismAnswerError
from replicator.prism.types import Kind
from replicator.prism.v4_read import (
    read_cluster,
    read_found,
    read_task,
    read_vm,
    read_vm_summary,
    rfc3339,
)

WHERE = "Prism pc:9440: GET /x"
UUID = "0005b6f1-0000-0000-0000-0000000000aa"

#: Anything that JSON can hold, with the names that readers look for.
NAMES = [
    "extId",
    "name",
    "cluster",
    "config",
    "disks",
    "diskAddress",
    "backingInfo",
    "busType",
    "index",
    "diskSizeBytes",
    "guestTools",
    "entitiesAffected",
    "rel",
    "errorMessages",
    "completionDetails",
    "value",
    "status",
    "network",
    "externalAddress",
    "ipv4",
    "clusterFunction",
    "nodes",
    "nodeList",
    "vmRecoveryPoints",
    "locationReferences",
    "creationTime",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(UUID),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=8)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_readers_take_anything(value: Any) -> None:
    readers: list[Callable[[Node], Any]] = [
        read_vm,
        read_vm_summary,
        read_cluster,
        read_task,
        *(lambda node, kind=kind: read_found(kind, node) for kind in Kind),
    ]
    for read in readers:
        with suppress(PrismAnswerError):
            read(Node(value, WHERE))


@pytest.mark.parametrize(
    ("read", "raw"),
    [
        (lambda n: n.text("a"), {}),
        (lambda n: n.text("a"), {"a": ""}),
        (lambda n: n.text("a"), {"a": 1}),
        (lambda n: n.text("a", ""), {"a": "x" * 5000}),
        (lambda n: n.uuid("a"), {"a": "../../x"}),
        (lambda n: n.number("a"), {"a": True}),
        (lambda n: n.number("a"), {"a": -1}),
        (lambda n: n.number("a", high=5), {"a": 6}),
        (lambda n: n.number("a"), {"a": 1.5}),
        (lambda n: n.number("a"), {"a": "1" * 30}),
        (lambda n: n.flag("a"), {"a": "true"}),
        (lambda n: n.time_us("a"), {"a": "yesterday"}),
        (lambda n: n.node("a"), {"a": []}),
        (lambda n: n.maybe("a"), {"a": "x"}),
        (lambda n: n.nodes("a"), {"a": {}}),
        (lambda n: n.nodes("a"), {"a": [1]}),
        (lambda n: n.texts("a"), {"a": ["x", 1]}),
    ],
)
def test_what_does_not_fit_names_the_field(
    read: Callable[[Node], Any], raw: dict[str, Any]
) -> None:
    with pytest.raises(PrismAnswerError) as caught:
        read(Node(raw, WHERE))
    assert str(caught.value).startswith(f"{WHERE}.a")


def test_what_fits() -> None:
    node = Node({"n": "17", "t": "1970-01-01T00:00:01.5Z", "z": None, "u": UUID}, WHERE)
    assert node.number("n") == 17
    assert node.time_us("t") == 1_500_000
    assert node.number("z", 3) == 3
    assert node.flag("z", default=True)
    assert node.text("z", "d") == "d"
    assert node.nodes("z") == []
    assert node.texts("z") == []
    assert node.maybe("z") is None
    assert node.uuid("u") == UUID
    assert rfc3339(1_500_000) == "1970-01-01T00:00:01Z"
