# SPDX-License-Identifier: AGPL-3.0-or-later
"""A disk behind an iSCSI target: its size, names, allocation map and bytes. It only reads."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from replicator.disk import Extent
from replicator.iscsi import scsi
from replicator.iscsi.connecting import connect
from replicator.iscsi.errors import (
    AmbiguousDiskError,
    BusyError,
    IscsiProtocolError,
    LunGoneError,
    ScsiError,
)
from replicator.iscsi.session import Session, open_session
from replicator.iscsi.settings import IscsiSettings, Portal, check_name
from replicator.iscsi.tasks import Task

#: UNIT ATTENTIONs that may stand before the first answer of a unit, one for each reason.
ATTENTIONS_MAX: Final = 8
#: How often a command that finds the target's queue full is sent again, and the first pause in seconds; it doubles.
BUSY_MAX: Final = 6
BUSY_PAUSE_S: Final = 0.05
_T = TypeVar("_T")


@dataclass(slots=True)
class _Piece:
    """One READ: blocks of the disk, and where the bytes go. ``bounce`` where blocks hold more than was asked for."""

    lba: int
    blocks: int
    view: memoryview
    copy: Callable[[], None] | None = None
    task: Task | None = field(default=None)


class IscsiDisk:
    """One logical unit in one session. Made by ``open_disk``. Any number of tasks may read at once.

    ``portal`` is where the session ended up (a redirect may have moved it). ``serial`` and ``identifiers`` (``naa.…``,
    ``eui.…``, ``t10.…``) are what the target says; both may be empty.
    """

    def __init__(
        self,
        session: Session,
        lun: int,
        *,
        portal: Portal,
        capacity: scsi.Capacity,
        read_size: int,
        serial: str,
        identifiers: tuple[str, ...],
    ) -> None:
        self.lun = lun
        self.portal = portal
        self.serial = serial
        self.identifiers = identifiers
        self._session = session
        self._address = scsi.encode_lun(lun)
        self._capacity = capacity
        self._read_size = read_size
        self._has_status = True

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._capacity.blocks * self._capacity.block_size

    @property
    def block_size(self) -> int:
        """Bytes of a logical block; reads need not keep to it."""
        return self._capacity.block_size

    @property
    def where(self) -> str:
        """Target and portal, for messages."""
        return self._session.where

    @property
    def lost(self) -> bool:
        """Whether the session has ended; every read fails then."""
        return self._session.lost

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. As ``read_into``."""
        buffer = bytearray(length)
        await self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on, with as many READs in flight as the session's depth allows.

        The range must lie inside the disk (ValueError), and need not be aligned. Raises MediumError, LunGoneError,
        ScsiError, TimedOutError, SessionLostError, IscsiProtocolError; what ``view`` then holds is undefined. Cancelled or
        failed, nothing is written into ``view`` afterwards, and the session can be used on.
        """
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"{len(view)} bytes at {offset} of a disk of {self.size} bytes")
        flying: deque[_Piece] = deque()
        try:
            for piece in self._pieces(offset, view.cast("B")):
                await self._send(piece)
                flying.append(piece)
                while flying and flying[0].task is not None and flying[0].task.done.is_set():
                    await self._land(flying[0])
                    flying.popleft()
            while flying:
                await self._land(flying[0])
                flying.popleft()
        finally:
            for piece in flying:
                if piece.task is not None:
                    self._session.abandon(piece.task)

    async def allocated(self, offset: int = 0) -> AsyncGenerator[Extent, None]:
        """What the target says of its blocks from ``offset`` on (GET LBA STATUS): extents without gaps up to the disk's end.

        ``zero`` where blocks are not allocated and such blocks read as zeros. A target that does not know the command,
        or whose blocks hold anything when not allocated: one extent of data. Raises as ``read_into``.
        """
        unit, size = self.block_size, self.size
        at = offset
        while at < size:
            runs = await self._lba_status(at // unit)
            for run in runs:
                start, end = max(run.lba * unit, offset), (run.lba + run.blocks) * unit
                if end > start:
                    yield Extent(start, end - start, zero=not run.mapped and self._capacity.zeroes)
                at = end

    async def aclose(self) -> None:
        """Log out. Leaving ``open_disk`` does the same. Never fails; can be repeated."""
        await self._session.logout()

    def _pieces(self, offset: int, view: memoryview) -> Iterator[_Piece]:
        """The READs of a range: whole blocks straight into ``view``, the ends through a block of their own."""
        unit = self.block_size
        at, end = offset, offset + len(view)
        while at < end:
            start = at // unit * unit
            if at != start or end - at < unit:
                stop = min(end, start + unit)
                part = view[at - offset : stop - offset]
                yield _bounced(start // unit, unit, at - start, part)
            else:
                stop = min(end, start + self._read_size) // unit * unit
                part = view[at - offset : stop - offset]
                yield _Piece(start // unit, (stop - start) // unit, part)
            at = stop

    async def _send(self, piece: _Piece) -> None:
        name = f"READ(16) of {piece.blocks} blocks at {piece.lba}"
        cdb = scsi.read(piece.lba, piece.blocks)
        piece.task = await self._session.submit(name, self._address, cdb, piece.view)

    async def _land(self, piece: _Piece) -> None:
        attempts = _Attempts()
        received = -1
        while received < 0:
            assert piece.task is not None
            try:
                received = await self._session.finish(piece.task, piece.lba)
            except ScsiError as error:
                await attempts.after(error)
                await self._send(piece)
        if received != len(piece.view):
            text = f"{self.where}: a READ of {len(piece.view)} bytes gave {received}"
            raise IscsiProtocolError(text)
        if piece.copy is not None:
            piece.copy()

    async def _lba_status(self, lba: int) -> list[scsi.LbaStatus]:
        rest = [scsi.LbaStatus(lba, self._capacity.blocks - lba, mapped=True)]
        if not self._has_status:
            return rest
        try:
            data = await _execute(
                self._session,
                "GET LBA STATUS",
                self._address,
                scsi.get_lba_status(lba),
                scsi.ANSWER_MAX,
            )
        except ScsiError as error:
            if not error.is_unsupported:
                raise
            self._has_status = False
            return rest
        return _parsed(
            self._session, lambda: scsi.parse_lba_status(data, lba, self._capacity.blocks)
        )


def _bounced(lba: int, unit: int, skip: int, view: memoryview) -> _Piece:
    block = memoryview(bytearray(unit))

    def copy() -> None:
        view[:] = block[skip : skip + len(view)]

    return _Piece(lba, 1, block, copy)


class _Attempts:
    """How often one command has been sent again, and for what."""

    def __init__(self, resets: int = 1) -> None:
        self._resets = resets
        self._busy = 0

    async def after(self, error: ScsiError) -> None:
        """Return when the command may be sent again; else raise the error."""
        if error.is_reset and self._resets:
            self._resets -= 1
        elif isinstance(error, BusyError) and self._busy < BUSY_MAX:
            await trio.sleep(BUSY_PAUSE_S * 2**self._busy)
            self._busy += 1
        else:
            raise error


async def _execute(
    session: Session, name: str, lun: bytes, cdb: bytes, size: int, *, attentions: int = 1
) -> bytes:
    attempts = _Attempts(attentions)
    while True:
        try:
            return await session.execute(name, lun, cdb, size)
        except ScsiError as error:
            await attempts.after(error)


def _parsed(session: Session, parse: Callable[[], _T]) -> _T:
    """The result of ``parse``, whose ValueError is the target's mistake."""
    try:
        return parse()
    except ValueError as error:
        raise IscsiProtocolError(f"{session.where}: {error}") from None


@asynccontextmanager
async def open_disk(
    portal: Portal, target_name: str, lun: int | None, settings: IscsiSettings
) -> AsyncIterator[IscsiDisk]:
    """Log in at a target and open the disk with this LUN; None: the only disk that the target has.

    Raises what ``connect`` does; AmbiguousDiskError if there is no disk or several and no LUN was given; LunGoneError;
    ScsiError. ValueError for a name that is none. At the end it logs out, which takes at most two seconds, when cancelled too.
    A session that is lost fails what reads; it does not cancel the body.
    """
    connected = await connect(portal, check_name(target_name), settings)
    async with open_session(connected.wire, connected.start, settings, connected.where) as session:
        number = await _only_disk(session) if lun is None else lun
        yield await _describe(session, number, connected.portal, settings)


async def _only_disk(session: Session) -> int:
    answer = await _execute(
        session,
        "REPORT LUNS",
        bytes(8),
        scsi.report_luns(),
        8 + 8 * scsi.LUNS_MAX,
        attentions=ATTENTIONS_MAX,
    )
    disks = []
    for number in _parsed(session, lambda: scsi.parse_luns(answer)):
        try:
            data = await _inquire(session, scsi.encode_lun(number), None)
        except LunGoneError:
            continue  # detached since the list was made
        if _parsed(session, lambda data=data: scsi.is_disk(data)):  # type: ignore[misc]
            disks.append(number)
    if len(disks) == 1:
        return disks[0]
    if not disks:
        raise AmbiguousDiskError(f"{session.where} has no disk")
    some = ", ".join(str(number) for number in disks[:8])
    raise AmbiguousDiskError(f"{session.where} has {len(disks)} disks (LUN {some}): say which")


async def _inquire(session: Session, lun: bytes, page: int | None) -> bytes:
    name = "INQUIRY" if page is None else f"INQUIRY of page 0x{page:02x}"
    return await _execute(
        session, name, lun, scsi.inquiry(page), scsi.ANSWER_MAX, attentions=ATTENTIONS_MAX
    )


async def _page(
    session: Session, lun: bytes, page: int, parse: Callable[[bytes], _T], none: _T
) -> _T:
    """A page of vital product data; ``none`` if the target does not have it."""
    try:
        data = await _inquire(session, lun, page)
    except ScsiError as error:
        if not error.is_unsupported:
            raise
        return none
    return _parsed(session, lambda: parse(data))


async def _describe(
    session: Session, lun: int, portal: Portal, settings: IscsiSettings
) -> IscsiDisk:
    address = scsi.encode_lun(lun)
    # Takes what the unit has to say since the last session; after that, reads are not interrupted by it.
    await _execute(
        session, "TEST UNIT READY", address, scsi.test_unit_ready(), 0, attentions=ATTENTIONS_MAX
    )
    standard = await _inquire(session, address, None)
    if not _parsed(session, lambda: scsi.is_disk(standard)):
        raise AmbiguousDiskError(f"{session.where}: LUN {lun} is no disk")
    answer = await _execute(
        session, "READ CAPACITY(16)", address, scsi.read_capacity(), 32, attentions=ATTENTIONS_MAX
    )
    capacity = _parsed(session, lambda: scsi.parse_capacity(answer))
    serial = await _page(session, address, scsi.SERIAL_PAGE, scsi.parse_serial, "")
    nothing: tuple[str, ...] = ()
    identifiers = await _page(
        session, address, scsi.IDENTIFIERS_PAGE, scsi.parse_identifiers, nothing
    )
    limit = await _page(session, address, scsi.LIMITS_PAGE, scsi.parse_transfer_max, 0)
    read_size = settings.read_size
    if limit:
        read_size = min(read_size, limit * capacity.block_size)
    return IscsiDisk(
        session,
        lun,
        portal=portal,
        capacity=capacity,
        read_size=read_size,
        serial=serial,
        identifiers=identifiers,
    )


__all__ = ["IscsiDisk", "open_disk"]
