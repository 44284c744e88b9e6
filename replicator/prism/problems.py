# SPDX-License-Identifier: AGPL-3.0-or-later
"""Answers that are errors, turned into the class that says what can be done. No I/O.

Reads the three forms that Prism has (v4, v3, v2.0) and whatever else stands in their place, HTML for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from replicator.prism.errors import (
    PrismAuthError,
    PrismConflictError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRateLimitedError,
    PrismRefusedError,
    PrismUnreachableError,
)
from replicator.prism.retry import Passing, passing

_SAID_MAX = 300
_NO_JSON: Final = "the answer is no JSON"
_SECRET_KEY = re.compile(r"(?i)secret|password|jwt|token")
_PERMISSION = re.compile(
    r"\b(?:View|Create|Update|Delete|Attach|Detach|Restore|Set|Access)(?:_[A-Za-z]+)+\b"
)
_STALE = re.compile(r"(?i)CONCURRENT|ETAG|PLAT-1000[45]|spec.?version|edit conflict")

#: What a call needs, by method and what its path looks like: Prism does not always say it (nutanix-v4.md, section 9).
_PERMISSIONS = tuple(
    (method, re.compile(pattern), permission)
    for method, pattern, permission in (
        ("POST", r"/recovery-points$", "Create_Recovery_Point"),
        ("DELETE", r"/recovery-points/[^/]+$", "Delete_Recovery_Point"),
        ("POST", r"/set-expiration-time$", "Set_Expiration_Time_Recovery_Point"),
        ("POST", r"/recovery-points/[^/]+/\$actions/restore$", "Restore_VM_Recovery_Point"),
        ("GET", r"/vm-recovery-points", "View_VM_Recovery_Point"),
        ("", r"/recovery-points", "View_Recovery_Point"),
        ("POST", r"/attach-iscsi-client$", "Attach_Volume_Group_To_External_iSCSI_Client"),
        ("POST", r"/detach-iscsi-client$", "Detach_Volume_Group_From_External_iSCSI_Client"),
        ("POST", r"/volume-groups/[^/]+/disks$", "Create_Volume_Group_Disk"),
        ("GET", r"/volume-groups/[^/]+/disks", "View_Volume_Group_Disks"),
        ("GET", r"/external-iscsi-attachments", "View_Volume_Group_iSCSI_Attachments"),
        ("GET", r"/vm-attachments", "View_Volume_Group_VM_Attachments"),
        ("", r"/iscsi-clients", "View_External_iSCSI_Client"),
        ("POST", r"/volume[-_]groups$", "Create_Volume_Group"),
        ("DELETE", r"/volume[-_]groups/[^/]+$", "Delete_Volume_Group"),
        ("PUT", r"/volume[-_]groups/[^/]+$", "Update_Volume_Group_Details_Internal"),
        ("", r"/volume[-_]groups", "View_Volume_Group_Details"),
        ("POST", r"/vm_snapshots$|/vms/[^/]+/snapshot$", "Create_Vm_Snapshot"),
        ("", r"/vm_snapshots|/data/changed_regions", "View_Recovery_Point"),
        ("POST", r"/(content/)?images$", "Create_Image"),
        ("DELETE", r"/images/[^/]+$", "Delete_Image"),
        ("", r"/images", "View_Image"),
        ("POST", r"/vms$|/clone$", "Create_Virtual_Machine"),
        ("DELETE", r"/vms/[^/]+$", "Delete_Virtual_Machine"),
        ("PUT", r"/vms/", "Update_Virtual_Machine"),
        ("POST", r"/vms/[^/]+/", "Update_Virtual_Machine"),
        ("", r"/vms", "View_Virtual_Machine"),
        ("", r"/clusters?\b", "View_Cluster"),
        ("", r"/storage[-_]containers", "View_Storage_Container"),
        ("", r"/subnets", "View_Subnet"),
        ("", r"/tasks", "View_Task"),
    )
)

#: The role that a permission is part of, as product and health check call the three duties.
_ROLES = (
    (re.compile(r"_(?:Virtual_Machine|Image|Subnet|Storage_Container)$"), "VM Admin"),
    (
        re.compile(r"_(?:VM_)?Recovery_Point|_Volume_Group|_iSCSI_Client|_Vm_Snapshot"),
        "Backup Admin",
    ),
    (re.compile(r"View_(?:Cluster|Task)$"), "Cluster Admin, read-only"),
)


@dataclass(frozen=True, slots=True)
class Said:
    """What an answer says of the error: texts for people, and the words (codes, groups, reasons) for programs."""

    texts: tuple[str, ...]
    words: frozenset[str]

    @property
    def v4(self) -> bool:
        """Whether anything that speaks Prism's own language answered."""
        return bool(self.words)


def read_error(body: bytes, content_type: str) -> Said:
    """What is in the body of an error. Never fails: it may be anything."""
    if not body:
        return Said((), frozenset())
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        kind = content_type.partition(";")[0].strip()[:40] or "no content type"
        return Said((f"{_NO_JSON} ({kind})",), frozenset())
    texts: list[str] = []
    words: set[str] = set()
    for message in _messages(decoded):
        for key in ("message", "detailed_message"):
            if isinstance(message.get(key), str):
                texts.append(message[key])
                break
        words.update(
            message[key]
            for key in ("code", "errorGroup", "reason", "error_code")
            if isinstance(message.get(key), str)
        )
    return Said(tuple(texts[:5]), frozenset(sorted(words)[:20]))


def _messages(decoded: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(decoded, dict):
        return
    data = decoded.get("data")
    error = data.get("error") if isinstance(data, dict) else None
    found: list[Any] = []
    if isinstance(error, list):
        found = error
    elif isinstance(error, dict):
        listed = error.get("validationErrorMessages")
        found = [{"code": str(error.get("error"))}, *(listed if isinstance(listed, list) else [])]
    elif isinstance(decoded.get("message_list"), list):
        found = decoded["message_list"]
    elif isinstance(decoded.get("message"), (str, dict)):
        message = decoded["message"]
        found = [message if isinstance(message, dict) else decoded]
        found.append(decoded.get("error_code"))
    yield from (item for item in found[:50] if isinstance(item, dict))


def secrets_in(body: Any) -> set[str]:
    """Values in a request that no message may repeat: what stands under keys that speak of secrets."""
    found: set[str] = set()
    pending = [body]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if isinstance(value, str) and _SECRET_KEY.search(key):
                    found.add(value)
                else:
                    pending.append(value)
        elif isinstance(item, list):
            pending.extend(item)
    return {value for value in found if value}


def clean(text: str, secrets: Iterable[str] = ()) -> str:
    """One printable line of bounded length, without the secrets."""
    for secret in secrets:
        text = text.replace(secret, "…")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _SAID_MAX else text[: _SAID_MAX - 1] + "…"


def permission_for(method: str, path: str, said: Said) -> str | None:
    """The permission that a refused call lacked: as told, else as known from the path."""
    for text in said.texts:
        match = _PERMISSION.search(text)
        if match is not None:
            return match[0]
    for wanted, pattern, permission in _PERMISSIONS:
        if wanted in {"", method} and pattern.search(path):
            return permission
    return None


def _role_of(permission: str) -> str:
    roles = [role for pattern, role in _ROLES if pattern.search(permission)]
    return f" (role {roles[0]})" if roles else ""


def problem(
    where: str, method: str, path: str, status: int, said: Said, *, secrets: Iterable[str] = ()
) -> PrismError:
    """The error for an answer with this ``status``, its fields filled in."""
    text = clean("; ".join(said.texts), secrets)
    if said.words and not text:
        text = ", ".join(sorted(said.words))
    detail = f": {text}" if text else ""
    asked = f"{where}: {method} {path}"
    error = _classified(asked, method, path, status, said, detail)
    error.status = status
    error.words = said.words
    return error


def _classified(  # noqa: PLR0917 -- the pieces of one sentence
    asked: str, method: str, path: str, status: int, said: Said, detail: str
) -> PrismError:
    kind = passing(status, said.words)
    if kind is Passing.BUSY:
        return PrismRateLimitedError(
            f"{asked}: too many requests for Prism{detail}; lower prism_rate_rpm"
        )
    if kind is Passing.AWAY:
        return PrismUnreachableError(f"{asked}: Prism is not ready: {status}{detail}")
    if status == 401:
        # What is no JSON is a page to sign in at: it says no more than the status does.
        detail = detail if said.words or not detail.startswith(f": {_NO_JSON}") else ""
        return PrismAuthError(
            f"{asked}: not signed in: 401{detail}: check user and passfile (or prism_api_key; for an Element"
            " prism_element_user and prism_element_passfile)"
        )
    if status == 403:
        permission = permission_for(method, path, said)
        lacks = "lacks a permission"
        if permission:
            lacks = f"lacks the permission {permission}{_role_of(permission)}"
        return PrismPermissionError(f"{asked}: the account {lacks}: 403{detail}", permission)
    if status == 404:
        return PrismNotFoundError(f"{asked}: not there: 404{detail}")
    stale = any(_STALE.search(text) for text in (*said.words, *said.texts))
    if status in {412, 428} or (status in {400, 409} and stale):
        return PrismConflictError(f"{asked}: it was changed meanwhile: {status}{detail}")
    if 400 <= status < 500 or status == 501:
        return PrismRefusedError(f"{asked}: refused: {status}{detail}")
    return PrismError(f"{asked}: failed: {status}{detail}")
