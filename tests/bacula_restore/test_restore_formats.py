# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images in the formats of other platforms, made by the real qemu-img and read back by it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from bacula_adapter.backend.interface import RestoredFile
from bacula_adapter.description import encode_object
from bacula_adapter.restore import convert, open_restore
from replicator.errors import DamageError, RefusedError, StateError
from tests.bacula_restore.lab import (
    Bacula,
    Machine,
    chain,
    config_in,
    everything_below,
    noise,
    out_of,
    restore,
    restore_job,
)

FORMATS = pytest.mark.parametrize("form", sorted(convert.FORMATS))


def qemu_img(*arguments: object) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return done.stdout


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    return found


@FORMATS
async def test_what_was_restored_is_in_the_format(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    machine = chain()
    part = machine.parts[-1]
    await restore(tmp_path, machine.parts, config=config_in(tmp_path, target_format=form))
    for disk, image in part.images.items():
        path = out_of(tmp_path, part, disk, form)
        found = info(path)
        assert found["format"] == convert.FORMATS[form].driver
        # Whole sectors, at least.
        assert found["virtual-size"] >= len(image)
        assert found["virtual-size"] - len(image) < 1 << 20
        raw = tmp_path / "raw"
        qemu_img("convert", "-f", found["format"], "-O", "raw", path, raw)
        assert raw.read_bytes()[: len(image)] == image
        assert not any(raw.read_bytes()[len(image) :])
        assert path.stat().st_mtime == part.description.taken_at_us // 1_000_000
    assert len(everything_below(tmp_path)) == 3
    assert f"converted to {form}, checked" in caplog.text


async def test_a_vmdk_is_one_file(tmp_path: Path) -> None:
    machine = chain()
    await restore(tmp_path, machine.parts, config=config_in(tmp_path, target_format="vmdk"))
    found = info(out_of(tmp_path, machine.parts[-1], "disk-0", "vmdk"))
    assert found["format-specific"]["data"]["create-type"] == "monolithicSparse"


async def test_a_vhd_has_exactly_the_disks_size(tmp_path: Path) -> None:
    machine = Machine()
    machine.disks["disk-0"] = bytearray(5 * 1000 * 1000 * 512 // 512 // 512 * 512)
    part = machine.backup("F")
    await restore(tmp_path, machine.parts, config=config_in(tmp_path, target_format="vhd"))
    found = info(out_of(tmp_path, part, "disk-0", "vhd"))
    assert found["virtual-size"] == len(part.images["disk-0"])


async def test_a_disk_too_large_for_the_format_is_refused_before_its_data_come(
    tmp_path: Path,
) -> None:
    part = chain().parts[0].description
    size = 3 << 40
    large = msgspec.structs.replace(
        part, disks=(msgspec.structs.replace(part.disks[0], size=size),)
    )
    config = config_in(tmp_path, target_format="vhd")
    out = tmp_path / "out"
    async with open_restore(restore_job(str(out)), config) as handler:
        await handler.restore_object(f"replicator/{part.uuid}", 25, 1, encode_object(large))
        with pytest.raises(RefusedError, match="vhd holds at most 2040 GiB, the disk has 3072 GiB"):
            await handler.create(
                RestoredFile(name=f"{out}/{part.disks[0].file}", size=size, mtime_s=0)
            )


async def test_without_qemu_img_nothing_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = config_in(tmp_path, target_format="qcow2")
    with pytest.raises(
        RefusedError, match="qemu-img is not installed: install the package qemu-ut"
    ):
        await restore(tmp_path, chain().parts, config=config)
    assert everything_below(tmp_path) == []


def fake_qemu_img(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A qemu-img that goes wrong in one thing, before the real one."""
    real = subprocess.run(["which", "qemu-img"], check=True, capture_output=True, text=True)
    path = folder / "bin" / "qemu-img"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nreal={real.stdout.strip()}\n{script}\nexec "$real" "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


async def test_a_conversion_that_changes_a_byte_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
if [ "$1" = convert ]; then
    "$real" "$@" || exit
    for last; do :; done
    qemu-io -f qcow2 -c "write -P 7 0 512" "$last" >/dev/null
    exit
fi"""
    fake_qemu_img(tmp_path, monkeypatch, script)
    config = config_in(tmp_path, target_format="qcow2")
    with pytest.raises(DamageError, match=r"the converted image differs .*mismatch at offset 0"):
        await restore(tmp_path, chain().parts, config=config)
    assert everything_below(tmp_path) == []


async def test_what_qemu_img_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu_img(
        tmp_path,
        monkeypatch,
        '[ "$1" = check ] && { echo one >&2; printf "the \\033 end\\n\\n" >&2; exit 2; }',
    )
    config = config_in(tmp_path, target_format="qcow2")
    with pytest.raises(StateError, match="qemu-img check: the   end"):
        await restore(tmp_path, chain().parts, config=config)
    assert everything_below(tmp_path) == []


async def test_a_restore_that_is_cancelled_ends_qemu_img(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    fake_qemu_img(
        tmp_path, monkeypatch, f'[ "$1" = convert ] && {{ echo $$ > {told}; exec sleep 1000; }}'
    )
    machine = chain()
    bacula = Bacula(str(tmp_path / "out"))
    config = config_in(tmp_path, target_format="vhdx")
    pids: list[str] = []

    async def cancel(scope: trio.CancelScope) -> None:
        pids.append((await trio.to_thread.run_sync(told.read_text)).strip())
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel, nursery.cancel_scope)
        async with open_restore(restore_job(bacula.where), config) as handler:
            await bacula.give(handler, machine.parts)
            await handler.finish()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0]), 0)
    assert everything_below(tmp_path) == []


async def test_progress_is_told_of_large_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    raw, made = tmp_path / "raw", tmp_path / "made"
    with raw.open("wb") as file:
        file.truncate(1 << 30)
        for at in range(0, 1 << 30, 1 << 25):
            file.seek(at)
            file.write(noise(at, 70_000))
    await convert.convert(raw, made, "qcow2", title="disk-0 of VM web", size=1 << 30)
    for text in ("disk-0 of VM web: qcow2: 25 %", "disk-0 of VM web: comparison: 75 %"):
        assert text in caplog.text
    assert "100 %" not in caplog.text
