# SPDX-License-Identifier: AGPL-3.0-or-later
"""LMDB persistence for the `eventsourcing` library. Knows nothing of disks.

``PERSISTENCE_MODULE=eventstore`` and ``LMDB_PATH`` make an application use it. Everything blocks.
"""

from eventstore.environment import LMDBEnvironment, Operation
from eventstore.factory import Factory, LMDBFactory
from eventstore.journal import Journal
from eventstore.recorders import (
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBProcessRecorder,
)
from eventstore.subscription import LMDBSubscription
from eventstore.tracking import LMDBTrackingRecorder

__all__ = [
    "Factory",
    "Journal",
    "LMDBAggregateRecorder",
    "LMDBApplicationRecorder",
    "LMDBEnvironment",
    "LMDBFactory",
    "LMDBProcessRecorder",
    "LMDBSubscription",
    "LMDBTrackingRecorder",
    "Operation",
]
