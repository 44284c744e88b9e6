# SPDX-License-Identifier: AGPL-3.0-or-later
"""How the simulated v4 behaves where real ones differ. Kept in ``core.knobs``, read at every request, so that a test can turn
one while the simulator runs.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from replicator.simulator.core import Core

#: Lowest and highest minor that each namespace answers. The newest: what the newest of Nutanix's SDKs speak.
NEWEST: Final = {
    "vmm": (0, 3),
    "volumes": (0, 3),
    "dataprotection": (0, 4),
    "clustermgmt": (0, 3),
    "prism": (0, 4),
    "networking": (0, 4),
    "iam": (0, 0),
}
#: As a Prism Central of the family 7.3 was seen to answer.
PC_7_3: Final = {
    "vmm": (0, 1),
    "volumes": (0, 1),
    "dataprotection": (0, 1),
    "clustermgmt": (0, 1),
    "prism": (0, 1),
    "networking": (0, 1),
    "iam": (0, 0),
}
WINDOWS: Final = {"newest": NEWEST, "pc.7.3": PC_7_3}


class Knobs:
    """The knobs of v4, by name:

    ``v4_window``: "newest", "pc.7.3" or a table of [lowest, highest] minor by namespace (what is not in it: not there at all).
    ``v4_content_minor``: the minor that JWTs for Elements are for. ``v4_jwt_lifetime_s``: how long they are good.
    ``v4_info``: what ``unversioned/info`` answers: "highest" minor of the window, "missing" (404), or a version such as "v4.9".
    ``v4_strict``: unknown fields in bodies are refused. ``v4_etag_missing_status``: 428 or 400.
    ``regions_page``: changed regions in one page (the core's).
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.key = secrets.token_bytes(32)

    def _get(self, name: str, default: Any) -> Any:
        return self._core.knobs.get(name, default)

    @property
    def window(self) -> dict[str, tuple[int, int]]:
        """Minors by namespace."""
        given = self._get("v4_window", "newest")
        if isinstance(given, str):
            return dict(WINDOWS[given])
        return {name: (int(low), int(high)) for name, (low, high) in given.items()}

    @property
    def content_minor(self) -> int:
        """The minor of calls to an Element."""
        return int(self._get("v4_content_minor", 0))

    @property
    def jwt_lifetime_s(self) -> float:
        """Seconds that a token is good for."""
        return float(self._get("v4_jwt_lifetime_s", 900))

    @property
    def info(self) -> str:
        """What negotiation is told."""
        return str(self._get("v4_info", "highest"))

    @property
    def strict(self) -> bool:
        """Unknown fields are refused."""
        return bool(self._get("v4_strict", False))

    @property
    def etag_missing_status(self) -> int:
        """The status of a request that lacks If-Match."""
        return int(self._get("v4_etag_missing_status", 428))
