# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery points by v4: made, read, kept longer, deleted (nutanix-v4.md, section 6)."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from replicator.prism.answers import Node
from replicator.prism.endpoint import segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
)
from replicator.prism.types import Consistency, Vm, VmSnapshot
from replicator.prism.v4_calls import V4Calls
from replicator.prism.v4_read import part_uuid, read_snapshot, read_vm, rfc3339, typed

_POINTS = "config/recovery-points"
_REL = "dataprotection:config:recovery-point"
#: The first minor of vmm that tells what a VM was at a recovery point.
_TELLS_VM = 1


class Snapshots:
    """The part of PrismV4 for recovery points."""

    def __init__(self, calls: V4Calls) -> None:
        self._calls = calls

    async def create(
        self, vm: Vm, name: str, consistency: Consistency, expires_at_us: int, request_id: UUID
    ) -> VmSnapshot:
        """As ``Prism.create_snapshot``."""
        application = consistency is Consistency.APPLICATION
        part = {"vmExtId": vm.uuid}
        if application:
            # A copy backup leaves the guest's own backup history alone.
            part["applicationConsistentProperties"] = typed(
                "dataprotection.v4.common.VssProperties",
                backupType="COPY_BACKUP",
                shouldIncludeWriters=False,
                writers=[],
                shouldStoreVssMetadata=False,
            )  # type: ignore[assignment]  # an object among texts
        body = {
            "name": name,
            "recoveryPointType": "APPLICATION_CONSISTENT" if application else "CRASH_CONSISTENT",
            "expirationTime": rfc3339(expires_at_us),
            "vmRecoveryPoints": [part],
        }
        waits = self._calls.waits
        state = await self._calls.submit(
            "dataprotection",
            "POST",
            _POINTS,
            body,
            what="create a recovery point",
            timeout_s=waits.snapshot_application_s if application else waits.snapshot_s,
            request_id=request_id,
        )
        told = state.details.get("recoveryPointExtId")
        uuid = told if isinstance(told, str) and told else state.entity(_REL)
        if uuid is None:
            raise PrismAnswerError(
                f"{self._calls.central.where}: task {state.uuid} made a recovery point, but does not say which"
            )
        return read_snapshot(await self._get(uuid), vm, complete=True)

    async def get(self, uuid: str, vm: Vm) -> VmSnapshot:
        """As ``Prism.snapshot``. Where Prism tells what the VM was then (vmm 4.1), disks and sizes are those of then."""
        node = await self._get(uuid)
        part = part_uuid(node, vm)
        if part is None:
            raise PrismNotFoundError(
                f"{self._calls.central.where}: recovery point {uuid} does not hold VM {vm.name}"
            )
        return read_snapshot(node, await self._vm_then(part) or vm, complete=False)

    async def _vm_then(self, part: str) -> Vm | None:
        if (await self._calls.versions.minor("vmm") or 0) < _TELLS_VM:
            return None
        with suppress(PrismNotFoundError, PrismPermissionError, PrismRefusedError):
            node = await self._calls.get("vmm", f"ahv/config/vm-recovery-points/{segment(part)}")
            then = node.maybe("vm")
            if then is not None:
                with suppress(PrismAnswerError):
                    return read_vm(then)
        return None

    async def extend(self, uuid: str, expires_at_us: int) -> None:
        """As ``Prism.extend_snapshot``."""
        path = f"{_POINTS}/{segment(uuid)}"
        await self._calls.change(
            "dataprotection",
            "POST",
            f"{path}/$actions/set-expiration-time",
            {"expirationTime": rfc3339(expires_at_us)},
            of=path,
            what="extend a recovery point",
            timeout_s=self._calls.waits.delete_s,
        )

    async def delete(self, uuid: str) -> None:
        """As ``Prism.delete_snapshot``."""
        with suppress(PrismNotFoundError):
            await self._calls.change(
                "dataprotection",
                "DELETE",
                f"{_POINTS}/{segment(uuid)}",
                what="delete a recovery point",
                timeout_s=self._calls.waits.delete_s,
            )

    async def is_gone(self, uuid: str) -> bool:
        """Whether Prism says that it is not there (any more)."""
        try:
            await self._get(uuid)
        except PrismNotFoundError:
            return True
        except PrismError:
            return False
        return False

    async def _get(self, uuid: str) -> Node:
        return await self._calls.get("dataprotection", f"{_POINTS}/{segment(uuid)}")
