# SPDX-License-Identifier: AGPL-3.0-or-later
"""The five probes, in their order: TLS, the account, clusters, rights, data services. One that fails stops those that need it."""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final

import trio

from replicator.health.findings import (
    Finding,
    Probe,
    Report,
    State,
    chosen,
    failed,
    judge_access,
    judge_clock,
    judge_clusters,
    no_data_services,
    no_rest_by_v4,
    soften,
)
from replicator.iscsi import IscsiError, IscsiSettings, Portal, discover
from replicator.prism.api import Prism
from replicator.prism.connection import Connections, Dial, HttpAnswer, HttpRequest, make_tls
from replicator.prism.discovery import open_prism
from replicator.prism.errors import PrismError, PrismPermissionError, PrismUnreachableError
from replicator.prism.settings import PrismSettings
from replicator.prism.types import Capability, Cluster

REACH: Final = "reach Prism"
SIGN_IN: Final = "sign in"
CLUSTERS: Final = "clusters"
RIGHTS: Final = "rights"
DATA_SERVICES: Final = "data services"
PROBES: Final = (REACH, SIGN_IN, CLUSTERS, RIGHTS, DATA_SERVICES)

_CONNECT_S: Final = 3.0
_REQUEST_S: Final = 10.0
_RETRY_S: Final = 4.0
#: No probe takes longer, whatever happens.
_PROBE_S: Final = 30.0
_CVMS_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be checked. ``data_services``: in place of the clusters' own. ``iscsi`` False: disks are read over REST alone.

    ``initiator``: the IQN that this host logs in with. ``dial`` and ``clock`` are for tests.
    """

    settings: PrismSettings
    initiator: str
    data_services: Portal | None = None
    iscsi: bool = True
    dial: Dial = trio.open_tcp_stream
    clock: Callable[[], float] = time.time


async def check_health(wanted: Wanted, tell: Callable[[Probe], None] = lambda _: None) -> Report:
    """Run all probes; each is told to ``tell`` when it is done. What fails is a finding: nothing is raised for it.

    Raises UsageError for settings that cannot be used at all (a CA file). Changes nothing anywhere; cancelled, it stops.
    """
    began = trio.current_time()
    settings = wanted.settings
    tls = make_tls(settings.ca, insecure=settings.insecure)
    async with AsyncExitStack() as stack:
        checking = _Checking(wanted, tls, stack)
        probes = []
        for name in PROBES:
            probe = await checking.run(name)
            tell(probe)
            probes.append(probe)
        api = None if checking.prism is None else str(checking.prism.capability)
    return Report(
        prism=f"{settings.host}:{settings.port}",
        api=api,
        seconds=trio.current_time() - began,
        probes=tuple(probes),
    )


class _Checking:
    """The probes of one check, and what the later ones know from the earlier."""

    def __init__(self, wanted: Wanted, tls: ssl.SSLContext, stack: AsyncExitStack) -> None:
        self._wanted = wanted
        waits = replace(
            wanted.settings.waits, connect_s=_CONNECT_S, request_s=_REQUEST_S, retry_s=_RETRY_S
        )
        self._settings = replace(wanted.settings, waits=waits)
        self._tls = tls
        self._stack = stack
        self._reached = False
        self._clusters: Sequence[Cluster] | None = None
        self._refused: PrismError | None = None
        self.prism: Prism | None = None

    async def run(self, name: str) -> Probe:
        """One probe, with the time that it took."""
        steps: dict[str, tuple[str | None, Callable[[], Awaitable[list[Finding]]]]] = {
            REACH: (None, self._reach),
            SIGN_IN: (None if self._reached else REACH, self._sign_in),
            CLUSTERS: (None if self.prism is not None else SIGN_IN, self._judge_clusters),
            RIGHTS: (None if self.prism is not None else SIGN_IN, self._judge_rights),
            DATA_SERVICES: (self._missing_for_data(), self._judge_data_services),
        }
        missing, step = steps[name]
        if missing is not None:
            return Probe(name, 0.0, (Finding(State.NOT_RUN, f"needs: {missing}"),))
        began = trio.current_time()
        found: list[Finding] = []
        with trio.move_on_after(_PROBE_S) as scope:
            try:
                found = await step()
            except PrismError as error:
                found = [failed(error)]
        if scope.cancelled_caught:
            found = [failed(PrismUnreachableError(f"{name}: no answer within {_PROBE_S:g} s"))]
        return Probe(name, trio.current_time() - began, tuple(found))

    def _missing_for_data(self) -> str | None:
        known = self._wanted.data_services is not None or not self._wanted.iscsi
        return None if known or self._ours() else CLUSTERS

    def _ours(self) -> list[Cluster]:
        return chosen(self._clusters or (), self._settings.cluster)

    async def _reach(self) -> list[Finding]:
        """TCP, TLS and HTTP, without the account: any answer will do."""
        settings = self._settings
        answer = await self._ask(settings.host, settings.port, "Prism")
        if answer.status in {502, 503, 504}:
            raise PrismUnreachableError(
                f"Prism {settings.host}:{settings.port} is not ready: {answer.status}"
            )
        self._reached = True
        found = [Finding(State.OK, f"{settings.host}:{settings.port} answers over TLS")]
        if settings.insecure:
            found.append(
                Finding(
                    State.WARNING,
                    "its certificate is not checked (prism_insecure)",
                    "name the file of its authority with prism_ca_cert instead",
                )
            )
        return found + judge_clock(self._skew_s(answer))

    def _skew_s(self, answer: HttpAnswer) -> float | None:
        try:
            date = email.utils.parsedate_to_datetime(answer.header("date") or "")
        except (ValueError, TypeError):
            return None
        return date.timestamp() - self._wanted.clock()

    async def _ask(self, host: str, port: int, what: str) -> HttpAnswer:
        connections = Connections(
            host,
            port,
            self._tls,
            what=what,
            connect_timeout_s=_CONNECT_S,
            dial=self._wanted.dial,
        )
        shown = f"[{host}]" if ":" in host else host
        headers = [("Host", f"{shown}:{port}"), ("Accept", "application/json")]
        request = HttpRequest("GET", "/api/nutanix/v3/versions", headers)
        try:
            return await connections.exchange(request, timeout_s=_REQUEST_S, once=False)
        finally:
            await connections.aclose()

    async def _sign_in(self) -> list[Finding]:
        """Which interface is spoken, and a first question as the account."""
        prism = await self._stack.enter_async_context(
            open_prism(self._settings, dial=self._wanted.dial)
        )
        try:
            self._clusters = await prism.clusters()
        except PrismPermissionError as error:
            self._refused = error  # it is signed in; the next probe says what it lacks
        self.prism = prism
        account = self._settings.account
        who = "the API key" if account.api_key else account.user
        return [Finding(State.OK, f"{who} is signed in; Prism speaks {prism.capability}")]

    async def _judge_clusters(self) -> list[Finding]:
        if self._refused is not None:
            raise self._refused
        found = judge_clusters(self._clusters or (), self._settings.cluster)
        elements: dict[str, Finding] = {}
        async with trio.open_nursery() as nursery:
            for cluster in self._ours():
                nursery.start_soon(self._try_element, cluster, elements)
        in_order = [elements[each.uuid] for each in self._ours()]
        enough = any(each.state is State.OK for each in in_order)
        return found + soften(in_order, enough=enough)

    async def _try_element(self, cluster: Cluster, found: dict[str, Finding]) -> None:
        """Whether a cluster's Element answers: it says what changed. v3 can do nothing without it, v4 reads whole disks."""
        needed = self.prism is not None and self.prism.capability is Capability.V3
        bad = State.FAILED if needed else State.WARNING
        address = self._settings.element_address(cluster.uuid, cluster.name, cluster.address)
        if address is None:
            found[cluster.uuid] = Finding(
                bad,
                f"{cluster.name}: Prism does not know the Element's address",
                "set the cluster's virtual IP in Prism, or give prism_element",
            )
            return
        where = f"Prism Element {cluster.name}"
        try:
            await self._ask(*address, where)
        except PrismError as error:
            found[cluster.uuid] = Finding(
                bad,
                str(error),
                f"let this host reach {address[0]} at TCP {address[1]}, or give another address with prism_element",
            )
        else:
            found[cluster.uuid] = Finding(State.OK, f"{where} answers at {address[0]}:{address[1]}")

    async def _judge_rights(self) -> list[Finding]:
        assert self.prism is not None
        return judge_access(await self.prism.access())

    async def _judge_data_services(self) -> list[Finding]:
        if not self._wanted.iscsi:
            if self.prism is not None and self.prism.capability is Capability.V4:
                return [no_rest_by_v4()]
            return [Finding(State.OK, "not needed: data_path = rest")]
        portal = self._wanted.data_services
        ours = self._ours()
        if portal is not None:
            cvms = ours[0].cvms if len(ours) == 1 else ()
            return await self._try_portal("dsip", portal, cvms)
        found: dict[str, list[Finding]] = {}
        async with trio.open_nursery() as nursery:
            for cluster in ours:
                nursery.start_soon(self._try_cluster, cluster, found)
        in_order = [each for cluster in ours for each in found[cluster.uuid]]
        return soften(in_order, enough=any(each.state is State.OK for each in in_order))

    async def _try_cluster(self, cluster: Cluster, found: dict[str, list[Finding]]) -> None:
        if cluster.data_services is None:
            found[cluster.uuid] = [no_data_services(cluster.name)]
            return
        try:
            portal = Portal(cluster.data_services)
        except ValueError as error:
            found[cluster.uuid] = [
                Finding(State.FAILED, f"{cluster.name}: data services: {error}", "give dsip")
            ]
            return
        found[cluster.uuid] = await self._try_portal(cluster.name, portal, cluster.cvms)

    async def _try_portal(self, name: str, portal: Portal, cvms: Sequence[str]) -> list[Finding]:
        """TCP and SendTargets; and TCP to the CVMs, where logins are sent on to."""
        initiator = self._wanted.initiator
        settings = IscsiSettings(
            initiator,
            connect_timeout_s=_CONNECT_S,
            login_timeout_s=_REQUEST_S,
            task_timeout_s=_REQUEST_S,
        )
        try:
            targets = await discover(portal, settings)
        except IscsiError as error:
            return [
                Finding(
                    State.FAILED,
                    f"{name}: no iSCSI portal at {portal} for {initiator}: {error}",
                    f"let this host reach TCP {portal.port} of {portal.host} and of every CVM; check that the data services"
                    " address is this cluster's",
                )
            ]
        found = [
            Finding(
                State.OK,
                f"{name}: {portal} offers {len(targets)} target{'' if len(targets) == 1 else 's'} to {initiator}",
            )
        ]
        closed = await self._closed(cvms[:_CVMS_MAX], portal.port)
        if closed:
            found.append(
                Finding(
                    State.WARNING,
                    f"{name}: CVM {', '.join(closed)} cannot be reached at TCP {portal.port}",
                    "logins are sent on to any CVM: let this host reach all of them",
                )
            )
        return found

    async def _closed(self, hosts: Sequence[str], port: int) -> list[str]:
        closed: list[str] = []

        async def knock(host: str) -> None:
            try:
                with trio.fail_after(_CONNECT_S):
                    stream = await trio.open_tcp_stream(host, port)
            except (OSError, trio.TooSlowError):
                closed.append(host)
            else:
                await trio.aclose_forcefully(stream)

        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(knock, host)
        return sorted(closed)


__all__ = ["PROBES", "Wanted", "check_health"]
