# SPDX-License-Identifier: AGPL-3.0-or-later
"""All VMs that one host pushes: a pusher each, over one log and one line to the receiver, so many of them at once.

Which VMs these are is asked anew from time to time. One that fails takes none of the others with it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import trio
from eventsourcing.persistence import PersistenceError

from replicator import durable
from replicator.cli.cycling import cycles, whose
from replicator.cli.failures import explain
from replicator.cli.logs import WORKING_FOR
from replicator.cli.source import ChosenVm, OpenSources
from replicator.cli.text import one_line
from replicator.cli.underway import watch
from replicator.config import Config
from replicator.errors import RefusedError, ReplicatorError, UsageError
from replicator.log import EventLog
from replicator.nursery import flat_nursery
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.progress import Progress
from replicator.push.pusher import Outcome, Pusher
from replicator.state_dir import check_directory

_logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

#: What is reported to: a VM's label and how far its push is.
Report = Callable[[str, Progress], None]
#: What a push may fail of without taking the others down.
FAILURES = (ReplicatorError, PersistenceError, OSError)


class SeveralFailedError(ReplicatorError):
    """Some of several VMs failed; each was told. The exit code is that of a refusal where all were refused, else 1."""

    def __init__(self, failed: Sequence[Mapping[str, Any]], count: int) -> None:
        """``failed``: VmFailure objects of docs/json.md, of ``count`` VMs in all."""
        each = "; ".join(f"{failure['vm']}: {failure['error']}" for failure in failed)
        super().__init__(f"{len(failed)} of {count} VM(s) failed: {each}")
        refused = all(failure["exit_code"] == RefusedError.exit_code for failure in failed)
        self.exit_code = RefusedError.exit_code if refused else ReplicatorError.exit_code


@dataclass(slots=True, eq=False)
class Member:
    """A VM of the fleet. ``failed``: why its loop has ended for good."""

    vm: ChosenVm
    pusher: Pusher
    scope: trio.CancelScope | None = None
    busy: bool = False
    leaving: bool = False
    failed: RefusedError | None = None

    @property
    def label(self) -> str:
        """What to call it: of a host's only VM the name that its source says, once it has."""
        return self.pusher.name or self.vm.label if self.vm.uuid is None else self.vm.label

    @property
    def reconnects(self) -> dict[str, int]:
        """How often a broken line was made again for it, by label; empty before its first push."""
        count = sum(self.pusher.reconnects.values())
        return {self.label: count} if self.pusher.reconnects else {}

    def leave(self) -> None:
        """Push it no more: at once, or when the push under way has ended."""
        self.leaving = True
        if not self.busy and self.scope is not None:
            self.scope.cancel()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the push of one VM: an outcome or an error."""

    member: Member
    outcome: Outcome | None
    error: Exception | None = None

    def failure(self) -> dict[str, Any]:
        """VmFailure of docs/json.md."""
        assert self.error is not None
        return vm_failure(self.member.vm, self.error)


def vm_failure(vm: ChosenVm, error: Exception) -> dict[str, Any]:
    """VmFailure of docs/json.md."""
    return {
        "vm": vm.name,
        "uuid": str(vm.uuid),
        "error": explain(error).text,
        "exit_code": explain(error).exit_code,
    }


@dataclass(slots=True)
class Fleet:
    """The VMs of this host. The state directory is locked by the caller."""

    config: Config
    log: EventLog
    link: Link
    sources: OpenSources
    patience_s: float
    report: Report = lambda _label, _progress: None
    members: list[Member] = field(default_factory=list)
    _leaving: list[Member] = field(default_factory=list)
    #: Of members that are gone: a counter must not go down.
    _reconnects: dict[str, int] = field(default_factory=dict)

    async def select(self) -> list[Member]:
        """Ask which VMs there are to push now; those that were there before keep their pushers. Raises what the sources do."""
        before = {member.vm.uuid: member for member in [*self._leaving, *self.members]}
        members = [self._member(vm, before) for vm in await self.sources.select()]
        here = {member.vm.uuid for member in members}
        known = {member.vm.uuid for member in self.members}
        came = [member.label for member in members if member.vm.uuid not in known]
        gone = [member for member in self.members if member.vm.uuid not in here]
        if any(member.vm.uuid is not None for member in members) and (came or gone):
            self._tell(members, came if known else [], [member.label for member in gone])
        for member in gone:
            self._reconnects |= member.reconnects
        # One that comes back while its last push still runs must not get a second pusher.
        self._leaving = [m for m in before.values() if m not in members and m.busy]
        self.members = members
        return members

    @staticmethod
    def _tell(members: Sequence[Member], came: Sequence[str], gone: Sequence[str]) -> None:
        _logger.info("Selected %d VM(s) for backup", len(members))
        for label in came:
            _logger.info("%s is protected from now on", one_line(label))
        for label in gone:
            _logger.warning(
                "%s is not pushed any more: it is not there, or vm, exclude and cluster do not choose it",
                one_line(label),
            )

    def _member(self, vm: ChosenVm, before: Mapping[Any, Member]) -> Member:
        known = before.get(vm.uuid)
        if known is not None:
            known.vm = vm
            return known
        pusher = Pusher(
            vm.config,
            self.log,
            vm.source,
            self.link,
            report=lambda at: self.report(member.label, at),
            patience_s=self.patience_s,
            vm=vm.uuid,
        )
        member = Member(vm, pusher)
        return member

    def find(self, name: str) -> Member:
        """The member of that name or UUID. Raises UsageError."""
        found = [m for m in self.members if name in (m.vm.name, m.vm.label, str(m.vm.uuid))]
        if len(found) == 1:
            return found[0]
        known = ", ".join(one_line(m.label) for m in self.members)
        if found:
            uuids = " and ".join(str(m.vm.uuid) for m in found)
            raise UsageError(f"VM: {name} is the name of {uuids}: give the UUID")
        raise UsageError(f"VM: this host pushes {known}, not {name}; nothing was touched")

    # What is under way

    @property
    def under_way(self) -> list[tuple[Member, dict[str, Any]]]:
        """The pushes under way: whose, and PushProgress of docs/json.md."""
        return [
            (member, member.pusher.under_way.info())
            for member in self.members
            if member.pusher.under_way is not None
        ]

    @property
    def reconnects(self) -> dict[str, int]:
        """How often a broken line was made again, by VM, since this process began."""
        found = dict(self._reconnects)
        for member in self.members:
            found |= member.reconnects
        return found

    # Pushing

    async def push(self, member: Member, want: Want) -> Outcome:
        """One push of one VM. Raises as ``Pusher.push``."""
        token = WORKING_FOR.set("" if member.vm.uuid is None else member.label)
        try:
            if member.vm.uuid is not None:
                await make_work_dir(self.config, member.vm.config)
            return await member.pusher.push(want)
        finally:
            WORKING_FOR.reset(token)

    async def push_each(self, members: Sequence[Member], want: Want) -> list[Result]:
        """One push of each, ``concurrent_vms`` at once; in the order of ``members``. Errors are results, and logged."""

        async def work(member: Member) -> Result:
            try:
                return Result(member, await self.push(member, want))
            except FAILURES as error:
                _logger.error("%s: %s", one_line(member.label), explain(error).text)
                return Result(member, None, error)

        return await in_turn(self.config.concurrent_vms, members, work)

    async def protect(self) -> None:
        """Push every VM every ``push_interval`` seconds, and look as often which VMs there are; until cancelled.

        Raises UsageError where the first look finds nothing to push, RefusedError when every VM is fenced.
        """
        places = trio.CapacityLimiter(self.config.concurrent_vms)
        first = True
        async with flat_nursery() as nursery:
            while True:
                started = trio.current_time()
                try:
                    members = await self._look()
                except FAILURES as error:
                    if first and isinstance(error, UsageError):
                        raise
                    _logger.error("which VMs there are cannot be seen: %s", explain(error).text)
                else:
                    first = False
                    for member in members:
                        nursery.start_soon(self._keep, member, places)
                await trio.sleep_until(started + self.config.push_interval)

    async def _look(self) -> list[Member]:
        """The members that need a loop; those that are gone are told to leave."""
        before = self.members
        members = await self.select()
        for member in before:
            if member not in members:
                member.leave()
        for member in members:
            member.leaving = False
        return [m for m in members if m.scope is None and m.failed is None]

    async def _keep(self, member: Member, places: trio.CapacityLimiter) -> None:
        """The loop of one VM."""
        if member.scope is not None:
            return
        WORKING_FOR.set(member.label)
        with trio.CancelScope() as member.scope:
            async with flat_nursery() as nursery:
                nursery.start_soon(watch, lambda: member.pusher.under_way)
                push = partial(self._push_in_turn, member, places)
                try:
                    await cycles(push, self.config.push_interval)
                except RefusedError as error:
                    member.failed = error
                    _logger.error("%sit is not pushed any more: %s", whose(), explain(error).text)
                    if all(each.failed is not None for each in self.members):
                        raise
                nursery.cancel_scope.cancel()
        member.scope = None

    async def _push_in_turn(
        self, member: Member, places: trio.CapacityLimiter, want: Want
    ) -> Outcome:
        async with places:
            member.busy = True
            try:
                return await self.push(member, want)
            finally:
                member.busy = False
                if member.leaving and member.scope is not None:
                    member.scope.cancel()


async def in_turn(
    at_once: int, items: Sequence[_Item], work: Callable[[_Item], Awaitable[_Made]]
) -> list[_Made]:
    """What ``work`` makes of each item, so many at once and begun in order; in the order of the items. Raises what it does."""
    made: dict[int, _Made] = {}
    places = trio.Semaphore(at_once)

    async def one(number: int, item: _Item) -> None:
        try:
            made[number] = await work(item)
        finally:
            places.release()

    async with flat_nursery() as nursery:
        for number, item in enumerate(items):
            await places.acquire()
            nursery.start_soon(one, number, item)
    return [made[number] for number in range(len(items))]


async def make_work_dir(host: Config, own: Config) -> None:
    """Make the working directory of one VM: the host's, or a folder in it. Raises UsageError, OSError."""

    def make() -> None:
        check_directory(host.work_path, "working_dir")
        durable.make_dir(host.work_path)
        durable.make_dir(own.work_path)

    await trio.to_thread.run_sync(make)


__all__ = [
    "FAILURES",
    "Fleet",
    "Member",
    "Report",
    "Result",
    "SeveralFailedError",
    "in_turn",
    "make_work_dir",
    "vm_failure",
]
