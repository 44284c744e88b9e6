# SPDX-License-Identifier: AGPL-3.0-or-later
"""Options that an operator sets at a restore: what is offered, and what comes back through the catalogue."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bacula_adapter.restore import open_restore
from bacula_adapter.restore.options import KEYS, apply_options, options_text, parse_options
from replicator.config import Config, check
from replicator.errors import DamageError, UsageError
from tests.bacula_restore.lab import (
    Bacula,
    chain,
    config_in,
    noise,
    out_of,
    restore_job,
)


def test_what_is_offered_is_what_bacula_reads_and_the_configuration_knows() -> None:
    text = options_text()
    assert text.startswith("# Plugin configuration file\n# Version 1\n")
    assert len(text) % 3 == 0
    assert len(text) <= 1000, "the file daemon would compress it, and SQLite may damage that"
    groups = text.strip().split("\n\n")
    assert len(groups) == len(KEYS) <= 32
    fields = {field.name for field in msgspec.structs.fields(Config)}
    for group in groups:
        *_, assignment = group.splitlines()
        key, _, kind = assignment.partition("=")
        assert key in KEYS <= fields
        assert kind in ("@STR@", "@BOOL@", "@PINT32@")


ANSWERS = b"""# Plugin configuration file
# Version 1
# Name of the restored VM
restore_vm_name="web \\"two\\""
vcpu=4
--memory-mib = 2048
power_on=yes
network_map=""
"""


def test_what_was_set_overrides_the_configuration() -> None:
    before = check({"vcpu": "2", "network_map": "a=b", "restore_disks_only": "disk-1"})
    after = apply_options(before, ANSWERS)
    assert (after.restore_vm_name, after.vcpu, after.memory_mib) == ('web "two"', 4, 2048)
    assert after.power_on
    assert (after.network_map, after.restore_disks_only) == ("a=b", "disk-1")


@pytest.mark.parametrize("data", [b"", b"\0\0\0", noise(1, 60), b"vcpu=4\n", b"# x\n!!\n"])
def test_damaged_options_are_not_taken_for_none(data: bytes) -> None:
    with pytest.raises(DamageError, match="options of this restore"):
        parse_options(data)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("state_dir=/tmp", "state_dir: no option of a restore"),
        ("password=x", "password: no option"),
        ("vcpu=0", "vcpu: expected a whole number"),
        ("target_format=iso", "target_format: expected one of"),
        ("power_on=perhaps", "power_on: expected yes or no"),
    ],
)
def test_what_cannot_be_set_is_named(line: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        apply_options(check({}), f"# x\n{line}\n".encode())


async def test_options_come_with_the_objects(tmp_path: Path) -> None:
    machine = chain()
    part = machine.parts[-1]
    bacula = Bacula(str(tmp_path / "out"))
    async with open_restore(restore_job(bacula.where), config_in(tmp_path)) as handler:
        text = b'# x\nrestore_disks_only="disk-1"\ntarget_format=qcow2\n'
        await handler.restore_object("RestoreOptions", 28, 9, text)
        await bacula.give(handler, machine.parts)
        await handler.finish()
        await handler.conclude("T")
    assert out_of(tmp_path, part, "disk-1", "qcow2").exists()
    assert not out_of(tmp_path, part, "disk-0", "qcow2").exists()


async def test_damaged_options_end_the_restore(tmp_path: Path) -> None:
    async with open_restore(restore_job("/tmp"), config_in(tmp_path)) as handler:
        with pytest.raises(DamageError, match="options of this restore"):
            await handler.restore_object("RestoreOptions", 28, 9, noise(2, 66))
