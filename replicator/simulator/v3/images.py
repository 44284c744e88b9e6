# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images of v3: from a file of a container, a VM's disk, a URL, or put by the client in one stream; read back whole."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import msgspec
import trio

from replicator.simulator.core import DiskSource
from replicator.simulator.model import Image
from replicator.simulator.v3.checks import InvalidError, check, check_uuid
from replicator.simulator.v3.envelope import V3, Json, Listing, list_reply
from replicator.simulator.v3.shapes import image, intent
from replicator.simulator.v3.vm_spec import path_of_url, source_of
from replicator.simulator.web import HttpError, Reply, Request

_BODY = intent("image", image)
_ATTRIBUTES = frozenset({"name", "uuid", "image_type"})
_DIGEST = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_CHUNK = 1 << 20
#: How much of an upload that is refused is still read.
_DRAINED_MAX = 256 << 20


class Images:
    """Handlers."""

    def __init__(self, v3: V3) -> None:
        self._v3 = v3

    def _find(self, request: Request, uuid: str) -> Image:
        found = self._v3.world.images.get(check_uuid(uuid))
        if found is None or (
            request.cluster and found.clusters and request.cluster not in found.clusters
        ):
            raise HttpError(404, f"the image {uuid} was not found", "not_found")
        return found

    async def get(self, request: Request, uuid: str) -> Reply:
        """GET /images/{uuid}."""
        if check_uuid(uuid) not in self._v3.world.images:
            return Reply(200, self._v3.unmade("image", uuid))
        return self._v3.entity_reply(self.body(request, self._find(request, uuid)))

    async def list_all(self, request: Request) -> Reply:
        """POST /images/list."""
        here = [
            i
            for i in self._v3.world.images.values()
            if request.cluster is None or not i.clusters or request.cluster in i.clusters
        ]
        listing = Listing("image", _ATTRIBUTES, _describe, lambda found: self.body(request, found))
        return await list_reply(request, here, listing)

    def body(self, request: Request, found: Image) -> Json:
        """An image as v3 writes it down."""
        given = dict(found.v3)
        given.pop("source_options", None)
        resources: Json = {
            **given,
            "image_type": found.kind,
            "architecture": given.get("architecture", "X86_64"),
        }
        status: Json = {
            **resources,
            "current_cluster_reference_list": [
                {"kind": "cluster", "uuid": uuid} for uuid in found.clusters
            ],
        }
        if found.size is not None:
            status["size_bytes"] = found.size
            url = f"{request.base_url.rstrip('/')}/api/nutanix/v3/images/{found.uuid}/file"
            status["retrieval_uri_list"] = [url]
        shared = {"name": found.name, "description": found.description}
        return {
            "status": {
                **shared,
                "state": self._v3.state("image", found.uuid),
                "resources": status,
                **self._v3.execution_context(found.uuid),
            },
            "spec": {**shared, "resources": resources},
            "metadata": self._v3.metadata("image", found),
        }

    async def create(self, request: Request) -> Reply:
        """POST /images: with a source its bytes are copied or pulled; without, they are put later."""
        body = check(request.json(), _BODY)
        spec = body["spec"]
        resources = spec["resources"]
        uuid = body["metadata"].get("uuid") or str(uuid4())
        if uuid in self._v3.world.images:
            raise HttpError(409, f"there is an image {uuid} already", "exists")
        clusters = [each["uuid"] for each in resources.get("initial_placement_ref_list", [])]
        for cluster in clusters:
            if cluster not in self._v3.world.clusters:
                raise HttpError(404, f"the cluster {cluster} was not found", "not_found")
        found = Image(
            uuid=uuid,
            name=spec["name"],
            description=spec.get("description", ""),
            kind=resources.get("image_type", "DISK_IMAGE"),
            clusters=clusters
            or ([request.cluster] if request.cluster else list(self._v3.world.clusters)),
            v3={name: value for name, value in resources.items() if name != "source_options"},
            checksum=_checksum(resources.get("checksum")),
        )
        source = self._source(found, resources)
        task = self._v3.core.create_image(found, source, **self._v3.common(request))
        return self._v3.accepted(self._v3.remember("image", uuid, "create", spec, task))

    def _source(self, found: Image, resources: Json) -> DiskSource | str | None:
        uri, reference = resources.get("source_uri"), resources.get("data_source_reference")
        if uri is not None and reference is not None:
            raise InvalidError("resources: source_uri and data_source_reference exclude each other")
        if reference is not None:
            return source_of(self._v3, reference)
        if uri is None:
            return None
        if uri.startswith("nfs://"):
            if not self._v3.knob("v3_image_from_nfs", default=True):
                raise InvalidError("source_uri: nfs is not supported", "REQUEST_NOT_SUPPORTED")
            return self._v3.core.sources.path(path_of_url(self._v3, uri))
        if not uri.startswith(("http://", "https://")):
            raise InvalidError(f"source_uri: {uri!r} is not http, https or nfs")
        options = resources.get("source_options", {})
        login = options.get("basic_auth", {})
        found.source = {
            "insecure": options.get("allow_insecure_connection", False),
            "user": login.get("username", ""),
            "password": login.get("password", ""),
        }
        return str(uri)

    async def update(self, request: Request, uuid: str) -> Reply:
        """PUT /images/{uuid}: another name or description."""
        found = self._find(request, uuid)
        body = check(request.json(), _BODY)
        self._v3.check_version("image", found, body["metadata"])
        changed: Image = msgspec.structs.replace(found)
        changed.name = body["spec"]["name"]
        changed.description = body["spec"].get("description", found.description)
        task = self._v3.core.update_image(found.uuid, changed, **self._v3.common(request))
        made = self._v3.remember("image", found.uuid, "update", body["spec"], task)
        return self._v3.accepted(made, body["metadata"]["spec_version"])

    async def delete(self, request: Request, uuid: str) -> Reply:
        """DELETE /images/{uuid}."""
        found = self._find(request, uuid)
        task = self._v3.core.delete_image(found.uuid, **self._v3.common(request))
        return self._v3.deleted("image", uuid, task)

    async def put_file(self, request: Request, uuid: str) -> Reply:
        """PUT /images/{uuid}/file: raw bytes, once; checked against X-Nutanix-Checksum-Bytes where it is given."""
        stream = request.stream if request.stream is not None else _once(request.body)
        try:
            found = self._find(request, uuid)
            algorithm, digest = _upload_of(found, request.headers)
            await self._v3.core.put_image(found.uuid, stream, algorithm, digest)
        except HttpError:
            # Who sends without reading would only see the connection cut, and never why.
            await _drain(stream)
            raise
        return Reply(200, {})

    async def get_file(self, request: Request, uuid: str) -> Reply:
        """GET /images/{uuid}/file: all of it, whatever Range asks for."""
        found = self._find(request, uuid)
        path = self._v3.core.image_file(found.uuid)
        return Reply(
            200,
            stream=_read(path),
            length=path.stat().st_size,
            content_type="application/octet-stream",
        )


def _checksum(given: Json | None) -> Json:
    if given is None:
        return {}
    return {"algorithm": given["checksum_algorithm"], "digest": given["checksum_value"]}


def _upload_of(found: Image, headers: dict[str, str]) -> tuple[str | None, str | None]:
    """The checksum's algorithm and hex digest, if they are given. Raises HttpError for an upload that cannot be taken."""
    if found.size is not None:
        raise HttpError(422, f"the image {found.uuid} has data already", "exists")
    if "content-length" not in headers:
        raise HttpError(411, "an image needs Content-Length")
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/octet-stream":
        raise HttpError(
            415, f"an image is application/octet-stream, not {kind or 'nothing'}", "media_type"
        )
    algorithm = headers.get("x-nutanix-checksum-type")
    digest = headers.get("x-nutanix-checksum-bytes")
    if (algorithm is None) != (digest is None) or algorithm not in (None, "SHA_1", "SHA_256"):
        raise InvalidError(
            "X-Nutanix-Checksum-Type is SHA_1 or SHA_256, and X-Nutanix-Checksum-Bytes comes with it"
        )
    if digest is not None and _DIGEST.fullmatch(digest) is None:
        raise InvalidError("X-Nutanix-Checksum-Bytes is no checksum in hex")
    return algorithm, digest


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read what the client still sends, up to a bound."""
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > _DRAINED_MAX:
            return


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await trio.to_thread.run_sync(file.read, _CHUNK):
            yield piece


def _describe(found: Image) -> Json:
    return {"uuid": found.uuid, "name": found.name, "image_type": found.kind}
