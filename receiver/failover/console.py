# SPDX-License-Identifier: AGPL-3.0-or-later
"""The first line that a guest prints, out of the raw bytes of its serial console. No input or output.

The bytes are the guest's: they are bounded, and nothing that a terminal would obey is left in the line.
"""

from __future__ import annotations

import re

#: Longest line shown, characters.
LINE_MAX = 200
#: Bytes without the end of a line after which what there is counts as a line.
_PENDING_MAX = 4096
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clearing
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # OSC and other strings, with their end
    r"|\x1b[ -/]*[0-~]",  # the rest: character sets, reset
    re.DOTALL,
)


def clean_line(raw: bytes) -> str:
    """Printable text of a piece of console output, on one line, at most LINE_MAX characters."""
    text = _CONTROL.sub("", raw.decode(errors="replace"))
    shown = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in text)
    return " ".join(shown.split())[:LINE_MAX]


class FirstLine:
    """Finds the first line with something to read in it. Holds at most one piece and ``_PENDING_MAX`` bytes."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self.line: str | None = None

    def feed(self, data: bytes) -> bool:
        """Take the next output; True if the line is known now."""
        if self.line is not None:
            return True
        self._pending += data
        while (end := re.search(rb"[\r\n]", self._pending)) is not None:
            if self._take(end.start(), end.end()):
                return True
        if len(self._pending) > _PENDING_MAX:
            return self._take(len(self._pending), len(self._pending))
        return False

    def give_up(self) -> str | None:
        """No more is waited for: a last line without an end (a prompt) counts too."""
        if self.line is None:
            self._take(len(self._pending), len(self._pending))
        return self.line

    def _take(self, length: int, consumed: int) -> bool:
        self.line = clean_line(bytes(self._pending[:length])) or None
        del self._pending[:consumed]
        return self.line is not None
