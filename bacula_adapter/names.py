# SPDX-License-Identifier: AGPL-3.0-or-later
"""Names of the virtual files in Bacula's catalogue, and back.

``@nutanix/<vm>/disks/disk-<N>.raw`` is a disk's image. A delta and a description bear the part's number and id, so that no
later job's file of the same name takes their place where Bacula puts a chain of jobs together:
``@nutanix/<vm>/disks/disk-<N>.<number>-<id>.phcbt``, ``@nutanix/<vm>/description.<number>-<id>.json``.
Other sources have their own first component: ``@qemu``, ``@image``, and ``@replica`` for a recovery point of this receiver.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

#: First component of names, by where the disks come from.
ROOTS: Final = ("@nutanix", "@qemu", "@image", "@replica")

_PART = r"(?P<number>[0-9]{6,10})-(?P<id>[0-9a-f]{8})"
_NAME = re.compile(
    r"(?P<root>@[a-z]+)/(?P<vm>[^/\0-\x1f]{1,255})/"
    rf"(?:disks/(?P<disk>disk-[0-9]{{1,4}})\.(?:raw|{_PART}\.phcbt)"
    r"|description\.(?P<dnumber>[0-9]{6,10})-(?P<did>[0-9a-f]{8})\.json)"
)


@dataclass(frozen=True, slots=True)
class VirtualName:
    """A name taken apart. ``kind`` raw: an image, without number and id."""

    root: str
    vm: str
    kind: Literal["raw", "delta", "description"]
    disk: str = ""
    number: int = 0
    part_id: str = ""

    def __str__(self) -> str:
        part = f"{self.number:06}-{self.part_id}"
        if self.kind == "raw":
            return f"{self.root}/{self.vm}/disks/{self.disk}.raw"
        if self.kind == "delta":
            return f"{self.root}/{self.vm}/disks/{self.disk}.{part}.phcbt"
        return f"{self.root}/{self.vm}/description.{part}.json"


def parse_name(text: str) -> VirtualName | None:
    """The name, taken apart; None if it is none of ours."""
    match = _NAME.fullmatch(text)
    if match is None or match["root"] not in ROOTS or match["vm"] in (".", ".."):
        return None
    root, vm = match["root"], match["vm"]
    if match["dnumber"]:
        name = VirtualName(root, vm, "description", "", int(match["dnumber"]), match["did"])
    elif match["number"]:
        name = VirtualName(root, vm, "delta", match["disk"], int(match["number"]), match["id"])
    else:
        name = VirtualName(root, vm, "raw", match["disk"])
    return name if str(name) == text else None


def find_name(text: str) -> tuple[str, VirtualName] | None:
    """The name at the end of a path, and what stands before it; None if there is none."""
    parts = text.split("/")
    for count in (4, 3):
        name = parse_name("/".join(parts[-count:]))
        if name is not None:
            return ("/".join(parts[:-count]) or "/" * (len(parts) > count), name)
    return None


__all__ = ["ROOTS", "VirtualName", "find_name", "parse_name"]
