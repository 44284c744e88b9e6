# SPDX-License-Identifier: AGPL-3.0-or-later
"""How v3 makes a snapshot's disk a volume group's: no way is certain, so there are three (nutanix-v3.md, section 10).

``vg-clone``: v2.0 of the Element clones the snapshot's file; no copy. ``vg-url``: v3 takes the file by its URL. ``vg-image``: an
image of the file first, and a volume group of that, in documented forms only; it copies. ``auto`` takes the first that works.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from replicator.prism.answers import Node
from replicator.prism.errors import (
    ImageNeededError,
    PrismAnswerError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismTaskError,
    PrismUnreachableError,
)
from replicator.prism.settings import Expose, Waits
from replicator.prism.types import DiskSnapshot, Secrets, VmSnapshot, VolumeGroup
from replicator.prism.v3_calls import V2, V3Host
from replicator.prism.v3_groups import GROUPS, Groups
from replicator.prism.v3_read import group_of, name_of, read_group

_logger = logging.getLogger(__name__)

_WHAT: Final = "create a volume group"
_IMAGE: Final = "create an image"
_CREATES_MAX: Final = 3
#: In this order: what copies nothing first.
_CLONING: Final[tuple[Expose, ...]] = ("vg-clone", "vg-url")
#: What says that a way does not exist here, and not that it did not work this time.
_NOT_HERE: Final = (PrismRefusedError, PrismNotFoundError, PrismTaskError, PrismAnswerError)


class Exposing:
    """The part of PrismV3 that makes volume groups and images. ``strategy`` as configured; ``auto`` settles at the first one."""

    def __init__(self, central: V3Host, groups: Groups, strategy: Expose, waits: Waits) -> None:
        self._central = central
        self._groups = groups
        self._waits = waits
        self._strategy: Expose = strategy
        self._settling = trio.Lock()

    @property
    def by_image(self) -> bool:
        """Whether an image of the disk is needed first."""
        return self._strategy == "vg-image"

    async def create(
        self,
        element: V3Host,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        name: str,
        secrets: Secrets | None,
        *,
        image: str | None,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> VolumeGroup:
        """As ``Prism.create_volume_group``. Raises ImageNeededError as well. ``is_gone``: asked whether the snapshot is."""
        if image is not None:
            reference = {"kind": "image", "uuid": image}
            return await self._by_v3(snapshot, reference, name, secrets)
        ways: dict[Expose, Callable[[], Awaitable[VolumeGroup]]] = {
            "vg-clone": lambda: self._by_v2(element, snapshot, disk, name),
            "vg-url": lambda: self._by_v3(
                snapshot,
                {"kind": "vm_disk", "url": nfs_url(element, disk)},
                name,
                secrets,
            ),
        }
        if not self._is_open():
            return await self._one_way(ways, name)
        async with self._settling:
            if self._is_open():
                return await self._first_way(ways, element, name, is_gone)
        return await self._one_way(ways, name)  # another disk has settled it meanwhile

    def _is_open(self) -> bool:
        return self._strategy == "auto"

    async def _one_way(
        self, ways: dict[Expose, Callable[[], Awaitable[VolumeGroup]]], name: str
    ) -> VolumeGroup:
        way = ways.get(self._strategy)
        if way is None:
            raise ImageNeededError(
                f"{self._central.where}: volume group {name}: prism_v3_expose = {self._strategy} needs an image first"
            )
        return _checked(await way(), self._central)

    async def _first_way(
        self,
        ways: dict[Expose, Callable[[], Awaitable[VolumeGroup]]],
        element: V3Host,
        name: str,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> VolumeGroup:
        for strategy in _CLONING:
            try:
                group = _checked(await ways[strategy](), self._central)
            except _NOT_HERE as error:
                if isinstance(error, PrismTaskError) and error.timed_out:
                    raise
                _logger.info("%s: prism_v3_expose: not %s: %s", element.where, strategy, error)
                await self._clear(element, name)
                if await is_gone():
                    raise  # no way could work: nothing is settled by that
                continue
            _logger.info("%s: prism_v3_expose = auto: %s works", element.where, strategy)
            self._strategy = strategy
            return group
        self._strategy = "vg-image"
        _logger.warning(
            "%s: a snapshot's disk cannot be cloned into a volume group here: an image of it is made first (vg-image), which"
            " copies the disk on the cluster",
            element.where,
        )
        raise ImageNeededError(f"{element.where}: volume group {name} needs an image first")

    async def _by_v3(
        self,
        snapshot: VmSnapshot,
        reference: dict[str, str],
        name: str,
        secrets: Secrets | None,
    ) -> VolumeGroup:
        resources: dict[str, Any] = {
            "sharing_status": "NOT_SHARED",
            "usage_type": "TEMPORARY",
            "created_by": "-".join(name.split("-")[:2]),
            "iscsi_target_prefix": name.lower(),
            # A group whose load is balanced between VMs takes no external initiator.
            "load_balance_vm_attachments": False,
            "disk_list": [{"index": 0, "data_source_reference": reference}],
        }
        if secrets is not None:
            resources["target_secret"] = secrets.target
        spec = {
            "name": name,
            "description": _description(snapshot),
            "cluster_reference": {"kind": "cluster", "uuid": snapshot.cluster},
            "resources": resources,
        }
        node = await self._central.create(
            GROUPS, "volume_group", spec, what=_WHAT, timeout_s=self._waits.group_s
        )
        return _checked(read_group(node), self._central)

    async def _by_v2(
        self, element: V3Host, snapshot: VmSnapshot, disk: DiskSnapshot, name: str
    ) -> VolumeGroup:
        body = {
            "name": name,
            "description": _description(snapshot),
            # Names of iSCSI targets are in lower case (RFC 7143, 4.2.7.2), and the group's name is not.
            "iscsi_target_prefix": name.lower(),
            "disk_list": [{"index": 0, "clone_spec": {"ndfs_filepath": disk.handle}}],
        }
        uuid = await self._make_v2(element, body, name)
        self._groups.note_home(uuid, snapshot.cluster)
        return await self._groups.read_made(uuid, element)

    async def _make_v2(self, element: V3Host, body: dict[str, Any], name: str) -> str:
        """Make it unless one of that name is there: v2.0 knows no request ids. Returns its id."""
        for number in itertools.count(1):
            found = await named_v2(element, name)
            if found:
                return found[0].uuid("uuid")
            try:
                state = await element.submit_v2(
                    "POST",
                    GROUPS,
                    body,
                    what=_WHAT,
                    timeout_s=self._waits.group_s,
                    repeat=False,
                )
            except PrismUnreachableError as error:
                if number >= _CREATES_MAX:
                    raise
                _logger.info("%s; looking whether it was done", error)
                await trio.sleep(self._waits.poll_s[-1])
                continue
            uuid = None if state is None else group_of(state)
            if uuid is not None:
                return uuid
            found = await named_v2(element, name)
            if not found:
                raise PrismAnswerError(
                    f"{element.where}: volume group {name} was made, but is not there"
                )
            return found[0].uuid("uuid")
        raise AssertionError

    async def _clear(self, element: V3Host, name: str) -> None:
        """Remove what a way that failed may have left."""
        uuids = [node.uuid("uuid") for node in await self._left_v2(element, name)]
        uuids += [
            node.node("metadata").uuid("uuid")
            for node in await self._central.listed(
                GROUPS, "volume_group", lambda node: name_of(node) == name, f"name=={name}"
            )
        ]
        for uuid in dict.fromkeys(uuids):
            await self._groups.delete(uuid)

    async def _left_v2(self, element: V3Host, name: str) -> list[Node]:
        try:
            return await named_v2(element, name)
        except (PrismNotFoundError, PrismRefusedError, PrismPermissionError):
            return []  # it does not know volume groups at all

    async def create_image(
        self, element: V3Host, snapshot: VmSnapshot, disk: DiskSnapshot, name: str
    ) -> str:
        """As ``Prism.create_image``."""
        spec = {
            "name": name,
            "description": _description(snapshot),
            "resources": {
                "image_type": "DISK_IMAGE",
                "source_uri": nfs_url(element, disk),
                "initial_placement_ref_list": [{"kind": "cluster", "uuid": snapshot.cluster}],
            },
        }
        node = await self._central.create(
            "images", "image", spec, what=_IMAGE, timeout_s=self._waits.image_s
        )
        return node.node("metadata").uuid("uuid")


async def named_v2(element: V3Host, name: str, *, begins: bool = False) -> list[Node]:
    """The Element's volume groups of that name, or whose names begin so."""
    root = (await element.call("GET", GROUPS, api=V2)).node()
    return [
        node
        for node in root.nodes("entities")
        if node.text("name", "") == name or (begins and node.text("name", "").startswith(name))
    ]


def nfs_url(element: V3Host, disk: DiskSnapshot) -> str:
    """Where the cluster itself finds a snapshot's file."""
    host = element.endpoint.host
    return f"nfs://[{host}]{disk.handle}" if ":" in host else f"nfs://{host}{disk.handle}"


def _description(snapshot: VmSnapshot) -> str:
    return f"a clone of a disk of snapshot {snapshot.uuid}, made by replctl, to be read and deleted"


def _checked(group: VolumeGroup, host: V3Host) -> VolumeGroup:
    """The group, if it holds one disk with number 0. Raises PrismAnswerError."""
    if list(group.disk_sizes) != [0]:
        raise PrismAnswerError(
            f"{host.where}: volume group {group.name} should hold one disk, number 0, and holds"
            f" {sorted(group.disk_sizes) or 'none'}"
        )
    return group
