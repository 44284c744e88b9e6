# SPDX-License-Identifier: AGPL-3.0-or-later
"""LMDB persistence for the `eventsourcing` library. Knows nothing of disks.

``PERSISTENCE_MODULE=eventstore`` and ``LMDB_PATH`` make an application use it. What is exported here
blocks. The other parts are imported by their module:

lane, follow, projections   for trio: group commit, following the log, views beside it
types, mapper, projector    events as small arrays of registered types, encrypted if wanted
tree, merkle, checkpoint    the log's Merkle tree, proofs, signed heads
segments                    closed parts of a log in files of their own
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
