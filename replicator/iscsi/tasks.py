# SPDX-License-Identifier: AGPL-3.0-or-later
"""The commands in flight of one session, and the checks of what the target says about them. No I/O."""

from __future__ import annotations

import trio

from replicator.iscsi.pdu import NO_TAG, DataIn, PduError, ScsiResponse
from replicator.iscsi.sense import CHECK_CONDITION, GOOD, Sense, parse_sense, sense_of_response


class Task:
    """One command: where its data goes, what has come, and how it ended.

    ``view`` is taken away (None) when whoever waited gave up: what still comes is then thrown away.
    """

    __slots__ = (
        "aborting",
        "cmd_sn",
        "data_sn",
        "deadline",
        "done",
        "error",
        "expected",
        "itt",
        "lun",
        "name",
        "received",
        "sense",
        "status",
        "view",
    )

    def __init__(
        self, name: str, view: memoryview, *, lun: bytes, itt: int, cmd_sn: int, deadline: float
    ) -> None:
        self.name = name
        self.lun = lun
        self.itt = itt
        self.cmd_sn = cmd_sn
        self.view: memoryview | None = view
        self.expected = len(view)
        self.deadline = deadline
        self.received = 0
        self.data_sn = 0
        self.aborting = False
        self.done = trio.Event()
        self.error: Exception | None = None
        self.status = GOOD
        self.sense = Sense()

    def room(self, start: int, length: int) -> memoryview | None:
        """See ``wire.Landing``."""
        return None if self.view is None else self.view[start : start + length]

    def check_data(self, unit: DataIn) -> None:
        """Before any of it is received. Data comes in order, as was agreed on. Raises PduError."""
        if unit.offset != self.received or unit.data_sn != self.data_sn:
            raise PduError("data out of order")
        if self.received + unit.data_length > self.expected:
            raise PduError("more data than was asked for")

    def landed(self, unit: DataIn) -> bool:
        """All of this PDU's data is there. True if the command ended with it."""
        self.received += unit.data_length
        self.data_sn += 1
        if unit.status is None:
            return False
        if unit.status == CHECK_CONDITION:
            raise PduError("a failure without its sense data")
        self._end(unit.status, unit.residual)
        return True

    def responded(self, unit: ScsiResponse, data: bytes) -> None:
        """The command ended. Raises PduError."""
        if unit.response:
            raise PduError(f"a target failure (response 0x{unit.response:02x})")
        if unit.status == CHECK_CONDITION:
            self.sense = parse_sense(sense_of_response(data))
        self._end(unit.status, unit.residual)

    def _end(self, status: int, residual: int) -> None:
        if status == GOOD and residual > 0 and self.received + residual != self.expected:
            raise PduError("a residual count that does not fit the data")
        self.status = status


class Tasks:
    """The tasks of one session by their tags."""

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}
        self._aborts: dict[int, int] = {}
        self._tag = 0

    def __len__(self) -> int:
        """How many are in flight, those that nobody waits for included."""
        return len(self._tasks)

    def new_tag(self) -> int:
        """A tag that nothing in flight has."""
        while True:
            self._tag = (self._tag + 1) & 0xFFFFFFFF
            if (
                self._tag != NO_TAG
                and self._tag not in self._tasks
                and self._tag not in self._aborts
            ):
                return self._tag

    def add(self, task: Task) -> None:
        """It is about to be sent."""
        self._tasks[task.itt] = task

    def get(self, itt: int) -> Task:
        """The task of a tag. Raises PduError."""
        task = self._tasks.get(itt)
        if task is None:
            raise PduError("an answer to a task that does not exist")
        return task

    def find(self, itt: int) -> Task | None:
        """The task of a tag, if it is still in flight."""
        return self._tasks.get(itt)

    def remove(self, task: Task) -> None:
        """It has ended."""
        del self._tasks[task.itt]

    def earliest(self) -> Task | None:
        """The one whose deadline comes first."""
        return min(self._tasks.values(), key=lambda task: task.deadline, default=None)

    def abort_sent(self, itt: int, task: Task) -> None:
        """A request with the tag ``itt`` asks the target to give up ``task``."""
        self._aborts[itt] = task.itt
        task.aborting = True

    def abort_answered(self, itt: int) -> Task | None:
        """The task that it was about, if it has not ended in the meantime. Raises PduError for a tag that is none."""
        if itt not in self._aborts:
            raise PduError("an answer to a task management request that was not made")
        return self._tasks.get(self._aborts.pop(itt))

    def take_all(self) -> list[Task]:
        """All of them; none is left."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        self._aborts.clear()
        return tasks


__all__ = ["Task", "Tasks"]
