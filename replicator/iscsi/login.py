# SPDX-License-Identifier: AGPL-3.0-or-later
"""A login as a state machine: the target's responses in, what is to be done out. No I/O, no clock, no random numbers.

The phases are a table: each says which stage it is in, what we ask to go to, and what makes of the target's keys the next
request. RFC 7143, 6.3 and 11.12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from replicator.iscsi import pdu
from replicator.iscsi.chap import ChapExchange
from replicator.iscsi.errors import (
    LoginAuthenticationError,
    LoginNotFoundError,
    LoginRefusedError,
    TargetNotTrustedError,
)
from replicator.iscsi.keys import TEXT_MAX, Negotiation, Parameters, decode_text, encode_text
from replicator.iscsi.pdu import LoginResponse, PduError
from replicator.iscsi.settings import IscsiSettings, Portal

#: Requests of one login. Real ones take two to five.
ROUNDS_MAX: Final = 24
#: Most bytes of data in one PDU that a target may send us, as we tell it.
RECEIVE_MAX: Final = 256 << 10
_BURST_MAX: Final = 8 << 20
_SECURITY, _OPERATIONAL, _FULL = 0, 1, 3
_REFUSALS: Final[dict[int, type[LoginRefusedError]]] = {
    0x0201: LoginAuthenticationError,
    0x0202: LoginAuthenticationError,
    0x0203: LoginNotFoundError,
    0x0204: LoginNotFoundError,
}
_ITT: Final = 0
_CMD_SN: Final = 1


@dataclass(frozen=True, slots=True)
class Send:
    """Send this PDU and wait for the response."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Redirected:
    """Log in at this portal instead."""

    portal: Portal


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """Done: what was agreed on, and the numbers that the session begins with."""

    parameters: Parameters
    cmd_sn: int
    max_cmd_sn: int
    exp_stat_sn: int


class _Phase(Enum):
    OFFER = "the offer of authentication methods"
    ALGORITHM = "the offer of CHAP algorithms"
    RESPONSE = "the CHAP response"
    LEAVE = "the wish to leave the security stage"
    OPERATIONAL = "the parameters"
    DONE = "nothing"


class Login:
    """One login at one portal. ``target``: None for discovery. ``isid``: 6 bytes; ``challenge``: 16 random bytes.

    ``where`` names target and portal in errors. ``begin`` once, then ``receive`` for each response until it returns
    something other than Send.
    """

    def __init__(
        self,
        settings: IscsiSettings,
        target: str | None,
        *,
        where: str,
        isid: bytes,
        challenge: bytes,
    ) -> None:
        self._settings = settings
        self._target = target
        self._where = where
        self._isid = isid
        self._chap = ChapExchange(settings.chap, challenge) if settings.chap else None
        self._negotiation = Negotiation(
            discovery=target is None, receive_max=RECEIVE_MAX, burst_max=_BURST_MAX
        )
        self._phase = _Phase.OFFER
        self._stage = _SECURITY
        self._sent_flags = 0
        self._exp_stat_sn = 0
        self._rounds = 0
        self._text = b""
        self._started = False
        self._handlers: dict[_Phase, Callable[[dict[str, str], bool], Send | None]] = {
            _Phase.OFFER: self._method_chosen,
            _Phase.ALGORITHM: self._challenged,
            _Phase.RESPONSE: self._answered,
            _Phase.LEAVE: self._leaving,
            _Phase.OPERATIONAL: self._negotiated,
        }

    def begin(self) -> Send:
        """The first request."""
        assert not self._started
        self._started = True
        pairs = [("InitiatorName", self._settings.initiator)]
        if self._target is None:
            pairs.append(("SessionType", "Discovery"))
        else:
            pairs += [("SessionType", "Normal"), ("TargetName", self._target)]
        methods = self._methods()
        pairs.append(("AuthMethod", methods))
        # A request that offers nothing but CHAP cannot be the stage's last.
        return self._request(pairs, move_on="None" in methods)

    def receive(self, response: LoginResponse, data: bytes) -> Send | Redirected | LoggedIn:
        """Take a response and its data. Raises PduError, LoginRefusedError or TargetNotTrustedError: each ends it."""
        self._check(response)
        if response.status >> 8 == 1:
            return self._redirected(data)
        if response.status:
            raise self._refusal(response.status)
        self._exp_stat_sn = (response.stat_sn + 1) & 0xFFFFFFFF
        self._text += data
        if len(self._text) > TEXT_MAX:
            raise PduError("a login with too much text")
        if response.more:
            return self._request([], move_on=False)
        pairs, self._text = decode_text(self._text), b""
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise PduError("a key given twice in one response")
        moved = response.transit
        if moved:
            self._stage = response.next_stage
        request = self._handlers[self._phase](keys, moved)
        if request is not None:
            return request
        return LoggedIn(self._negotiation.result(), _CMD_SN, response.max_cmd_sn, self._exp_stat_sn)

    def _methods(self) -> str:
        chap = self._settings.chap
        if chap is None:
            return "None"
        # Discovery may be without CHAP where the target itself has it. One that is to prove itself must do so.
        return "CHAP" if chap.mutual and self._target is not None else "CHAP,None"

    def _check(self, response: LoginResponse) -> None:
        if not self._started or self._phase is _Phase.DONE:
            raise PduError("a login response outside a login")
        if response.status:
            return  # the rest of a refusal or a redirect is not always filled in
        if response.itt != _ITT or response.isid != self._isid:
            raise PduError("a login response to another login")
        if response.version != 0:
            raise PduError("another version of the protocol")
        if response.stage != self._stage:
            raise PduError("a login response of another stage")
        if response.transit:
            if not self._sent_flags & pdu.TRANSIT:
                raise PduError("a change of the login's stage that was not asked for")
            if response.next_stage != self._sent_flags & 3:
                raise PduError("a change to another stage than was asked for")
            if response.next_stage == _FULL and response.tsih == 0:
                raise PduError("a login that ends without a session")

    def _redirected(self, data: bytes) -> Redirected:
        address = dict(decode_text(data)).get("TargetAddress")
        if address is None:
            raise PduError("a redirect that does not say where to")
        try:
            return Redirected(Portal.parse(address))
        except ValueError:
            raise PduError("a redirect to something that is no portal") from None

    def _refusal(self, status: int) -> LoginRefusedError:
        return _REFUSALS.get(status, LoginRefusedError)(self._where, status)

    def _method_chosen(self, keys: dict[str, str], moved: bool) -> Send | None:
        method = keys.get("AuthMethod", "None" if self._methods() == "None" else "")
        if method not in self._methods().split(","):
            if method == "None":
                raise TargetNotTrustedError(
                    f"{self._where} does no CHAP, so it cannot prove itself"
                )
            if method in {"", "Reject"}:
                raise self._refusal(0x0201)
            raise PduError("an authentication method that was not offered")
        if method == "CHAP":
            if moved:
                raise PduError("a target that leaves the security stage before CHAP")
            assert self._chap is not None
            self._phase = _Phase.ALGORITHM
            return self._request(self._chap.offer(), move_on=False)
        return self._leaving(keys, moved)

    def _challenged(self, keys: dict[str, str], moved: bool) -> Send | None:
        assert self._chap is not None
        assert not moved  # not asked for, so `_check` has refused it
        self._phase = _Phase.RESPONSE
        return self._request(self._chap.answer(keys), move_on=True)

    def _answered(self, keys: dict[str, str], moved: bool) -> Send | None:
        assert self._chap is not None
        if not self._chap.proves(keys):
            raise TargetNotTrustedError(
                f"{self._where} did not prove that it knows the target's CHAP secret:"
                " the secret is wrong, or it is another machine"
            )
        return self._leaving(keys, moved)

    def _leaving(self, keys: dict[str, str], moved: bool) -> Send | None:
        del keys  # what a target says of itself
        if not moved:
            self._phase = _Phase.LEAVE
            return self._request([], move_on=True)
        self._phase = _Phase.OPERATIONAL
        return self._request(self._negotiation.offers(), move_on=True)

    def _negotiated(self, keys: dict[str, str], moved: bool) -> Send | None:
        replies = self._negotiation.take(list(keys.items()))
        if not moved:
            return self._request(replies, move_on=True)
        if replies:
            raise PduError("a login that ends with a question")
        self._phase = _Phase.DONE
        return None

    def _request(self, pairs: list[tuple[str, str]], *, move_on: bool) -> Send:
        self._rounds += 1
        if self._rounds > ROUNDS_MAX:
            raise PduError("a login without an end")
        flags = self._stage << 2
        if move_on:
            flags |= pdu.TRANSIT | (_OPERATIONAL if self._stage == _SECURITY else _FULL)
        self._sent_flags = flags
        return Send(
            pdu.login_request(
                isid=self._isid,
                itt=_ITT,
                flags=flags,
                cmd_sn=_CMD_SN,
                exp_stat_sn=self._exp_stat_sn,
                data=encode_text(pairs),
            )
        )


__all__ = ["RECEIVE_MAX", "ROUNDS_MAX", "LoggedIn", "Login", "Redirected", "Send"]
