# SPDX-License-Identifier: AGPL-3.0-or-later
"""Decisions about bitmaps and names that depend on states which are hard to bring about in a real
QEMU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from replicator.errors import SourceError
from replicator.sources import snapshot_names as names
from replicator.sources.qemu_inventory import Bitmap, Inventory, Node, find_disks
from replicator.sources.qemu_removal import restore_actions
from replicator.sources.qmp import QmpClient, QmpError

ON, OFF, BROKEN = (True, False), (False, False), (False, True)
State = tuple[bool, bool] | None


def node(**bitmaps: State) -> Node:
    """A node whose bitmaps of pushes ``new``, ``old``, ``other`` are in these states."""
    held = {
        names.bitmap_name(push): Bitmap(names.bitmap_name(push), *state)
        for push, state in bitmaps.items()
        if state is not None
    }
    return Node("disk", "raw", False, 1 << 20, False, held)


@pytest.mark.parametrize(
    ("new", "old", "other", "expected"),
    [
        # Nothing, or nothing of ours to undo.
        (None, None, None, []),
        (None, ON, None, []),
        # No reference on this disk: the push's bitmap goes.
        (ON, None, None, ["remove new"]),
        (BROKEN, None, None, ["remove new"]),
        # The usual: the reference takes over what the push's bitmap saw.
        (ON, OFF, None, ["enable old", "merge old", "remove new"]),
        (ON, ON, None, ["merge old", "remove new"]),
        # Changes were missed: a reference that tells less than the truth is removed.
        (None, OFF, None, ["remove old"]),
        (OFF, OFF, None, ["remove old", "remove new"]),
        (BROKEN, OFF, None, ["remove old", "remove new"]),
        (ON, BROKEN, None, ["remove old", "remove new"]),
        # It recorded all the time: nothing was missed.
        (BROKEN, ON, None, ["remove new"]),
        # Another push's snapshot stopped the reference: what that missed, its bitmap holds.
        (None, OFF, ON, []),
        (BROKEN, OFF, ON, ["remove new"]),
        (None, OFF, OFF, ["remove old"]),
    ],
)
def test_bitmaps_after_a_push_is_given_up(
    new: State, old: State, other: State, expected: list[str]
) -> None:
    actions = restore_actions(node(new=new, old=old, other=other), "new", "old")
    said = []
    for action in actions:
        data = action["data"]
        assert data["node"] == "disk"
        target = data.get("target") or data["name"]
        said.append(f"{action['type'].rpartition('-')[2]} {target.removeprefix('replctl-')}")
    assert said == expected


class Fake:
    """A QMP connection with fixed answers; a command without one is unknown."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {key.replace("_", "-"): value for key, value in answers.items()}

    async def execute(self, command: str) -> Any:
        if command not in self.answers:
            raise QmpError("unknown", "CommandNotFound")
        return self.answers[command]


def inventory(*nodes: Node, exports: dict[str, str] | None = None) -> Inventory:
    return Inventory({n.name: n for n in nodes}, {}, exports or {}, 0)


def plain(name: str, driver: str = "raw", *, read_only: bool = False) -> Node:
    return Node(name, driver, read_only, 4096, False, {})


async def find(fake: Fake, found: Inventory) -> list[str]:
    return [disk.identity for disk in await find_disks(cast("QmpClient", fake), found)]


def device(node_name: str, **more: Any) -> dict[str, Any]:
    return {"device": "", "removable": False, "inserted": {"node-name": node_name}, **more}


async def test_disks_of_a_vm() -> None:
    blocks = [
        device("z-named", qdev="vda"),
        device("#block1", device="virtio0"),
        device("#block2", qdev="/machine/peripheral/sata:0/x"),
        device("flash", qdev="/machine/system.flash1"),
        device("#block3", device="pflash1"),
        device("usb", removable=True),
        device("frozen"),
        {"device": "empty", "removable": True},
    ]
    nodes = [plain(n) for n in ("z-named", "#block1", "#block2", "flash", "#block3", "usb")]
    found = inventory(*nodes, plain("frozen", read_only=True))
    fake = Fake(query_name={}, query_block=blocks)
    identities = await find(fake, found)
    assert len(identities) == 3
    # In the machine's own order: the first is what it boots from.
    assert identities[:2] == ["z-named", "virtio0"]
    assert identities[2].startswith("machine-peripheral-sata-0-x-")
    assert identities == await find(fake, found)


async def test_disks_of_a_storage_daemon() -> None:
    exports = {"w1": "b", "w2": "a", "w3": "a", "ro": "c", "replctl-p1-0": "d", "gone": "e"}
    nodes = (plain("a"), plain("b"), plain("c", read_only=True), plain("d"))
    assert await find(Fake(), inventory(*nodes, exports=exports)) == ["a", "b"]


async def test_disks_that_cannot_be_used() -> None:
    with pytest.raises(SourceError, match="no writable disk"):
        await find(Fake(), inventory())
    busy = inventory(plain("#f", "mirror_top"), exports={"w": "#f"})
    with pytest.raises(SourceError, match="another block job is at work on w"):
        await find(Fake(), busy)
    blocks = [device("#a", device="x"), device("#b", device="x")]
    twins = Fake(query_name={}, query_block=blocks)
    with pytest.raises(SourceError, match="two disks are called x"):
        await find(twins, inventory(plain("#a"), plain("#b")))


def test_names_tell_their_push() -> None:
    for push_id in ("p", "a-1", "a.b-2-3", "a-1-own", "0" * 64):
        work = Path("/w")
        assert names.push_of_object(names.object_id(push_id, 12)) == push_id
        for own in (True, False):
            export = names.export_id(push_id, 12, own_server=own)
            assert names.push_of_object(export) == push_id
            assert names.tells_own_server(export) is own
        assert names.push_of_bitmap(names.bitmap_name(push_id)) == push_id
        assert len(names.node_name(push_id, 9999)) <= 31
        record = names.record_path(work, push_id).name
        for file in (
            names.scratch_path(work, push_id, 3).name,
            names.clone_path(work, push_id, 3).name,
            record,
            f"{record}.new",
        ):
            assert names.push_of_file(file) == push_id
    for foreign in ("disk", "replctl-x", "xreplctl-p-1", "replctl-x-own", "xreplctl-p-1-own"):
        assert names.push_of_object(foreign) is None
        assert not names.tells_own_server(foreign)
    for foreign in ("qemu-1.sock", "replctl-p.qcow2", "notes.json"):
        assert names.push_of_file(foreign) is None
