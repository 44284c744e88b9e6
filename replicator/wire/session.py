# SPDX-License-Identifier: AGPL-3.0-or-later
"""The order of messages in a push session, as one table for both sides; a pair that is not listed is a protocol error."""

from __future__ import annotations

import sys
from enum import StrEnum

from replicator.errors import WireError
from replicator.wire.messages import (
    Abandon,
    Ack,
    AskPages,
    Committed,
    Compare,
    Data,
    Describe,
    Described,
    Doubt,
    Finish,
    Landed,
    Open,
    Pages,
    PagesEnd,
    Ping,
    Pong,
    Query,
    Ready,
    ReceiverHead,
    Refused,
    Signed,
    SourceHead,
    VmState,
)


class Phase(StrEnum):
    """Where a session stands, the same on both sides."""

    IDLE = "idle"
    ASKED = "asked"
    OPENING = "opening"
    PUSHING = "pushing"
    FINISHING = "finishing"
    REFUSED = "refused"
    COMPARING = "comparing"
    COMPARED = "compared"
    SIGNING = "signing"
    PAGING = "paging"


#: What only the source sends; the rest comes from the receiver.
FROM_SOURCE = (
    Query, Open, Data, Finish, Abandon, Compare, SourceHead, Describe, AskPages, Doubt,
)  # fmt: skip

#: (phase, message) → next phase. Ping and Pong may come at any time.
TABLE: dict[tuple[Phase, type], Phase] = {
    (Phase.IDLE, Query): Phase.ASKED,
    (Phase.IDLE, Abandon): Phase.ASKED,
    (Phase.ASKED, VmState): Phase.IDLE,
    (Phase.ASKED, Refused): Phase.IDLE,
    (Phase.IDLE, Open): Phase.OPENING,
    (Phase.OPENING, Ready): Phase.PUSHING,
    (Phase.OPENING, Committed): Phase.IDLE,
    (Phase.OPENING, Refused): Phase.IDLE,
    (Phase.PUSHING, Data): Phase.PUSHING,
    (Phase.PUSHING, Ack): Phase.PUSHING,
    (Phase.PUSHING, Landed): Phase.PUSHING,
    (Phase.PUSHING, Open): Phase.OPENING,
    (Phase.PUSHING, Abandon): Phase.ASKED,
    (Phase.PUSHING, Refused): Phase.REFUSED,
    (Phase.PUSHING, Finish): Phase.FINISHING,
    (Phase.FINISHING, Ack): Phase.FINISHING,
    (Phase.FINISHING, Landed): Phase.FINISHING,
    (Phase.FINISHING, Committed): Phase.IDLE,
    (Phase.FINISHING, Refused): Phase.IDLE,
    # After a commit each side shows the other the head of its log.
    (Phase.IDLE, Compare): Phase.COMPARING,
    (Phase.COMPARING, ReceiverHead): Phase.COMPARED,
    (Phase.COMPARING, Refused): Phase.IDLE,
    (Phase.COMPARED, SourceHead): Phase.SIGNING,
    (Phase.SIGNING, Signed): Phase.IDLE,
    (Phase.SIGNING, Refused): Phase.IDLE,
    # A resync compares digests.
    (Phase.IDLE, Describe): Phase.ASKED,
    (Phase.ASKED, Described): Phase.IDLE,
    (Phase.IDLE, AskPages): Phase.PAGING,
    (Phase.PAGING, Pages): Phase.PAGING,
    (Phase.PAGING, PagesEnd): Phase.IDLE,
    (Phase.PAGING, Refused): Phase.IDLE,
    (Phase.IDLE, Doubt): Phase.ASKED,
    # Data and a Finish that were on their way when the push was refused are dropped.
    (Phase.REFUSED, Data): Phase.REFUSED,
    (Phase.REFUSED, Finish): Phase.IDLE,
    (Phase.REFUSED, Query): Phase.ASKED,
    (Phase.REFUSED, Open): Phase.OPENING,
    (Phase.REFUSED, Abandon): Phase.ASKED,
    # These may cross the message that makes them useless.
    (Phase.ASKED, Ack): Phase.ASKED,
    (Phase.ASKED, Landed): Phase.ASKED,
    (Phase.OPENING, Ack): Phase.OPENING,
    (Phase.OPENING, Landed): Phase.OPENING,
}


class Session:
    """The phase of one session; each side tells it every message that it sends and gets."""

    __slots__ = ("phase",)

    def __init__(self) -> None:
        self.phase = Phase.IDLE

    def message(self, message: object) -> None:
        """Move on. Raises WireError if this message may not come now."""
        if isinstance(message, Ping | Pong):
            return
        following = TABLE.get((self.phase, type(message)))
        if following is None:
            raise WireError(f"{type(message).__name__} is not allowed while {self.phase.value}")
        self.phase = following


def as_markdown() -> str:
    """The table as docs/wire.md holds it."""
    rows = ["| phase | message | sent by | next |", "|---|---|---|---|"]
    for (at, kind), to in TABLE.items():
        side = "source" if kind in FROM_SOURCE else "receiver"
        rows.append(f"| {at.value} | {kind.__name__} | {side} | {to.value} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
