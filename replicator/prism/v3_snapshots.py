# SPDX-License-Identifier: AGPL-3.0-or-later
"""Snapshots of VMs by v3: only a cluster's Element makes and keeps them (nutanix-v3.md, section 7)."""

from __future__ import annotations

import itertools
import logging
from typing import Any, Final
from uuid import UUID

import trio

from replicator.prism.answers import Node
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
    PrismUnreachableError,
)
from replicator.prism.types import Consistency, Vm, VmSnapshot
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_read import (
    is_complete,
    milliseconds,
    name_of,
    read_snapshot,
    snapshot_vm,
)

_logger = logging.getLogger(__name__)

_PATH: Final = "vm_snapshots"
_KIND: Final = "vm_snapshot"
_WHAT: Final = "create a snapshot"
#: How long an id that was handed out stands for one snapshot and no second one. Longer than any try goes on.
_IDS_MINUTES: Final = 1440
_CREATES_MAX: Final = 3


class Snapshots:
    """Snapshots on one cluster. ``central`` hands out ids where the Element does not."""

    def __init__(self, element: V3Host, central: V3Host) -> None:
        self._element = element
        self._waits = element.waits
        self._hands_out = [element] if central.endpoint is element.endpoint else [element, central]

    async def create(
        self, vm: Vm, name: str, consistency: Consistency, expires_at_us: int, request_id: UUID
    ) -> VmSnapshot:
        """As ``Prism.create_snapshot``."""
        application = consistency is Consistency.APPLICATION
        kind = "APPLICATION_CONSISTENT" if application else "CRASH_CONSISTENT"
        spec = {
            "name": name,
            "snapshot_type": kind,
            "expiration_time_msecs": milliseconds(expires_at_us),
            "resources": {"entity_uuid": vm.uuid},
        }
        timeout_s = self._waits.snapshot_application_s if application else self._waits.snapshot_s
        uuid, is_new = await self._id(str(request_id))
        node: Node | None = None
        if uuid is None:
            node = await self._create_by_name(spec, vm, name)
        elif is_new:
            node = await self._post(spec, uuid)
        else:
            node = await self._again(spec, uuid)
        own = uuid or node.node("metadata").uuid("uuid")
        await self._element.finish(node, _WHAT, timeout_s)
        return read_snapshot(await self._complete(own, timeout_s), vm, complete=True)

    async def _id(self, client: str) -> tuple[str | None, bool]:
        """The id that stands for this request, and whether it was never used; None where nobody hands out ids."""
        for host in list(self._hands_out):
            path = "idempotence_identifiers"
            try:
                # Asked for first: it is not told whether a second POST would give the same id.
                told = await host.get(f"{path}/{segment(client)}")
                return _first_id(told), False
            except PrismNotFoundError:
                pass
            except PrismRefusedError as error:
                _logger.debug("%s", error)
            body = {
                "client_identifier": client,
                "count": 1,
                "valid_duration_in_minutes": _IDS_MINUTES,
            }
            try:
                return _first_id((await host.call("POST", path, body)).node()), True
            except (PrismNotFoundError, PrismRefusedError) as error:
                _logger.info("%s; it is not asked for ids of requests again", error)
                if host in self._hands_out:  # another snapshot may have found out as well
                    self._hands_out.remove(host)
        return None, True

    async def _post(self, spec: dict[str, Any], uuid: str | None) -> Node:
        metadata = {"kind": _KIND} if uuid is None else {"kind": _KIND, "uuid": uuid}
        body = {"api_version": "3.1", "metadata": metadata, "spec": spec}
        try:
            return (await self._element.call("POST", _PATH, body, repeat=uuid is not None)).node()
        except PrismRefusedError:
            # A repeated try may find what the first one made.
            if uuid is None:
                raise
            try:
                return await self._element.get(f"{_PATH}/{segment(uuid)}")
            except PrismNotFoundError:
                pass
            raise

    async def _again(self, spec: dict[str, Any], uuid: str) -> Node:
        """What an earlier try with this id has made; made now if there is nothing."""
        try:
            return await self._element.get(f"{_PATH}/{segment(uuid)}")
        except PrismNotFoundError:
            return await self._post(spec, uuid)

    async def _create_by_name(self, spec: dict[str, Any], vm: Vm, name: str) -> Node:
        """Without ids a name stands for a request: it is looked for before each try."""
        for number in itertools.count(1):
            found = await self._element.listed(
                _PATH,
                _KIND,
                lambda node: snapshot_vm(node) == vm.uuid and name_of(node) == name,
                f"entity_uuid=={vm.uuid}",
            )
            if found:
                return found[0]
            try:
                return await self._post(spec, None)
            except PrismUnreachableError as error:
                if number >= _CREATES_MAX:
                    raise
                _logger.info("%s; looking whether it was done", error)
                await trio.sleep(self._waits.poll_s[-1])
        raise AssertionError

    async def _complete(self, uuid: str, timeout_s: float) -> Node:
        """The snapshot once its files are told: they may come later than its task ends."""
        deadline = trio.current_time() + timeout_s
        # One that is not there this long after its task has ended has expired, or was deleted.
        missing_until = trio.current_time() + min(timeout_s, self._waits.settle_s)
        for gap_s in itertools.chain(self._waits.poll_s, itertools.repeat(self._waits.poll_s[-1])):
            try:
                node = await self._element.get(f"{_PATH}/{segment(uuid)}")
                if is_complete(node):
                    return node
            except PrismNotFoundError:
                if trio.current_time() + gap_s > missing_until:
                    raise
            if trio.current_time() + gap_s > deadline:
                raise PrismTaskError(
                    f"{self._element.where}: {_WHAT}: {uuid} is not complete after {timeout_s:g} s",
                    timed_out=True,
                )
            await trio.sleep(gap_s)
        raise AssertionError

    async def get(self, uuid: str, vm: Vm) -> VmSnapshot:
        """As ``Prism.snapshot``."""
        node = await self._element.get(f"{_PATH}/{segment(uuid)}")
        if not is_complete(node):
            raise PrismNotFoundError(f"{node.where}: the snapshot is not complete")
        return read_snapshot(node, vm, complete=False)

    async def extend(self, uuid: str, expires_at_us: int) -> None:
        """As ``Prism.extend_snapshot``."""

        def later(spec: dict[str, Any], _: Node) -> bool:
            until = milliseconds(expires_at_us)
            if spec.get("expiration_time_msecs") == until:
                return False
            spec["expiration_time_msecs"] = until
            return True

        await self._element.change(
            f"{_PATH}/{segment(uuid)}",
            later,
            what="extend a snapshot",
            timeout_s=self._waits.delete_s,
        )

    async def delete(self, uuid: str) -> None:
        """Delete it. Raises PrismNotFoundError where it is gone."""
        await self._element.delete(f"{_PATH}/{segment(uuid)}", "delete a snapshot")

    async def is_gone(self, uuid: str) -> bool:
        """Whether the Element says that it is not there (any more)."""
        try:
            await self._element.get(f"{_PATH}/{segment(uuid)}")
        except PrismNotFoundError:
            return True
        except PrismError:
            return False
        return False


def _first_id(told: Node) -> str:
    held = told.texts("uuid_list")
    if len(held) < 1:
        raise PrismAnswerError(f"{told.where}.uuid_list: a UUID was expected")
    return Node({"uuid": held[0]}, told.where).uuid("uuid")
