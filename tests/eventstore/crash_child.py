# SPDX-License-Identifier: AGPL-3.0-or-later
"""Inserts events until it is killed at the n-th commit step: PATH STEPS. Prints what is durable."""

from __future__ import annotations

import os
import signal
import sys
from uuid import UUID

from eventsourcing.persistence import StoredEvent

from eventstore import Journal, LMDBApplicationRecorder, LMDBEnvironment, environment

AGGREGATE = UUID(int=7)
BATCH = 3


def main(path: str, steps: int) -> None:
    left = steps

    def observe(step: str, where: str) -> None:
        nonlocal left
        del where
        left -= 1
        if left == 0:
            os.write(1, f"killed {step}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    environment.observe_commit = observe
    opened = LMDBEnvironment.open(path)
    recorder = LMDBApplicationRecorder(opened, tree=True)
    journal = Journal(opened, "work")
    version = recorder.max_notification_id() or 0
    while True:
        batch = [
            StoredEvent(AGGREGATE, version + i, f"topic{version % 2}", b"state %d" % (version + i))
            for i in range(1, BATCH + 1)
        ]
        nids = recorder.insert_events(batch)
        assert nids is not None
        os.write(1, f"stored {nids[0]} {nids[-1]}\n".encode())
        version += BATCH
        journal.put(f"entry-{version:04}", b"value")
        os.write(1, f"journal entry-{version:04}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
