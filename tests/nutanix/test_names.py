# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import SourceError, StateError
from replicator.log import open_log
from replicator.prism.types import Kind
from replicator.sources.nutanix import names
from replicator.sources.nutanix.ledger import INSTALLATION, Ledger, read_entries
from replicator.sources.nutanix.names import NAME_MAX, ObjectName
from tests.nutanix.fake import MemoryStore

_OURS = st.builds(
    ObjectName,
    installation=st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
    push_id=st.from_regex(r"[a-z0-9]{1,22}", fullmatch=True),
    kind=st.sampled_from(Kind),
    made_at_us=st.integers(0, 4_000_000_000).map(lambda second: second * 1_000_000),
    disk=st.none() | st.integers(0, 9999),
)


@given(_OURS)
def test_a_name_is_read_as_it_was_written(name: ObjectName) -> None:
    text = str(name)
    assert ObjectName.parse(text) == name
    assert len(text) <= NAME_MAX
    assert text.startswith(names.prefix(name.installation))


def test_the_form_of_a_name() -> None:
    name = ObjectName("1a2b3c4d", "7", Kind.VOLUME_GROUP, 1_767_323_045_999_999, 1)
    assert str(name) == "drx-1a2b3c4d-7-vg-20260102T030405Z-1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "drx-1a2b3c4d-7-vg-20260102T030405Z ",
        "drx-1a2b3c4d-7-vg-20260102T030405Z-",
        "drx-1a2b3c4d-7-vg-20260102T030405Z-01",
        "drx-1a2b3c4d-7-vg-20260102T030405Z-12345",
        "drx-1a2b3c4d-7-vm-20260102T030405Z",
        "drx-1a2b3c4d-7-vg-20261302T030405Z",
        "drx-1A2B3C4D-7-vg-20260102T030405Z",
        "drx-1a2b3c4-7-vg-20260102T030405Z",
        "Drx-1a2b3c4d-7-vg-20260102T030405Z",
        "my-drx-1a2b3c4d-7-vg-20260102T030405Z",
        "drx-1a2b3c4d-a-b-vg-20260102T030405Z",
        "drx-1a2b3c4d-7-vg-2026010\uff12T030405Z",
    ],
)
def test_what_only_looks_like_ours_is_not(text: str) -> None:
    assert ObjectName.parse(text) is None


@pytest.mark.parametrize("push_id", ["", "A", "a-b", "a" * 23, "é"])
def test_a_push_that_no_name_can_hold(push_id: str) -> None:
    with pytest.raises(SourceError, match="cannot be in a name"):
        ObjectName("1a2b3c4d", push_id, Kind.SNAPSHOT, 0)


async def test_an_installation_is_made_once() -> None:
    store = MemoryStore()
    first = await Ledger.open(store)
    assert names.is_installation(first.installation)
    assert (await Ledger.open(store)).installation == first.installation
    assert store.items == {INSTALLATION: first.installation}


async def test_a_damaged_journal_is_refused() -> None:
    store = MemoryStore()
    store.items[INSTALLATION] = "1a2b3c4d-"
    with pytest.raises(StateError, match="installation"):
        await Ledger.open(store)
    with pytest.raises(StateError, match="prism/x"):
        read_entries({"prism/x": {"kind": "rp"}})


async def test_the_event_log_keeps_the_ledger(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        installation = (await Ledger.open(log)).installation
        await log.journal_put("prism/a/1", {"x": 1})
        await log.journal_put("prism/b/2", [b"\0"])
        await log.journal_put("prisn", 3)
    async with open_log(tmp_path / "events", readonly=True) as log:
        assert await log.journal_items("prism/") == {"prism/a/1": {"x": 1}, "prism/b/2": [b"\0"]}
        assert await log.journal_items("prism/b") == {"prism/b/2": [b"\0"]}
        assert await log.journal_items("x") == {}
        assert await log.journal_get(INSTALLATION) == installation
