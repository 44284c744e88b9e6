# SPDX-License-Identifier: AGPL-3.0-or-later
"""Volume groups of one disk by v4: cloned from a recovery point, attached, detached, deleted (nutanix-v4.md, section 7)."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid5

from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismNotFoundError,
    PrismRefusedError,
    PrismTaskError,
)
from replicator.prism.types import Attachment, DiskSnapshot, Secrets, VmSnapshot, VolumeGroup
from replicator.prism.v4_calls import V4Calls, quoted
from replicator.prism.v4_read import typed

_logger = logging.getLogger(__name__)

_GROUPS = "config/volume-groups"
_GROUP_REL = "volumes:config:volume-group"
_CLIENT_REL = "volumes:config:iscsi-client"


class Groups:
    """The part of PrismV4 for volume groups."""

    def __init__(self, calls: V4Calls) -> None:
        self._calls = calls
        self._with_disk = True  # whether a group and its disk are made by one call

    async def create(
        self,
        snapshot: VmSnapshot,
        disk: DiskSnapshot,
        name: str,
        secrets: Secrets | None,
        request_id: UUID,
    ) -> VolumeGroup:
        """As ``Prism.create_volume_group``."""
        body = _group_body(snapshot, name, secrets)
        uuid: str | None = None
        if self._with_disk:
            try:
                uuid = await self._make({**body, "disks": [_disk_body(disk)]}, request_id)
            except (PrismRefusedError, PrismTaskError) as error:
                if isinstance(error, PrismTaskError) and error.timed_out:
                    raise
                await self._clear(name)  # what failed may have been made in part
                _logger.info("%s; making the volume group without its disk first", error)
        if uuid is None:
            uuid = await self._make(body, uuid5(request_id, "bare"))
            await self._add_disk(uuid, disk, request_id)
            self._with_disk = False
        group = await self._read(uuid)
        if not group.disk_sizes:
            # The group was made, and what it should hold was passed over.
            await self._add_disk(uuid, disk, request_id)
            self._with_disk = False
            group = await self._read(uuid)
        if list(group.disk_sizes) != [0]:
            raise PrismAnswerError(
                f"{self._calls.central.where}: volume group {name} should hold one disk, number 0, and holds"
                f" {sorted(group.disk_sizes) or 'none'}"
            )
        return group

    async def _make(self, body: dict[str, Any], request_id: UUID) -> str:
        state = await self._calls.submit(
            "volumes",
            "POST",
            _GROUPS,
            body,
            what="create a volume group",
            timeout_s=self._calls.waits.group_s,
            request_id=request_id,
        )
        uuid = state.entity(_GROUP_REL)
        if uuid is None:
            raise PrismAnswerError(
                f"{self._calls.central.where}: task {state.uuid} made a volume group, but does not say which"
            )
        return uuid

    async def _add_disk(self, uuid: str, disk: DiskSnapshot, request_id: UUID) -> None:
        await self._calls.submit(
            "volumes",
            "POST",
            f"{_GROUPS}/{segment(uuid)}/disks",
            _disk_body(disk),
            what="add a disk to a volume group",
            timeout_s=self._calls.waits.group_s,
            request_id=uuid5(request_id, "disk"),
        )

    async def _clear(self, name: str) -> None:
        wanted = f"name eq {quoted(name)}"
        for node in await self._calls.listed(
            "volumes", _GROUPS, wanted, lambda node: node.text("name", "") == name
        ):
            await self.delete(node.uuid("extId"))

    async def _read(self, uuid: str) -> VolumeGroup:
        node = await self._calls.get("volumes", f"{_GROUPS}/{segment(uuid)}")
        disks = node.nodes("disks")
        if not disks:
            disks = await self._calls.listed("volumes", f"{_GROUPS}/{segment(uuid)}/disks")
        return VolumeGroup(
            uuid=node.uuid("extId"),
            name=node.text("name"),
            target=node.text("targetName"),
            disk_sizes={
                item.number("index", high=16383): item.number("diskSizeBytes", low=1)
                for item in disks
            },
        )

    async def attach(
        self, group: VolumeGroup, initiator: str, secrets: Secrets | None, request_id: UUID
    ) -> Attachment:
        """As ``Prism.attach``."""
        path = f"{_GROUPS}/{segment(group.uuid)}"
        body = typed("volumes.v4.config.IscsiClient", iscsiInitiatorName=initiator)
        if secrets is not None:
            body["enabledAuthentications"] = "CHAP"
            if secrets.client is not None:
                body["clientSecret"] = secrets.client
        state = await self._calls.change(
            "volumes",
            "POST",
            f"{path}/$actions/attach-iscsi-client",
            body,
            of=path,
            what="attach an initiator",
            timeout_s=self._calls.waits.group_s,
            request_id=request_id,
        )
        client = state.entity(_CLIENT_REL) or await self._client(group.uuid, initiator)
        return Attachment(client, initiator)

    async def _client(self, group: str, initiator: str) -> str:
        for uuid in await self._clients(group):
            node = await self._calls.get("volumes", f"config/iscsi-clients/{segment(uuid)}")
            if node.text("iscsiInitiatorName", "") == initiator:
                return uuid
        raise PrismAnswerError(
            f"{self._calls.central.where}: {initiator} was attached to volume group {group}, but is not there"
        )

    async def detach(self, group: str, attachment: Attachment | None) -> None:
        """As ``Prism.detach``."""
        with suppress(PrismNotFoundError):
            clients = await self._clients(group) if attachment is None else [attachment.uuid]
            for client in clients:
                await self._detach(group, client)

    async def _detach(self, group: str, client: str) -> None:
        path = f"{_GROUPS}/{segment(group)}"
        try:
            await self._calls.change(
                "volumes",
                "POST",
                f"{path}/$actions/detach-iscsi-client",
                typed("volumes.v4.config.IscsiClientAttachment", extId=client),
                of=path,
                what="detach an initiator",
                timeout_s=self._calls.waits.group_s,
            )
        except (PrismRefusedError, PrismTaskError):
            # Some versions refuse to detach what is not attached (any more).
            if client in await self._clients(group):
                raise

    async def _clients(self, group: str) -> list[str]:
        path = f"{_GROUPS}/{segment(group)}/external-iscsi-attachments"
        return [node.uuid("extId") for node in await self._calls.listed("volumes", path)]

    async def delete(self, uuid: str) -> None:
        """As ``Prism.delete_volume_group``."""
        with suppress(PrismNotFoundError):
            try:
                await self._delete(uuid)
            except (PrismRefusedError, PrismTaskError):
                clients = await self._clients(uuid)
                if not clients:
                    raise
                for client in clients:
                    await self._detach(uuid, client)
                await self._delete(uuid)

    async def _delete(self, uuid: str) -> None:
        await self._calls.change(
            "volumes",
            "DELETE",
            f"{_GROUPS}/{segment(uuid)}",
            what="delete a volume group",
            timeout_s=self._calls.waits.delete_s,
        )


def _group_body(snapshot: VmSnapshot, name: str, secrets: Secrets | None) -> dict[str, Any]:
    body = typed(
        "volumes.v4.config.VolumeGroup",
        name=name,
        description=f"a clone of a disk of recovery point {snapshot.uuid}, made by replctl, to be read and deleted",
        createdBy="-".join(name.split("-")[:2]),
        clusterReference=snapshot.cluster,
        sharingStatus="NOT_SHARED",
        usageType="TEMPORARY",
        # A group whose load is balanced between VMs takes no external initiator.
        shouldLoadBalanceVmAttachments=False,
        targetPrefix=name.lower(),
    )
    if secrets is not None:
        body["enabledAuthentications"] = "CHAP"
        body["iscsiFeatures"] = typed(
            "volumes.v4.config.IscsiFeatures",
            targetSecret=secrets.target,
            enabledAuthentications="CHAP",
        )
    return body


def _disk_body(disk: DiskSnapshot) -> dict[str, Any]:
    return typed(
        "volumes.v4.config.VolumeDisk",
        index=0,
        diskDataSourceReference=typed(
            "common.v1.config.EntityReference", extId=disk.handle, entityType="DISK_RECOVERY_POINT"
        ),
    )
