# SPDX-License-Identifier: AGPL-3.0-or-later
"""Entity tags: what ``If-Match`` must carry, another one after every change of the entity."""

from __future__ import annotations

import base64

from replicator.simulator.model import Entity
from replicator.simulator.web import HttpError

MISSING = "etag_missing"
MISMATCH = "etag_mismatch"


def tag(entity: Entity) -> str:
    """The entity's tag as it stands now."""
    text = f"{entity.uuid}:{entity.version}:{entity.updated_at}"
    return base64.b64encode(text.encode()).decode()


def check(entity: Entity, if_match: str | None, missing_status: int) -> None:
    """Raises HttpError: 428 (or as the knob says) without a tag, 412 for one that is not the entity's, ``*`` included."""
    if not if_match:
        raise HttpError(
            missing_status, "the If-Match header with the entity's ETag is missing", MISSING
        )
    if if_match.strip().strip('"') != tag(entity):
        raise HttpError(
            412, "the eTag header is invalid: it is not the entity's current one", MISMATCH
        )
