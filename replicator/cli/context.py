# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every command is handed: where the configuration is, and how to answer.

Loads the configuration's module with the configuration: `replctl --version` needs neither.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replicator.errors import UsageError

if TYPE_CHECKING:
    from replicator.config import Config


@dataclass(slots=True)
class CliContext:
    """``ctx.obj`` of every command. ``json``: stdout carries JSON and nothing else."""

    config_path: Path
    json: bool
    #: Whether the answer is on stdout already: then an error does not put a second object there.
    answered: bool = field(default=False, init=False)
    _config: Config | None = field(default=None, init=False)

    def config(self) -> Config:
        """The configuration, read and checked at the first call; logging follows its ``verbose``. Raises UsageError."""
        if self._config is None:
            from replicator.cli.logs import configure  # noqa: PLC0415 - see the module's docstring
            from replicator.config import load  # noqa: PLC0415 - the same

            self._config = load(self.config_path)
            configure(self._config.verbose)
        return self._config

    def source_config(self) -> Config:
        """The configuration of a host that pushes. Raises UsageError elsewhere."""
        config = self.config()
        if not config.is_source:
            raise UsageError(
                f"configuration {self.config_path}: dr_host: missing; it names the receiver to push to"
            )
        return config

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
