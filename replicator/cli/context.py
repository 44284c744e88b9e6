# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every command is handed: where the configuration is, and how to answer.

Loads the configuration's module with the configuration: `replctl --version` needs neither.
"""

from __future__ import annotations

import json as jsonlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.errors import UsageError

if TYPE_CHECKING:
    from replicator.config import Config

_logger = logging.getLogger(__name__)

#: The command that tries again for ever: a certificate may be renewed under it.
_LIVES_ON = "run"


@dataclass(slots=True)
class CliContext:
    """``ctx.obj`` of every command. ``json``: stdout carries JSON and nothing else."""

    config_path: Path
    json: bool
    #: Whether the answer is on stdout already: then an error does not put a second object there.
    answered: bool = field(default=False, init=False)
    _config: Config | None = field(default=None, init=False)
    _idle_keys: list[str] = field(default_factory=list, init=False)

    def config(self) -> Config:
        """The configuration, read and checked at the first call; logging follows its ``verbose``. Raises UsageError."""
        if self._config is None:
            from replicator.cli.logs import configure  # noqa: PLC0415 - see the module's docstring
            from replicator.config import load_noting  # noqa: PLC0415 - the same

            self._config, self._idle_keys = load_noting(self.config_path)
            configure(self._config.verbose)
        return self._config

    def source_config(self) -> Config:
        """The configuration of a host that pushes, for the command that is called: what it can be refused for is looked at.

        Raises UsageError where ``metrics_listen`` cannot be had or this side's certificate does not hold, and on a receiver.
        """
        config = self.config()
        command = click.get_current_context().info_name
        if not config.is_source:
            raise UsageError(
                f"{command} works where the VM is: run it on the source's host"
                f" (the configuration {self.config_path} names no receiver: dr_host)"
            )
        self.check_metrics()
        if command != _LIVES_ON and config.dr_auth_cert is not None:
            from replicator.credentials import check_own  # noqa: PLC0415 - only with certificates

            check_own(config)
        self.warn_of_idle_keys()
        return config

    def check_metrics(self) -> None:
        """Raise UsageError unless this host can listen on ``metrics_listen``, StateError where another process does."""
        from replicator.control.listening import check_listen  # noqa: PLC0415 - only for what runs

        config = self.config()
        if config.metrics_address is not None:
            host, port = config.metrics_address
            # A process that has this state directory may be the one that listens; its lock says so better.
            check_listen(host, port, "metrics_listen", busy_is_fine=config.state_dir.exists())

    def warn_of_idle_keys(self) -> None:
        """Log a line about each key that does nothing on this side. For commands that act on the configuration as a whole."""
        for line in self._idle_keys:
            _logger.warning("%s", line)

    def receiver_config(self, command: str) -> Config:
        """The configuration of a receiver. Raises UsageError on a source, where ``command`` cannot work."""
        config = self.config()
        if config.is_source:
            raise UsageError(
                f"{command} works where the recovery points are: run it on the receiver's host ({config.dr_host})"
            )
        return config

    @property
    def verbose(self) -> int:
        """The level, if the configuration was read; else that of errors only."""
        return self._config.verbose if self._config is not None else 0

    def print_json(self, value: Any) -> None:
        """One JSON document on stdout: the command's answer."""
        self.answered = True
        click.echo(jsonlib.dumps(value, ensure_ascii=False))


__all__ = ["CliContext"]
