# SPDX-License-Identifier: AGPL-3.0-or-later
"""What probes find, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRateLimitedError,
    PrismTlsError,
    PrismUnreachableError,
)
from replicator.prism.types import Access, Cluster

#: Clocks that differ by more make tokens and expiry times wrong.
SKEW_MAX_S: Final = 60.0
_NAMES_MAX: Final = 10
_ORDER: Final = ("not run", "ok", "warning", "failed")


class State(StrEnum):
    """How a probe ended. ``WARNING``: jobs can run, and something should be looked at."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a probe found: a line, and a line on what to do where something must or should be done."""

    state: State
    text: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe, done. ``seconds`` is how long it took."""

    name: str
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        """The worst of what it found."""
        return worst(finding.state for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Report:
    """All probes, in their order. ``api``: v3 or v4, None where that was not settled."""

    prism: str
    api: str | None
    seconds: float
    probes: tuple[Probe, ...]

    @property
    def ready(self) -> bool:
        """Whether a job can run: nothing failed, and everything was looked at."""
        return all(probe.state in {State.OK, State.WARNING} for probe in self.probes)


def worst(states: Iterable[State]) -> State:
    """The one that counts; not run where there is none."""
    return max(states, key=_ORDER.index, default=State.NOT_RUN)


def remedy_for(error: Exception) -> str:
    """What to do about an error of Prism."""
    match error:
        case PrismTlsError():
            return (
                "name the file of the authority that signed Prism's certificate with prism_ca_cert; in a lab,"
                " prism_insecure = yes checks no certificate"
            )
        case PrismUnreachableError():
            return "check prism_central and prism_port, and that firewalls let this host reach that port"
        case PrismAuthError():
            return "check user and passfile (or prism_api_key): it may be wrong, expired or locked"
        case PrismPermissionError():
            lacks = error.permission or "what is named here"
            return f"give the account a role that holds {lacks}, on the clusters that are protected"
        case PrismRateLimitedError():
            return "wait a minute and try again; lower prism_rate_rpm if other programs ask Prism as well"
        case PrismNotFoundError() | PrismAnswerError():
            return "check that prism_central and prism_port are those of Prism Central, and prism_api_version"
    return "look at Prism's own alerts and tasks, then try again"


def failed(error: Exception) -> Finding:
    """What an error of Prism means for a probe."""
    return Finding(State.FAILED, str(error), remedy_for(error))


def judge_clock(skew_s: float | None) -> list[Finding]:
    """``skew_s``: how far Prism's clock is ahead of this host's; None where it did not say."""
    if skew_s is None or abs(skew_s) <= SKEW_MAX_S:
        return []
    where = "ahead of" if skew_s > 0 else "behind"
    return [
        Finding(
            State.WARNING,
            f"Prism's clock is {abs(skew_s):.0f} s {where} this host's",
            "let both take their time from NTP: tokens and the expiry of snapshots depend on it",
        )
    ]


def chosen(clusters: Sequence[Cluster], wanted: str) -> list[Cluster]:
    """The clusters to look at: the one that ``cluster`` names, all without it."""
    return [each for each in clusters if not wanted or wanted in {each.uuid, each.name}]


def judge_clusters(clusters: Sequence[Cluster], wanted: str) -> list[Finding]:
    """Whether there is a cluster to work with. One that is not the only one may be away: the others go on."""
    if not clusters:
        return [
            Finding(
                State.FAILED,
                "Prism knows no AHV cluster",
                "register a cluster with Prism Central, or give the account a role on it (View_Cluster)",
            )
        ]
    ours = chosen(clusters, wanted)
    if not ours:
        names = ", ".join(each.name for each in clusters[:_NAMES_MAX])
        return [
            Finding(
                State.FAILED,
                f"there is no cluster {wanted}; there are {names}",
                "set cluster to one of these names, or to its UUID",
            )
        ]
    bad = State.WARNING if any(each.available for each in ours) else State.FAILED
    found = []
    for each in ours:
        version = f", AOS {each.version}" if each.version else ""
        if each.available:
            found.append(Finding(State.OK, f"{each.name}: available, NORMAL{version}"))
        else:
            found.append(
                Finding(
                    bad,
                    f"{each.name}: not available, or not in mode NORMAL{version}",
                    "look at the cluster's alerts in Prism; what is on it cannot be protected meanwhile",
                )
            )
    return found


def judge_access(access: Sequence[Access]) -> list[Finding]:
    """One finding for each duty: what the account lacks, what cannot be seen, or that it has all; and each other obstacle."""
    found = []
    for duty in dict.fromkeys(item.duty for item in access):
        items = [item for item in access if item.duty == duty]
        obstacles = [item for item in items if item.granted is False and item.remedy]
        lacking = [item for item in items if item.granted is False and not item.remedy]
        found += [
            Finding(State.FAILED, f"{duty}: {each.detail}", each.remedy) for each in obstacles
        ]
        unseen = [item for item in items if item.granted is None]
        if lacking:
            names = _names(lacking) or "a permission"
            found.append(
                Finding(
                    State.FAILED,
                    f"{duty}: the account lacks {names} ({lacking[0].detail})",
                    f"give the account a role that holds {names}, on the clusters that are protected",
                )
            )
        elif unseen:
            names = _names(unseen)
            what = f" ({names})" if names else ""
            found.append(
                Finding(
                    State.WARNING,
                    f"{duty}: cannot be seen in full{what}: {unseen[0].detail}",
                    "if a job fails with a missing permission, give the account's role that one",
                )
            )
        elif not obstacles:
            found.append(Finding(State.OK, f"{duty}: {items[-1].detail}"))
    return found or [Finding(State.WARNING, "Prism told nothing of the account's rights")]


def _names(items: Iterable[Access]) -> str:
    """All that they lack, each once."""
    names = [name for item in items if item.lacks for name in item.lacks.split(", ")]
    return ", ".join(dict.fromkeys(names))


def no_data_services(cluster: str) -> Finding:
    """A cluster without an address for iSCSI."""
    return Finding(
        State.FAILED,
        f"{cluster}: it has no data services address (DSIP)",
        "set the iSCSI Data Services IP in the cluster's details in Prism, or give dsip",
    )


def no_rest_by_v4() -> Finding:
    """Disks are to be read over REST alone, and the interface that is spoken cannot."""
    return Finding(
        State.FAILED,
        "data_path = rest cannot be had: Prism speaks v4, which makes no image of a snapshot's disk",
        "set data_path = iscsi or prism_api_version = v3",
    )


def soften(findings: Sequence[Finding], *, enough: bool) -> list[Finding]:
    """``enough``: another cluster works, so that what failed for one is a warning."""
    if not enough:
        return list(findings)
    return [
        Finding(State.WARNING, each.text, each.remedy) if each.state is State.FAILED else each
        for each in findings
    ]


__all__ = [
    "Finding",
    "Probe",
    "Report",
    "State",
    "chosen",
    "failed",
    "judge_access",
    "judge_clock",
    "judge_clusters",
    "no_data_services",
    "no_rest_by_v4",
    "remedy_for",
    "soften",
    "worst",
]
