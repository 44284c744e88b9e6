# SPDX-License-Identifier: AGPL-3.0-or-later
"""A test's side of the gates of ``gated_backend.py``."""

from __future__ import annotations

import os
import select
from pathlib import Path

from tests.bacula.daemons import CHECKOUT
from tests.bacula.lab import Lab
from tests.limits import HANG_S


def use_gates(lab: Lab) -> Path:
    """Let the lab's backends stop at gates; the folder for these."""
    folder = lab.folder / "gates"
    folder.mkdir(exist_ok=True)
    python, program = CHECKOUT / ".venv/bin/python", CHECKOUT / "tests/bacula/gated_backend.py"
    lab.set_backend(
        f"REPLCTL_GATES={folder} PYTHONPATH={CHECKOUT} exec {python} {program}",
    )
    return folder


class Gate:
    """A gate for the next backend that handles data of this VM."""

    def __init__(self, lab: Lab, vm: str) -> None:
        folder = lab.folder / "gates"
        self._paths = [folder / f"{vm}.reached", folder / f"{vm}.go"]
        for path in self._paths:
            path.unlink(missing_ok=True)
            os.mkfifo(path, 0o600)
        # Open for both ways: neither side waits for the other to open it.
        self._reached, self._go = (os.open(path, os.O_RDWR) for path in self._paths)

    def wait(self) -> int:
        """Wait until a backend stands at it; its pid."""
        ready, _, _ = select.select([self._reached], [], [], HANG_S)
        assert ready, "no backend has come to the gate"
        return int(os.read(self._reached, 100).split()[0])

    def open(self) -> None:
        """Let it go on."""
        os.write(self._go, b"go\n")

    def close(self) -> None:
        """Remove the gate; who stands at it stays there."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        for fd in (self._reached, self._go):
            os.close(fd)


def wait_gone(pid: int) -> None:
    """Wait for the end of a process of somebody else."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], HANG_S)
        assert ready, f"process {pid} does not end"
    finally:
        os.close(fd)


__all__ = ["Gate", "use_gates", "wait_gone"]
