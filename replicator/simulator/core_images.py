# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images: from a disk, from a URL that the simulator pulls, or put by the client."""

from __future__ import annotations

import hashlib
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from replicator.simulator.base import CoreBase
from replicator.simulator.engine import FailedTask
from replicator.simulator.model import AffectedEntity, Image, Task
from replicator.simulator.sources import DiskSource
from replicator.simulator.web import HttpError

_PULL_TIMEOUT_S = 60
_CHUNK = 1 << 20
#: What an image may have at the most, in bytes.
SIZE_MAX = 1 << 44


class ImageActions(CoreBase):
    """See ``Core``."""

    def create_image(self, image: Image, source: DiskSource | str | None, **common: Any) -> Task:
        """From a disk, a URL (``image.source`` may hold ``insecure``, ``user``, ``password``), or None: bytes are put later."""
        self.check_name(image.name, 256)

        async def work(task: Task) -> None:
            del task
            path = self.storage.image(image.uuid)
            if isinstance(source, str):
                try:
                    await trio.to_thread.run_sync(_pull, source, image.source, path)
                except (OSError, ValueError) as error:
                    if isinstance(error, urllib.error.HTTPError):
                        error.close()  # it holds the connection
                    path.unlink(missing_ok=True)
                    text = f"cannot download {source}: {error}"
                    raise FailedTask("VMM-50001", "IMAGE_DOWNLOAD_FAILED", text) from error
            elif source is not None:
                await source.write(path, source.size)
            if source is not None:
                await self._finish(image, path)
            self.touch(image)
            self.world.images[image.uuid] = image

        affected = [AffectedEntity(kind="image", uuid=image.uuid, name=image.name)]
        return self.engine.start("CreateImage", affected, work, **common)

    async def _finish(self, image: Image, path: Path) -> None:
        """The bytes are there: check them against the checksum."""
        algorithm, wanted = image.checksum.get("algorithm"), image.checksum.get("digest")
        if algorithm and wanted:
            found = await trio.to_thread.run_sync(_digest, path, str(algorithm))
            if found != str(wanted).lower():
                await self.remove(path)
                raise FailedTask(
                    "VMM-50002",
                    "IMAGE_CHECKSUM_MISMATCH",
                    "the checksum of the image does not match",
                )
        image.size = (await trio.to_thread.run_sync(path.stat)).st_size

    async def put_image(
        self, uuid: str, body: AsyncIterator[bytes], algorithm: str | None, digest: str | None
    ) -> None:
        """The bytes of an image that has none yet, checked against the digest. Raises HttpError; then nothing is kept."""
        image: Image = self.get("images", uuid)
        if image.size is not None:
            raise HttpError(422, "the image has data already", "exists")
        path = self.storage.image(uuid)
        part = path.with_suffix(".part")
        size = 0
        try:
            async with await trio.open_file(part, "wb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > SIZE_MAX:
                        raise HttpError(413, f"an image has at most {SIZE_MAX} bytes")
                    if piece.count(0) == len(piece):  # kept as a hole, as storage would
                        await file.seek(size)
                    else:
                        await file.write(piece)
                await file.truncate(size)
            if algorithm and digest:
                found = await trio.to_thread.run_sync(_digest, part, algorithm)
                if found != digest.lower():
                    raise HttpError(422, "the checksum of the image does not match")
            await trio.to_thread.run_sync(part.rename, path)
        finally:
            with trio.CancelScope(shield=True):
                await self.remove(part)
        image.size = size
        self.touch(image)

    def image_file(self, uuid: str) -> Path:
        """Where the bytes are. Raises HttpError 404 where there are none yet."""
        image: Image = self.get("images", uuid)
        if image.size is None:
            raise HttpError(404, f"image {uuid} has no data", "not_found")
        return self.storage.image(uuid)

    def update_image(self, uuid: str, changed: Image, **common: Any) -> Task:
        """Another name or description."""
        image: Image = self.get("images", uuid)
        self.check_name(changed.name, 256)

        async def work(task: Task) -> None:
            del task
            for name in ("name", "description", "v4", "v3"):
                setattr(image, name, getattr(changed, name))
            self.touch(image)
            await trio.lowlevel.checkpoint()

        affected = [AffectedEntity(kind="image", uuid=uuid, name=image.name)]
        return self.engine.start("UpdateImage", affected, work, **common)

    def delete_image(self, uuid: str, **common: Any) -> Task:
        """Remove an image; disks that were made from it stay."""
        image: Image = self.get("images", uuid)

        async def work(task: Task) -> None:
            del task
            self.world.images.pop(uuid, None)
            await self.remove(self.storage.image(uuid))
            self.save()

        affected = [AffectedEntity(kind="image", uuid=uuid, name=image.name)]
        return self.engine.start("DeleteImage", affected, work, **common)


def _digest(path: Path, algorithm: str) -> str:
    name = algorithm.lower().replace("_", "").replace("-", "")
    if name not in ("sha1", "sha256"):
        raise HttpError(422, f"the checksum {algorithm} is not supported")
    with path.open("rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _pull(url: str, options: dict[str, Any], path: Path) -> None:
    """Blocks."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("only http and https can be pulled")
    request = urllib.request.Request(url)  # noqa: S310 - the scheme was checked
    if options.get("user"):
        pair = f"{options['user']}:{options.get('password', '')}".encode()
        request.add_header("Authorization", "Basic " + b64encode(pair).decode())
    context = ssl.create_default_context()
    if options.get("insecure"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with (
        urllib.request.urlopen(request, timeout=_PULL_TIMEOUT_S, context=context) as answer,  # noqa: S310 - checked
        path.open("wb") as file,
    ):
        size = 0
        while piece := answer.read(_CHUNK):
            size += len(piece)
            if size > SIZE_MAX:
                raise ValueError(f"larger than {SIZE_MAX} bytes")
            file.write(piece)
