# SPDX-License-Identifier: AGPL-3.0-or-later
"""A test's hand between the event log and the commit of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eventstore.environment import LMDBEnvironment
from eventstore.operations import Insert


def intercept(
    patch: pytest.MonkeyPatch, around: Callable[[Callable[[], list[Any]]], list[Any]]
) -> None:
    """Call ``around(commit)`` in the writer's thread instead of each commit that has events in it; others pass."""
    real = LMDBEnvironment.commit

    def commit(self: LMDBEnvironment, operations: Any) -> list[Any]:
        if any(isinstance(operation, Insert) for operation in operations):
            return around(lambda: real(self, operations))
        return real(self, operations)

    patch.setattr(LMDBEnvironment, "commit", commit)
