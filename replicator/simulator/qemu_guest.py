# SPDX-License-Identifier: AGPL-3.0-or-later
"""A real guest on simulated disks: a QEMU that runs from their files is stopped for the moment that a snapshot takes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRWPair
from typing import Any

from replicator.simulator.engine import FailedTask

_TIMEOUT_S = 30
_LINE_MAX = 1 << 20
_LINES_MAX = 1000


@contextmanager
def stopped(qmp_socket: str) -> Iterator[None]:
    """The guest behind a QMP socket stands still meanwhile, its writes are in the files. Nothing to do where no QEMU listens.

    Blocks. Raises FailedTask where QEMU listens and does not do as it is told: a snapshot would not be one instant.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(qmp_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            yield
            return
        with connection.makefile("rwb") as stream:
            try:
                _line(stream)
                _execute(stream, "qmp_capabilities")
                running = _execute(stream, "query-status")["running"]
                if running:
                    _execute(stream, "stop")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FailedTask(
                    "VMM-10000", "INTERNAL_ERROR", f"QEMU does not stop: {error}"
                ) from error
            try:
                yield
            finally:
                # That it goes on cannot be waited for: the guest is the demonstration's, and it will show.
                with suppress(OSError, ValueError):
                    if running:
                        _execute(stream, "cont")


def _execute(stream: BufferedRWPair, command: str) -> Any:
    stream.write(json.dumps({"execute": command}).encode() + b"\n")
    stream.flush()
    for _ in range(_LINES_MAX):
        answer = _line(stream)
        if "error" in answer:
            raise ValueError(str(answer["error"].get("desc", "refused")))
        if "return" in answer:
            return answer["return"]
    raise ValueError(f"no answer to {command}")


def _line(stream: BufferedRWPair) -> dict[str, Any]:
    raw = stream.readline(_LINE_MAX)
    if not raw:
        raise ValueError("QEMU has closed the connection")
    answer = json.loads(raw)
    if not isinstance(answer, dict):
        raise ValueError("no object")  # noqa: TRY004 - what QEMU sends, not what was passed
    return answer
