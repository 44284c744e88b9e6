# SPDX-License-Identifier: AGPL-3.0-or-later
"""The fold of an aggregate's events. Knows nothing of any aggregate or event."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def fold(initial: Any, events: Iterable[Any]) -> Any:
    """The aggregate that ``events`` make of ``initial`` (None before the first one; a snapshot is such a first one).

    To be used as ``projector_func`` and in ``snapshotting_projectors``: the library's default asks of every event
    whether it is an instance of a runtime-checkable protocol, which costs 12 µs on CPython 3.11, five times what
    applying it does. Events from the mapper all have ``mutate``, and what has none fails here just as well. Raises
    what an event's ``mutate`` raises.
    """
    aggregate = initial
    for event in events:
        aggregate = event.mutate(aggregate)
    return aggregate


__all__ = ["fold"]
