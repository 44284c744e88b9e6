# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups of one disk by v3: attached, detached, deleted; by v2.0 of the Element where v3 does not know them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from replicator.prism.answers import Node
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismConflictError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
)
from replicator.prism.settings import Waits
from replicator.prism.types import Attachment, Secrets, VolumeGroup
from replicator.prism.v3_calls import V3Host
from replicator.prism.v3_read import read_group, read_group_v2

_logger = logging.getLogger(__name__)

GROUPS: Final = "volume_groups"
_ATTACH: Final = "attach an initiator"
_DETACH: Final = "detach an initiator"
_DELETE: Final = "delete a volume group"
#: How long Prism Central may not know what was made on an Element.
_KNOWN_S: Final = 20.0
_HOMES_MAX: Final = 10_000
_IN_USE: Final = (PrismRefusedError, PrismConflictError, PrismTaskError)

#: The Elements to look at for an object: of the cluster with that id, of all if it is empty.
Elements = Callable[[str], Awaitable[Sequence[V3Host]]]


class Groups:
    """The part of PrismV3 for volume groups that exist."""

    def __init__(self, central: V3Host, elements: Elements, waits: Waits) -> None:
        self._central = central
        self._elements = elements
        self._waits = waits
        self._homes: dict[str, str] = {}

    def note_home(self, group: str, cluster: str) -> None:
        """Remember where a group is: then not every Element is asked for it."""
        if len(self._homes) < _HOMES_MAX:
            self._homes[group] = cluster

    async def read_made(self, uuid: str, element: V3Host) -> VolumeGroup:
        """A group that ``element`` has just made: as Prism Central knows it, which may take a moment; else as that does."""
        alone = element.endpoint is self._central.endpoint
        patience_s = 0.0 if alone else min(_KNOWN_S, self._waits.settle_s)
        deadline = trio.current_time() + patience_s
        for gap_s in (*self._waits.poll_s, *self._waits.poll_s[-1:] * 50):
            try:
                return read_group(await self._central.get(f"{GROUPS}/{segment(uuid)}"))
            except PrismNotFoundError:
                if trio.current_time() + gap_s > deadline:
                    break
            await trio.sleep(gap_s)
        return read_group_v2(await element.get_v2(f"{GROUPS}/{segment(uuid)}"))

    async def _at_element(self, uuid: str) -> tuple[V3Host, Node]:
        """The Element that has a group, and what it says of it. Raises PrismNotFoundError."""
        for host in await self._elements(self._homes.get(uuid, "")):
            with suppress(PrismNotFoundError):
                return host, await host.get_v2(f"{GROUPS}/{segment(uuid)}")
        raise PrismNotFoundError(f"{self._central.where}: there is no volume group {uuid}")

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None
    ) -> Attachment:
        """As ``Prism.attach``: done as well where the initiator is attached already."""

        def add(spec: dict[str, Any], node: Node) -> bool:
            resources = _resources(spec)
            entries = _attachments(node)
            mine = [each for each in entries if each.get("iscsi_initiator_name") == initiator]
            if mine and secrets is None:
                return False
            others = [each for each in entries if each not in mine]
            new = {"iscsi_initiator_name": initiator}
            if secrets is not None:
                # A secret is never told: it goes with every change, or it would be taken away.
                resources["target_secret"] = secrets.target
                if secrets.client is not None:
                    new["client_secret"] = secrets.client
            resources["attachment_list"] = [*others, new]
            return True

        try:
            await self._change(group.uuid, add, _ATTACH)
        except PrismNotFoundError:
            host, node = await self._at_element(group.uuid)
            if secrets is not None:
                raise PrismRefusedError(
                    f"{host.where}: volume group {group.name} is not known to v3, and v2.0 sets no CHAP secrets:"
                    " give Prism Central's address, or set iscsi_chap = none"
                ) from None
            if initiator not in _clients_v2(node):
                await self._open(host, group.uuid, initiator)
        return Attachment(initiator, initiator)

    async def _change(
        self, uuid: str, edit: Callable[[dict[str, Any], Node], bool], what: str
    ) -> None:
        await self._central.change(
            f"{GROUPS}/{segment(uuid)}", edit, what=what, timeout_s=self._waits.group_s
        )

    async def _open(self, host: V3Host, uuid: str, initiator: str) -> None:
        await host.submit_v2(
            "POST",
            f"{GROUPS}/{segment(uuid)}/open",
            {"iscsi_client": {"client_address": initiator}, "operation": "ATTACH"},
            what=_ATTACH,
            timeout_s=self._waits.group_s,
        )

    async def detach(self, uuid: str, initiator: str | None) -> None:
        """As ``Prism.detach``."""

        def remove(spec: dict[str, Any], node: Node) -> bool:
            entries = _attachments(node)
            kept = [each for each in entries if not _is_client(each, initiator)]
            _resources(spec)["attachment_list"] = kept
            return len(kept) != len(entries)

        try:
            await self._change(uuid, remove, _DETACH)
        except PrismNotFoundError:
            with suppress(PrismNotFoundError):
                host, node = await self._at_element(uuid)
                await self._close(host, node, initiator)

    async def _close(self, host: V3Host, node: Node, initiator: str | None) -> None:
        for client in _clients_v2(node):
            if initiator in {None, client}:
                await host.submit_v2(
                    "POST",
                    f"{GROUPS}/{segment(node.uuid('uuid'))}/close",
                    {"iscsi_client": {"client_address": client}, "operation": "DETACH"},
                    what=_DETACH,
                    timeout_s=self._waits.group_s,
                )

    async def delete(self, uuid: str) -> None:
        """As ``Prism.delete_volume_group``."""
        path = f"{GROUPS}/{segment(uuid)}"
        try:
            try:
                await self._central.delete(path, _DELETE)
            except _IN_USE as error:
                if isinstance(error, PrismTaskError) and error.timed_out:
                    raise
                _logger.debug("%s; detaching whoever is attached", error)
                await self.detach(uuid, None)
                await self._central.delete(path, _DELETE)
        except PrismNotFoundError:
            with suppress(PrismNotFoundError):
                host, node = await self._at_element(uuid)
                await self._close(host, node, None)
                await host.submit_v2("DELETE", path, what=_DELETE, timeout_s=self._waits.delete_s)
        self._homes.pop(uuid, None)


def _resources(spec: dict[str, Any]) -> dict[str, Any]:
    """The resources of a spec, its own from here on."""
    resources = dict(spec.get("resources") or {})
    spec["resources"] = resources
    return resources


def _attachments(node: Node) -> list[dict[str, Any]]:
    """Who is attached, as a spec says it."""
    resources = node.node("status").maybe("resources")
    entries = resources.nodes("attachment_list") if resources is not None else []
    fields = ("iscsi_initiator_name", "iscsi_initiator_network_id", "vm_reference")
    return [{name: each.raw[name] for name in fields if each.has(name)} for each in entries]


def _is_client(entry: dict[str, Any], initiator: str | None) -> bool:
    name = entry.get("iscsi_initiator_name") or entry.get("iscsi_initiator_network_id")
    return name is not None and initiator in {None, name}


def _clients_v2(node: Node) -> list[str]:
    """The initiators that may log in to a group, as v2.0 tells it: in one list or the other, as texts or as objects."""
    found: list[str] = []
    for field in ("attachment_list", "attached_clients"):
        held = node.raw.get(field)
        for item in held if isinstance(held, list) else []:
            if isinstance(item, str):
                found.append(item)
                continue
            entry = Node(item, f"{node.where}.{field}")
            names = ("iscsi_initiator_name", "client_address", "client_uuid")
            found.extend([entry.text(name) for name in names if entry.has(name)][:1])
    return list(dict.fromkeys(found))
