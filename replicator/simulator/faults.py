# SPDX-License-Identifier: AGPL-3.0-or-later
"""Faults that a user of the simulator asks for: each has a kind, a pattern that says where, and how often it strikes."""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

Kind = Literal[
    "latency",  # seconds before a request is looked at
    "rate-limit",  # 429; value: Retry-After, 0 for none
    "rate-limit-400",  # 400 with RATE_LIMIT_EXCEEDED
    "unauthorized",  # 401 with HTML
    "forget-sessions",  # cookies given so far are worth nothing
    "server-error",  # value: the status, 500 to 504
    "reset-before",  # the connection is cut before the request is looked at
    "reset-after",  # the connection is cut after it was carried out
    "upload-cut",  # value: how many bytes of an upload are taken before the connection is cut
    "etag-stale",  # 412
    "etag-stale-in-task",  # accepted; the task ends with VMM-30303
    "task-failed",  # nothing was done
    "task-stuck",  # the task stays RUNNING for ever
    "task-slow",  # value: seconds
    "task-not-found",  # 404 for a task that is there
    "half-created",  # the task ends FAILED, what it made stays
    "snapshot-expired",  # a snapshot that is asked for has just expired
    "reference-invalid",  # changed regions: the reference is not accepted
    "regions-not-found",  # changed regions: 404 although the snapshot is there
    "regions-wrong",  # changed regions: the first region is left out of every page
    "regions-stuck",  # changed regions: pages do not advance
    "restore-orphan",  # a restore fails and leaves a VM that is off
    "discovery-delayed",  # value: seconds until a target answers after the attachment
    "application-downgraded",  # an application consistent snapshot becomes a crash consistent one
]
KINDS: tuple[str, ...] = get_args(Kind)


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``where``: a regular expression, searched in ``METHOD /path`` of requests and in the names of operations of tasks.

    It strikes ``count`` times (None: for ever), each time after having passed by ``every`` - 1 times.
    """

    kind: Kind
    where: str = ""
    count: int | None = 1
    every: int = 1
    value: float = 0.0
    seen: int = 0
    struck: int = 0


class Faults:
    """The faults in force."""

    def __init__(self) -> None:
        self.all: list[Fault] = []

    def add(
        self,
        kind: Kind,
        where: str = "",
        *,
        count: int | None = 1,
        every: int = 1,
        value: float = 0.0,
    ) -> Fault:
        """One more; raises re.error for a pattern that is none."""
        re.compile(where)
        fault = Fault(kind=kind, where=where, count=count, every=every, value=value)
        self.all.append(fault)
        return fault

    def clear(self) -> None:
        """None any more."""
        self.all.clear()

    def take(self, kind: Kind, subject: str) -> Fault | None:
        """The fault of this kind that strikes now, counted."""
        for fault in self.all:
            if fault.kind != kind or not re.search(fault.where, subject):
                continue
            if fault.count is not None and fault.struck >= fault.count:
                continue
            fault.seen += 1
            if fault.seen % fault.every:
                continue
            fault.struck += 1
            return fault
        return None
