# SPDX-License-Identifier: AGPL-3.0-or-later
"""What Prism has not: paths below ``/simulator`` on Prism Central, where faults and knobs are turned while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import trio

from replicator.simulator.core import Core
from replicator.simulator.faults import KINDS, Fault
from replicator.simulator.web import HttpError, Reply, Request, Router

_FAULTS_MAX = 1000
_PATTERN_MAX = 500
_FIELDS = set(Fault.__struct_fields__) - {"seen", "struck"}


@dataclass(frozen=True, slots=True)
class Logged:
    """A request that was answered. ``cluster``: whose Element was asked, None for Prism Central. ``status`` 0: cut off."""

    method: str
    path: str
    status: int
    cluster: str | None


def parse_fault(given: Any) -> Fault:
    """A fault from JSON. Raises HttpError 400 that says what is wrong."""
    if not isinstance(given, dict) or set(given) - _FIELDS:
        raise HttpError(400, f"a fault is an object with fields of: {', '.join(sorted(_FIELDS))}")
    if given.get("kind") not in KINDS:
        raise HttpError(400, f"kind is one of: {', '.join(KINDS)}")
    try:
        fault = msgspec.convert(given, Fault)
        re.compile(fault.where)
    except (msgspec.ValidationError, re.error) as error:
        raise HttpError(400, f"not a fault: {error}") from None
    if fault.every < 1 or fault.value < 0 or (fault.count is not None and fault.count < 1):
        raise HttpError(400, "every and count are at least 1, value is not negative")
    if len(fault.where) > _PATTERN_MAX:
        raise HttpError(400, f"where has at most {_PATTERN_MAX} characters")
    return fault


def build_controls(core: Core, log: Iterable[Logged]) -> Router:
    """The routes; who may use them is the server's business."""

    async def list_faults(request: Request) -> Reply:
        del request
        await trio.lowlevel.checkpoint()
        return Reply(body={"faults": core.faults.all})

    async def add_faults(request: Request) -> Reply:
        given = request.json()
        new = [parse_fault(each) for each in (given if isinstance(given, list) else [given])]
        if len(core.faults.all) + len(new) > _FAULTS_MAX:
            raise HttpError(400, f"there are at most {_FAULTS_MAX} faults: DELETE them")
        core.faults.all += new
        return await list_faults(request)

    async def clear_faults(request: Request) -> Reply:
        core.faults.clear()
        return await list_faults(request)

    async def list_knobs(request: Request) -> Reply:
        del request
        await trio.lowlevel.checkpoint()
        return Reply(body={"knobs": core.knobs})

    async def set_knobs(request: Request) -> Reply:
        given = request.json()
        if not isinstance(given, dict):
            raise HttpError(400, "knobs are an object")
        core.knobs.update(given)
        return await list_knobs(request)

    async def list_requests(request: Request) -> Reply:
        del request
        await trio.lowlevel.checkpoint()
        return Reply(body={"requests": [asdict(each) for each in log]})

    router = Router()
    router.add("GET", "/simulator/faults", list_faults)
    router.add("POST", "/simulator/faults", add_faults)
    router.add("DELETE", "/simulator/faults", clear_faults)
    router.add("GET", "/simulator/knobs", list_knobs)
    router.add("POST", "/simulator/knobs", set_knobs)
    router.add("GET", "/simulator/requests", list_requests)
    return router


__all__ = ["Logged", "build_controls", "parse_fault"]
