# SPDX-License-Identifier: AGPL-3.0-or-later
"""From a portal to a connection that is logged in, following redirects; and discovery, which is one question on such a one."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from replicator.iscsi import pdu
from replicator.iscsi.errors import (
    IscsiError,
    IscsiProtocolError,
    PortalUnreachableError,
    RedirectUnreachableError,
    TimedOutError,
)
from replicator.iscsi.keys import decode_text, encode_text
from replicator.iscsi.login import LoggedIn, Login, Redirected, Send
from replicator.iscsi.pdu import LoginResponse, NopIn, PduError, TextResponse
from replicator.iscsi.session import LOGOUT_TIMEOUT_S
from replicator.iscsi.settings import IscsiSettings, Portal, Target, check_name
from replicator.iscsi.wire import Wire

#: How often a login may be sent on.
REDIRECTS_MAX: Final = 4
#: A data services IP lists some targets for each disk attached to us; this bounds a list that does not end.
TARGETS_MAX: Final = 4096
_LIST_MAX: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection that is logged in, at the portal that took us in the end. ``where`` names it in errors."""

    wire: Wire
    start: LoggedIn
    portal: Portal
    where: str


async def connect(portal: Portal, target: str | None, settings: IscsiSettings) -> Connected:
    """Connect and log in (``target`` None: for discovery), following up to REDIRECTS_MAX redirects.

    Raises PortalUnreachableError, RedirectUnreachableError, LoginRefusedError and its kinds, TargetNotTrustedError,
    TimedOutError, SessionLostError, IscsiProtocolError. Cancellation closes the connection.
    """
    here, route = portal, ""
    for _ in range(REDIRECTS_MAX + 1):
        where = _where(here, target) + route
        try:
            wire = await Wire.connect(here, settings.connect_timeout_s, where)
        except PortalUnreachableError as error:
            if route:
                text = f"{error}; this host must reach the address that the portal names as well"
                raise RedirectUnreachableError(text) from None
            raise
        try:
            outcome = await _log_in(wire, target, settings, where)
        except BaseException:
            wire.close()
            raise
        if isinstance(outcome, LoggedIn):
            wire.use(outcome.parameters)
            return Connected(wire, outcome, here, where)
        wire.close()
        here, route = outcome.portal, f" (sent there by {portal})"
    raise IscsiProtocolError(
        f"{_where(portal, target)} sent us on {REDIRECTS_MAX + 1} times: the portals point at each other"
    )


def _where(portal: Portal, target: str | None) -> str:
    return f"iSCSI portal {portal}" if target is None else f"iSCSI target {target} at {portal}"


async def _log_in(
    wire: Wire, target: str | None, settings: IscsiSettings, where: str
) -> LoggedIn | Redirected:
    # A random qualifier (RFC 7143, 11.12.5): no session of ours takes the place of another.
    isid = b"\x80" + secrets.token_bytes(3) + secrets.token_bytes(2)
    login = Login(settings, target, where=where, isid=isid, challenge=secrets.token_bytes(16))
    outcome: Send | LoggedIn | Redirected = login.begin()
    try:
        with trio.fail_after(settings.login_timeout_s):
            while isinstance(outcome, Send):
                wire.send(outcome.data)
                await wire.flush()
                unit, data = await wire.receive()
                if not isinstance(unit, LoginResponse):
                    raise PduError(f"{type(unit).__name__} during the login")
                outcome = login.receive(unit, data)
    except trio.TooSlowError:
        text = f"{where} did not finish the login within {settings.login_timeout_s:g} s"
        raise TimedOutError(text) from None
    except PduError as error:
        raise IscsiProtocolError(f"{where} broke the protocol: {error}") from None
    return outcome


async def discover(portal: Portal, settings: IscsiSettings) -> list[Target]:
    """The targets that the portal offers this initiator (SendTargets), in its order.

    Within the settings' timeouts. Raises as ``connect``. Cancellation closes the connection.
    """
    connected = await connect(portal, None, settings)
    wire, where = connected.wire, connected.where
    try:
        with trio.fail_after(settings.task_timeout_s):
            text = await _send_targets(wire, connected.start)
        return _targets(text, connected.portal)
    except trio.TooSlowError:
        limit = f"{settings.task_timeout_s:g} s"
        raise TimedOutError(f"{where} did not list its targets within {limit}") from None
    except PduError as error:
        raise IscsiProtocolError(f"{where} broke the protocol: {error}") from None
    finally:
        wire.close()


async def _send_targets(wire: Wire, start: LoggedIn) -> bytes:
    """The answer's text; then a logout."""
    text = bytearray()
    question, lun, ttt = encode_text([("SendTargets", "All")]), bytes(8), pdu.NO_TAG
    cmd_sn, exp_stat_sn, tag = start.cmd_sn, start.exp_stat_sn, 1
    while True:
        request = pdu.text_request(
            itt=tag, ttt=ttt, lun=lun, cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn, data=question
        )
        wire.send(request)
        await wire.flush()
        unit, data = await wire.receive()
        while isinstance(unit, NopIn):
            _answer_ping(wire, unit, cmd_sn, exp_stat_sn)
            unit, data = await wire.receive()
        if not isinstance(unit, TextResponse) or unit.itt != tag:
            raise PduError(f"{type(unit).__name__} in answer to SendTargets")
        exp_stat_sn = (unit.stat_sn + 1) & 0xFFFFFFFF
        cmd_sn = (cmd_sn + 1) & 0xFFFFFFFF
        text += data
        if len(text) > _LIST_MAX or (not unit.final and not data):
            raise PduError("a list of targets without an end")
        if unit.final:
            break
        if unit.ttt == pdu.NO_TAG:
            raise PduError("a list of targets that goes on without a tag")
        question, lun, ttt = b"", unit.lun, unit.ttt
    await _say_goodbye(wire, cmd_sn, exp_stat_sn)
    return bytes(text)


def _answer_ping(wire: Wire, unit: NopIn, cmd_sn: int, exp_stat_sn: int) -> None:
    if unit.ttt != pdu.NO_TAG:
        wire.send(pdu.nop_out(lun=unit.lun, ttt=unit.ttt, cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn))


async def _say_goodbye(wire: Wire, cmd_sn: int, exp_stat_sn: int) -> None:
    """The list is there: a target that goes, or hangs, without an answer has done its part."""
    with trio.move_on_after(LOGOUT_TIMEOUT_S), suppress(IscsiError, PduError):
        wire.send(pdu.logout(itt=0, cmd_sn=cmd_sn, exp_stat_sn=exp_stat_sn))
        await wire.flush()
        await wire.receive()


def _targets(text: bytes, portal: Portal) -> list[Target]:
    found: list[tuple[str, list[Portal]]] = []
    for key, value in decode_text(text):
        try:
            if key == "TargetName":
                found.append((check_name(value), []))
            elif key == "TargetAddress" and found:
                found[-1][1].append(Portal.parse(value))
        except ValueError:
            raise PduError(f"a list of targets with a wrong {key}") from None
        if len(found) > TARGETS_MAX:
            raise PduError(f"a list of more than {TARGETS_MAX} targets")
    # A target without an address is at the portal that was asked.
    return [Target(name, tuple(dict.fromkeys(portals or [portal]))) for name, portals in found]


__all__ = ["REDIRECTS_MAX", "TARGETS_MAX", "Connected", "connect", "discover"]
