# SPDX-License-Identifier: AGPL-3.0-or-later
"""What was asked of Prism, counted: for the metrics page and for the request budget."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_LABELS_MAX = 200
_VERSIONED = re.compile(r"^/api/(?P<part>[a-z]+)/v[0-9][0-9a-z.]*/")
_OLD = re.compile(r"^/(api/nutanix|PrismGateway/services/rest)/(?P<part>v[0-9.]+)/")
_ID = re.compile(r"(?i)(%3A|:|[0-9a-f]{8}-[0-9a-f]{4}-)")


@dataclass(slots=True)
class Meters:
    """Requests that were sent, to all hosts of one Prism, and those of them that went wrong, by endpoint."""

    requests: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    by_host: Counter[str] = field(default_factory=Counter)

    def count_request(self, host: str, endpoint: str) -> None:
        """One more request to ``endpoint`` (see ``endpoint_name``) of ``host``."""
        self.requests += 1
        self.by_host[host] += 1
        self._count(self.sent, endpoint)

    def count_error(self, endpoint: str) -> None:
        """One more answer that is an error, or none at all."""
        self._count(self.errors, endpoint)

    @staticmethod
    def _count(counter: Counter[str], endpoint: str) -> None:
        counter[endpoint if endpoint in counter or len(counter) < _LABELS_MAX else "other"] += 1


def endpoint_name(path: str) -> str:
    """A path without its version and ids: ``vmm/ahv/config/vms/{}``. Few values, for a metric's label."""
    path = path.partition("?")[0]
    match = _OLD.match(path) or _VERSIONED.match(path)
    path = path[1:] if match is None else f"{match['part']}/{path[match.end() :]}"
    return "/".join("{}" if _ID.search(part) else part for part in path.split("/"))
