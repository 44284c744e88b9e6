# SPDX-License-Identifier: AGPL-3.0-or-later
"""Logging of every command: one line each on stderr, as much of it as ``verbose`` asks for."""

from __future__ import annotations

import logging
import re
import sys
import time
from contextvars import ContextVar

from replicator.cli.text import one_line

_OURS = ("eventstore", "replicator", "receiver", "bacula_adapter")
#: The VM that a task works for, where a process works for several: what its lines begin with.
WORKING_FOR: ContextVar[str] = ContextVar("working_for", default="")
_LEVELS = (logging.ERROR, logging.INFO, logging.DEBUG, logging.DEBUG)


class _StderrHandler(logging.Handler):
    """Writes to what is stderr at that moment: a progress display puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; stderr that is gone is nobody's error."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except OSError:
            return  # what is being done matters more than telling of it


class _Formatter(logging.Formatter):
    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        self.converter = time.gmtime
        self._tracebacks = tracebacks

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record in one line."""
        record.message = one_line(_with_vm(record.message))
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """One line that names the error; its traceback, if there is one, only at verbose 3."""
        if self._tracebacks:
            return super().format(record)
        fields = {**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None}
        if record.exc_info and (error := record.exc_info[1]) is not None:
            fields |= {"msg": f"{record.getMessage()}: {type(error).__name__}: {error}", "args": ()}
        return super().format(logging.makeLogRecord(fields))


def _with_vm(message: str) -> str:
    """The message, with the VM that it is about before it, unless it names it."""
    vm = WORKING_FOR.get()
    if not vm or re.search(rf"(?<!\w){re.escape(vm)}(?!\w)", message):
        return message
    return f"{vm}: {message}"


def configure(verbose: int) -> None:
    """Send log records to stderr: 0 errors, 1 normal, 2 debug of ours, 3 also of libraries, with tracebacks."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _StderrHandler)]:
        root.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(tracebacks=verbose >= 3))
    root.addHandler(handler)
    # A library's own news are not an operator's, but its warnings are.
    root.setLevel(logging.DEBUG if verbose >= 3 else max(_LEVELS[verbose], logging.WARNING))
    for name in _OURS:
        logging.getLogger(name).setLevel(_LEVELS[verbose])


__all__ = ["WORKING_FOR", "configure"]
