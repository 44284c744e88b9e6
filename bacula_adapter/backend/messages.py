# SPDX-License-Identifier: AGPL-3.0-or-later
"""Log records to messages of a Bacula job, and to the log file of the backend. Secrets stay behind.

INFO becomes I, WARNING W, ERROR Q: an error that fails the job is an exception, and said by the dialogue.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Self

from replicator.cli.text import one_line
from replicator.config import Config, is_key_text

_logger = logging.getLogger(__name__)

#: Bytes of a message: Bacula cuts what is longer than 2000 with what it puts before it.
MESSAGE_MAX: Final = 1900
#: Messages that wait to be said. What comes then is counted.
_QUEUE_MAX: Final = 500
_OURS: Final = ("eventstore", "replicator", "receiver", "bacula_adapter")
_LEVELS: Final = (logging.ERROR, logging.INFO, logging.DEBUG, logging.DEBUG)
_SHOWN: Final = "***"
#: Shorter ones would take words out of every sentence.
_SECRET_MIN: Final = 4
_NAMED: Final = re.compile(
    r"(?i)\b(password|passwd|secret|dr_auth_token|token|api[-_]?key|authorization)(\s*[=:]\s*)(?!\s)"
    r"(\"[^\"]*\"|(?:basic |bearer )?\S+)"
)


def clip(text: str) -> str:
    """The text in one line of at most ``MESSAGE_MAX`` bytes."""
    raw = one_line(text).encode("utf-8", "replace")
    if len(raw) <= MESSAGE_MAX:
        return raw.decode()
    return raw[: MESSAGE_MAX - 3].decode("utf-8", "ignore") + "…"


class Redactor:
    """Takes secrets out of text: those that it was told, and whatever is said to be one."""

    def __init__(self) -> None:
        self._secrets: list[str] = []

    def add(self, secrets: Iterable[str]) -> None:
        """Learn secrets."""
        known = {*self._secrets, *(each for each in secrets if len(each) >= _SECRET_MIN)}
        self._secrets = sorted(known, key=len, reverse=True)  # one may hold another

    def add_from(self, config: Config) -> None:
        """Learn the secrets that stand in a configuration."""
        keys = config.dr_auth_token
        self.add([config.password, *(re.split(r"[,\s]+", keys) if is_key_text(keys) else ())])

    def clean(self, text: str) -> str:
        """The text without them."""
        for secret in self._secrets:
            text = text.replace(secret, _SHOWN)
        return _NAMED.sub(rf"\1\2{_SHOWN}", text)


class MessageQueue(logging.Handler):
    """Keeps log records until they can be said. ``wake`` is called after each, on whatever thread logs."""

    def __init__(self, redactor: Redactor, wake: Callable[[], None]) -> None:
        super().__init__(logging.INFO)
        self._redactor = redactor
        self._wake = wake
        self._waiting: deque[tuple[str, str]] = deque()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        status = "Q" if record.levelno >= logging.ERROR else "W"
        self.put("I" if record.levelno < logging.WARNING else status, _sentence(record))

    def put(self, status: str, text: str) -> None:
        """Keep a message; where too many wait, it is only counted."""
        if len(self._waiting) >= _QUEUE_MAX:
            self._dropped += 1
            return
        self._waiting.append((status, clip(self._redactor.clean(text))))
        self._wake()

    def take(self) -> list[tuple[str, str]]:
        """What waits, as status and text, in order; it does not wait any longer."""
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        if self._dropped:
            taken.append(("W", f"{self._dropped} messages more: see the backend's log (debug_log)"))
            self._dropped = 0
        return taken

    def __bool__(self) -> bool:
        return bool(self._waiting)


def _sentence(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and (error := record.exc_info[1]) is not None:
        text = f"{text}: {type(error).__name__}: {error}"
    return text


class _FileHandler(logging.Handler):
    """Lines to the backend's log file, which other backends write to as well: each line is one write."""

    def __init__(self, fd: int, redactor: Redactor, *, tracebacks: bool) -> None:
        super().__init__(logging.DEBUG)
        self._fd = fd
        self._redactor = redactor
        self._tracebacks = tracebacks

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a full disk is nobody's error here."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = one_line(_sentence(record))
        if self._tracebacks and record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        line = (
            f"{stamp}.{int(record.msecs):03}Z {os.getpid()} {record.levelname:7} "
            f"{self._redactor.clean(text)}\n"
        )
        try:
            os.write(self._fd, line.encode("utf-8", "replace"))
        except OSError:
            return

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


class Logging:
    """Where this process's log records go, as long as it is open: messages of the job, and the log file."""

    def __init__(self, queue: MessageQueue, redactor: Redactor) -> None:
        self._queue = queue
        self._redactor = redactor
        self._file: _FileHandler | None = None
        self._before: dict[str | None, int] = {}

    def __enter__(self) -> Self:
        self._before = {name: logging.getLogger(name).level for name in (None, *_OURS)}
        logging.getLogger().addHandler(self._queue)
        self._set_levels(1)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._queue)
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()
        for name, level in self._before.items():
            logging.getLogger(name).setLevel(level)

    def follow(self, config: Config) -> None:
        """Log as the configuration says. A log file that cannot be written to is warned of, once."""
        self._set_levels(config.verbose)
        self._queue.setLevel(logging.ERROR if config.verbose == 0 else logging.INFO)
        try:
            fd = _open_log(config.debug_log)
        except OSError as error:
            _logger.warning(
                "debug_log: %s: %s; nothing is logged there", config.debug_log, error.strerror
            )
            return
        self._file = _FileHandler(fd, self._redactor, tracebacks=config.verbose >= 3)
        logging.getLogger().addHandler(self._file)

    @staticmethod
    def _set_levels(verbose: int) -> None:
        # A library's own news are not an operator's, but its warnings are.
        everything = verbose >= 3
        logging.getLogger().setLevel(
            logging.DEBUG if everything else max(_LEVELS[verbose], logging.WARNING)
        )
        for name in _OURS:
            logging.getLogger(name).setLevel(_LEVELS[verbose])


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


def told(error: BaseException) -> str:
    """An error in one line, as `replctl` says it."""
    from replicator.cli.failures import explain  # noqa: PLC0415 - loads the command line, which few jobs need

    return explain(error).text or "interrupted"


__all__ = ["MESSAGE_MAX", "Logging", "MessageQueue", "Redactor", "clip", "told"]
