# SPDX-License-Identifier: AGPL-3.0-or-later
"""Removes what a snapshot consists of in a QEMU process and in the working directory.

Everything is found by name and removed in the reverse order of its making; what is not there is
taken as removed. So each step may be repeated, and may begin with any part of a snapshot that a
killed process left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from replicator import durable
from replicator.sources import snapshot_names as names
from replicator.sources.qemu_inventory import Inventory, Node, take_inventory
from replicator.sources.qmp import Event, QmpClient, QmpError

SETTLE_TIMEOUT_S = 60.0
_POLL_S = 1.0


class Removal:
    """Removal over the connection ``qmp``. ``removed`` collects the names of what was removed."""

    def __init__(self, qmp: QmpClient, working_dir: Path, nbd_socket: Path | None) -> None:
        """``nbd_socket``: where an NBD server that we start listens; None: the configuration names
        a server, and it is not stopped.
        """
        self.qmp = qmp
        self._dir = working_dir
        self._nbd_socket = nbd_socket
        self.removed: list[str] = []

    async def end_snapshot(self, push_id: str) -> None:
        """Remove exports, jobs and scratch nodes of one push; its bitmap stays."""
        prefix = names.node_prefix(push_id)
        await self.end_snapshots(lambda push: push == push_id, lambda node: node.startswith(prefix))

    async def end_snapshots(
        self, wanted: Callable[[str], bool], wanted_node: Callable[[str], bool]
    ) -> None:
        """The same for each push that ``wanted`` accepts; its nodes tell no push, so they are asked
        for apart.
        """
        inventory = await take_inventory(self.qmp)
        exports = _of(inventory.exports, wanted)
        if self._is_ours_alone(exports, inventory):
            # All of it in one step. Exports first, and after a kill in between nothing would tell
            # any more whose server it is, should the working directory be lost too.
            await self.qmp.execute("nbd-server-stop")
            self.removed += exports
        else:
            for export in exports:
                await self._remove_export(export)
        await self._stop_server()
        for job in _of(inventory.jobs, wanted):
            await self._remove_job(job)
        for node in inventory.our_nodes:
            if wanted_node(node):
                await self.qmp.execute("blockdev-del", node_name=node)
                self.removed.append(node)

    def _is_ours_alone(self, exports: list[str], inventory: Inventory) -> bool:
        """Whether we started the NBD server, in whatever working directory, and it serves nothing
        but ``exports``.
        """
        if self._nbd_socket is None or inventory.nbd_exports != len(exports):
            return False
        return any(names.tells_own_server(export) for export in exports)

    async def _remove_export(self, export: str) -> None:
        try:
            await self.qmp.execute("block-export-del", id=export, mode="hard")
        except QmpError:
            # Perhaps it is going already; whether it is gone is asked below.
            if export not in (await take_inventory(self.qmp)).exports:
                return
        await self._settle(
            f"export {export}",
            lambda event: event["event"] == "BLOCK_EXPORT_DELETED",
            lambda inventory: export not in inventory.exports,
        )
        self.removed.append(export)

    async def _remove_job(self, job: str) -> None:
        try:
            await self.qmp.execute("block-job-cancel", device=job, force=True)
        except QmpError as error:
            if error.kind != "DeviceNotActive":
                raise
        await self._settle(
            f"job {job}",
            lambda event: event["event"] == "JOB_STATUS_CHANGE",
            lambda inventory: job not in inventory.jobs,
        )
        self.removed.append(job)

    async def _settle(
        self,
        what: str,
        hint: Callable[[Event], bool],
        done: Callable[[Inventory], bool],
    ) -> None:
        """Wait until ``done``. Events only say when to look again: they may have come before we
        listened.
        """
        with trio.move_on_after(SETTLE_TIMEOUT_S):
            while not done(await take_inventory(self.qmp)):
                await self.qmp.wait_event(hint, _POLL_S)
            return
        raise QmpError(f"QEMU did not end {what} in {SETTLE_TIMEOUT_S:g} s")

    async def _stop_server(self) -> None:
        """Stop an NBD server that we started in this working directory and that nobody uses: QEMU
        has only one, others may want it.
        """
        if self._nbd_socket is None or not self._nbd_socket.is_socket():
            return
        if (await take_inventory(self.qmp)).nbd_exports:
            return
        if await answers(self._nbd_socket):
            await self.qmp.execute("nbd-server-stop")
        await trio.to_thread.run_sync(durable.unlink, self._nbd_socket)

    async def restore_reference(self, push_id: str, reference: str | None) -> None:
        """Let the reference's bitmap go on as if the push's snapshot had never been, then drop the
        push's.

        One transaction for all disks. A reference's bitmap that has missed changes is removed:
        nothing is better than a bitmap that tells less than the truth.
        """
        inventory = await take_inventory(self.qmp)
        actions: list[dict[str, Any]] = []
        for node in inventory.nodes.values():
            actions += restore_actions(node, push_id, reference)
        if actions:
            await self.qmp.execute("transaction", actions=actions)
            self.removed.append(names.bitmap_name(push_id))

    async def drop_bitmaps(self, push_id: str) -> None:
        """Remove the push's bitmap from every disk."""
        bitmap = names.bitmap_name(push_id)
        inventory = await take_inventory(self.qmp)
        actions = [
            _action("remove", node, bitmap)
            for node in inventory.nodes.values()
            if bitmap in node.bitmaps
        ]
        if actions:
            await self.qmp.execute("transaction", actions=actions)
            self.removed.append(bitmap)

    async def remove_files(self, push_id: str, *, record: bool) -> None:
        """Remove a push's scratch images, and its record too if ``record``."""
        for name in await trio.to_thread.run_sync(names.our_files, self._dir):
            if names.push_of_file(name) == push_id and (record or not names.is_record(name)):
                await trio.to_thread.run_sync(durable.unlink, self._dir / name)
                self.removed.append(name)


def _of(objects: Mapping[str, str], wanted: Callable[[str], bool]) -> list[str]:
    found = []
    for name in objects:
        push_id = names.push_of_object(name)
        if push_id is not None and wanted(push_id):
            found.append(name)
    return found


def _action(what: str, node: Node, bitmap: str) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": node.name, "name": bitmap}}


def restore_actions(node: Node, push_id: str, reference: str | None) -> list[dict[str, Any]]:
    """What puts one disk's bitmaps back to before the push."""
    new = node.bitmaps.get(names.bitmap_name(push_id))
    old = node.bitmaps.get(names.bitmap_name(reference)) if reference is not None else None
    remove_new = [_action("remove", node, new.name)] if new is not None else []
    if old is None:
        return remove_new
    if old.inconsistent:
        return [_action("remove", node, old.name), *remove_new]
    if new is not None and new.recording and not new.inconsistent:
        merge = {"node": node.name, "target": old.name, "bitmaps": [new.name]}
        enable = [] if old.recording else [_action("enable", node, old.name)]
        return [*enable, {"type": "block-dirty-bitmap-merge", "data": merge}, *remove_new]
    # While the reference's bitmap stood still, another of ours may record for it: then it is not
    # for us to judge.
    family = names.family_of(push_id)
    others = (b for b in node.bitmaps.values() if _is_of_family(b.name, family))
    if old.recording or any(b.recording for b in others if b is not new):
        return remove_new
    return [_action("remove", node, old.name), *remove_new]


def _is_of_family(bitmap: str, family: str) -> bool:
    push_id = names.push_of_bitmap(bitmap)
    return push_id is not None and names.family_of(push_id) == family


async def answers(path: Path) -> bool:
    """Whether somebody serves the Unix socket at ``path``."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError:
        return False
    await stream.aclose()
    return True
