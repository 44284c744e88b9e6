# SPDX-License-Identifier: AGPL-3.0-or-later
"""Options that an operator has set at a restore (Bacula's *mod*, Plugin Options): what is offered, and what comes back. Pure.

What comes back overrides the configuration, through the one model. It comes by way of the catalogue, so it is checked first.
"""

from __future__ import annotations

import re
from typing import Final

from bacula_adapter.backend.params import with_options
from replicator.config import Config
from replicator.errors import DamageError, UsageError

#: The name of both objects.
OPTIONS_NAME: Final = "RestoreOptions"
_MAX: Final = 64 << 10

#: Key, Bacula's kind of value, and the question that the console asks. At most 32.
_OFFERED: Final = (
    ("restore_vm_name", "STR", "Name of the restored VM (default: its name and -restored)"),
    ("target_cluster", "STR", "Cluster to restore to, name or UUID (default: where it came from)"),
    ("target_container", "STR", "Storage container, name or UUID (default: where it came from)"),
    ("network_map", "STR", "Subnets, source=target between commas"),
    ("restore_disks_only", "STR", "Only these disks: disk-0,disk-2"),
    ("vcpu", "PINT32", "Virtual CPUs (default: as it was)"),
    ("memory_mib", "PINT32", "Memory in MiB (default: as it was)"),
    ("power_on", "BOOL", "Power the VM on at the end"),
    ("cross_restore", "BOOL", "Restore to Nutanix what came from another platform"),
    ("target_format", "STR", "Format of images with where=/path: raw, qcow2, vmdk, vhd, vhdx"),
)
KEYS: Final = frozenset(key for key, _, _ in _OFFERED)
_LINE = re.compile(r"([A-Za-z0-9_-]{1,64})\s*=\s*(.*)")


def options_text() -> str:
    """What a backup offers (type 27), in Bacula's form; of a length that no catalogue damages (bacula.md, section 7)."""
    groups = [
        f'OptPrompt="{prompt}"\nOptRequired=no\n{key}=@{kind}@\n\n'
        for key, kind, prompt in _OFFERED
    ]
    text = "# Plugin configuration file\n# Version 1\n" + "".join(groups)
    return text + "\n" * (-len(text) % 3)


def parse_options(data: bytes) -> dict[str, str]:
    """What was set (type 28). Raises DamageError where a catalogue has damaged it, UsageError for what cannot be set."""
    text = data.decode("utf-8", "replace").strip("\0")
    if not text.startswith("#") or len(data) > _MAX:
        raise DamageError(
            "the options of this restore are damaged in Bacula's catalogue (SQLite with 9.6 does that to some lengths): change"
            " one of the values in length, or set them in the plugin's configuration"
        )
    values: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DamageError(
                f"the options of this restore hold a line that is none: {line[:40]!r}"
            )
        key = match[1].removeprefix("--").replace("-", "_")
        if key not in KEYS:
            raise UsageError(f"{key}: no option of a restore")
        values[key] = _unquoted(match[2])
    return values


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1]).strip()
    return value.strip()


def apply_options(config: Config, data: bytes) -> Config:
    """The configuration with the options on top. Raises as ``parse_options``; an empty value is as not set."""
    given = {key: value for key, value in parse_options(data).items() if value}
    return with_options(config, given) if given else config


__all__ = ["KEYS", "OPTIONS_NAME", "apply_options", "options_text", "parse_options"]
