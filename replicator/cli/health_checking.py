# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl health-check`: whether Prism, the account, the clusters and their data services are ready for a job."""

from __future__ import annotations

from typing import Any

import click
import trio

from replicator.addresses import parse_dsip
from replicator.cli.context import CliContext
from replicator.config import Config
from replicator.errors import ReplicatorError, StateError, UsageError
from replicator.health import Report, Wanted, check_health
from replicator.iscsi import Portal
from replicator.prism_access import initiator_name, prism_settings

#: Where this host has no name yet: discovery takes any, and a check makes nothing.
_NO_NAME_YET = "iqn.2026-01.internal.replicator:health-check"


@click.command("health-check")
@click.pass_obj
def health_check(context: CliContext) -> None:
    """Check that Prism is ready for a job.

    Five probes in order: TLS, the account, clusters, the account's rights, data services. Exit code 0: ready; 1: not ready; 2: the
    configuration is wrong. Changes nothing on the cluster.
    """
    wanted = wanted_of(context.config())
    report = trio.run(check_health, wanted)
    if context.json:
        context.print_json(health_report(report))
    else:
        from replicator.cli.render import show_health  # noqa: PLC0415 - only for a person

        show_health(health_report(report))
    if not report.ready:
        raise NotReadyError(f"Prism {report.prism} is not ready for a job")


class NotReadyError(ReplicatorError):
    """A probe failed, or could not be run."""


def wanted_of(config: Config) -> Wanted:
    """What a configuration wants checked; only its keys about Prism and iSCSI count. Raises UsageError."""
    if config.source != "nutanix":
        raise UsageError(f"health-check looks at Prism: source = {config.source} has none")
    portal = parse_dsip(config.dsip)
    return Wanted(
        settings=prism_settings(config),
        initiator=_initiator(config),
        data_services=None if portal is None else Portal(*portal),
        iscsi=config.data_path != "rest",
    )


def _initiator(config: Config) -> str:
    if not config.iscsi_initiator and not config.state_dir.is_dir():
        return _NO_NAME_YET
    try:
        return initiator_name(config)
    except StateError:
        return _NO_NAME_YET  # not this command's business: who looks need not be who runs jobs


def health_report(report: Report) -> dict[str, Any]:
    """The report as docs/json.md has it."""
    return {
        "ready": report.ready,
        "prism": report.prism,
        "api": report.api,
        "seconds": round(report.seconds, 3),
        "probes": [
            {
                "probe": probe.name,
                "state": str(probe.state),
                "seconds": round(probe.seconds, 3),
                "findings": [
                    {"state": str(each.state), "text": each.text, "remedy": each.remedy}
                    for each in probe.findings
                ],
            }
            for probe in report.probes
        ],
    }


__all__ = ["health_check"]
