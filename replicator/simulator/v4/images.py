# SPDX-License-Identifier: AGPL-3.0-or-later
"""Namespace vmm: images. They come from a URL or a VM's disk; v4 has no upload."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from replicator.simulator.model import Image
from replicator.simulator.v4.api import LISTED, Api, Call, Namespace
from replicator.simulator.v4.envelope import when
from replicator.simulator.v4.parts import check_cluster
from replicator.simulator.web import HttpError, Reply, Router

_CONTENT = "vmm.v4.content."
_IMAGE = _CONTENT + "Image"
_ALGORITHMS = {"ImageSha1Checksum": "SHA_1", "ImageSha256Checksum": "SHA_256"}
_CHUNK = 1 << 20


def _body(call: Call, image: Image) -> dict[str, Any]:
    return {
        "extId": image.uuid,
        "name": image.name,
        "description": image.description or None,
        "type": image.kind,
        "sizeBytes": image.size,
        "source": image.v4.get("source"),
        "checksum": image.v4.get("checksum"),
        "clusterLocationExtIds": image.clusters,
        "categoryExtIds": image.v4.get("categoryExtIds"),
        "createTime": when(image.created_at),
        "lastUpdateTime": when(image.updated_at),
        "ownerExtId": call.request.user.uuid,
    }


def _find(call: Call, uuid: str) -> Image:
    found: Image = call.core.get("images", uuid)
    return found


async def _list(call: Call) -> Reply:
    return call.many(call.world.images.values(), lambda image: _body(call, image), _IMAGE)


async def _get(call: Call, image: str) -> Reply:
    found = _find(call, image)
    return call.one(_body(call, found), _IMAGE, found)


async def _create(call: Call) -> Reply:
    body = call.body(_IMAGE)
    source = body.get("source")
    if source is None:
        raise HttpError(400, "an image needs a source: v4 has no upload")
    clusters = body.get("clusterLocationExtIds", [])
    for cluster in clusters:
        check_cluster(call.world, cluster)
    image = Image(
        uuid=str(uuid4()),
        name=body["name"],
        description=body.get("description", ""),
        kind=body["type"],
        clusters=clusters or sorted(call.world.clusters),
    )
    image.v4 = {name: body[name] for name in ("checksum", "categoryExtIds") if name in body}
    checksum = body.get("checksum")
    if checksum is not None:
        algorithm = _ALGORITHMS[checksum["$objectType"].removeprefix(_CONTENT)]
        image.checksum = {"algorithm": algorithm, "digest": checksum["hexDigest"]}
    kind = source["$objectType"].removeprefix(_CONTENT)
    if kind == "VmDiskSource":
        image.v4["source"] = source
        found = call.core.sources.vm_disk(source["extId"])
        return call.task(call.core.create_image(image, found, **call.common))
    if kind != "UrlSource":
        raise HttpError(501, "Objects Lite is not simulated", "not_supported")
    account = source.get("basicAuth") or {}
    # What logs in there is not shown to whoever reads the image.
    image.v4["source"] = {name: value for name, value in source.items() if name != "basicAuth"}
    image.source = {
        "insecure": source.get("shouldAllowInsecureUrl", False),
        "user": account.get("username", ""),
        "password": account.get("password", ""),
    }
    return call.task(call.core.create_image(image, source["url"], **call.common))


async def _update(call: Call, image: str) -> Reply:
    found = _find(call, image)
    body = call.body(_IMAGE)
    call.match(found)
    changed = copy.deepcopy(found)
    changed.name = body["name"]
    changed.description = body.get("description", "")
    if "categoryExtIds" in body:
        changed.v4["categoryExtIds"] = body["categoryExtIds"]
    return call.task(call.core.update_image(image, changed, **call.common))


async def _delete(call: Call, image: str) -> Reply:
    call.match(_find(call, image))
    return call.task(call.core.delete_image(image, **call.common))


async def _file(call: Call, image: str) -> Reply:
    """The bytes, whole: a Range header is not looked at."""
    path = call.core.image_file(image)
    size = (await trio.to_thread.run_sync(path.stat)).st_size
    headers = {"Content-Disposition": f'attachment; filename="{image}.img"'}
    return Reply(
        200,
        headers=headers,
        content_type="application/octet-stream",
        stream=_read(path),
        length=size,
    )


async def _read(path: Path) -> AsyncIterator[bytes]:
    async with await trio.open_file(path, "rb") as file:
        while piece := await file.read(_CHUNK):
            yield piece


def add(api: Api, router: Router) -> None:
    """The endpoints."""
    space = Namespace(api, router, "vmm")
    images, one = "/content/images", "/content/images/{image}"
    view = "View_Image"
    space.get(images, _list, _CONTENT + "ListImagesApiResponse", permission=view, query=LISTED)
    space.get(one, _get, _CONTENT + "GetImageApiResponse", permission=view)
    space.post(images, _create, _CONTENT + "CreateImageApiResponse", permission="Create_Image")
    space.put(one, _update, _CONTENT + "UpdateImageApiResponse", permission="Update_Image")
    space.delete(one, _delete, _CONTENT + "DeleteImageApiResponse", permission="Delete_Image")
    space.get(one + "/file", _file, _CONTENT + "GetImageFileApiResponse", permission=view)
