# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images that get their bytes from here: v3's upload, the only one that Prism has (nutanix-v3.md 11, nutanix-v4.md 5)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from replicator.prism.endpoint import segment
from replicator.prism.errors import PrismAnswerError, PrismNotFoundError, PrismRefusedError
from replicator.prism.upload import open_upload
from replicator.prism.v3_calls import V3, V3Host

_logger = logging.getLogger(__name__)

_WHAT: Final = "create an image"


class Uploads:
    """Of one Prism Central, which may be spoken to by v4 for all else."""

    def __init__(self, central: V3Host) -> None:
        self._central = central

    async def check(self) -> None:
        """As ``RestorePrism.check_upload``."""
        try:
            await self._central.call("POST", "images/list", {"kind": "image", "length": 1})
        except (PrismNotFoundError, PrismRefusedError) as error:
            raise PrismRefusedError(
                f"{self._central.where}: it does not serve v3, and v4 takes no upload of an image: restore to files (where=/path)"
                f" and import them as images, or restore through a Prism Central that serves v3 ({error})"
            ) from None

    async def create(self, name: str, cluster: str, description: str) -> str:
        """As ``RestorePrism.create_empty_image``."""
        spec = {
            "name": name,
            "description": description,
            "resources": {
                "image_type": "DISK_IMAGE",
                "initial_placement_ref_list": [{"kind": "cluster", "uuid": cluster}],
            },
        }
        waits = self._central.waits
        node = await self._central.create(
            "images", "image", spec, what=_WHAT, timeout_s=waits.image_s
        )
        return node.node("metadata").uuid("uuid")

    async def upload(self, uuid: str, path: Path, size: int) -> None:
        """As ``RestorePrism.upload_image``."""
        own = f"images/{segment(uuid)}"
        image_s = self._central.waits.image_s
        async with open_upload(path, size) as file:
            headers = (
                ("X-Nutanix-Checksum-Type", "SHA_256"),
                ("X-Nutanix-Checksum-Bytes", await file.sha256()),
            )
            async with file.pieces() as pieces:
                await self._central.endpoint.upload(
                    f"{V3}/{own}/file", pieces, size, headers, answer_s=image_s
                )
        node = await self._central.settled(own, "upload an image", image_s)
        told = node.node("status").node("resources").number("size_bytes", 0)
        if told != size:
            raise PrismAnswerError(
                f"{node.where}: {size} bytes of an image were uploaded, and Prism says that it holds {told}"
            )


__all__ = ["Uploads"]
