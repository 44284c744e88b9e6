# SPDX-License-Identifier: AGPL-3.0-or-later
"""Descriptions and names: they come back as they were, in whatever a catalogue does to them, or not at all."""

from __future__ import annotations

import random
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacula_adapter.description import (
    OBJECT_MAX,
    Description,
    PartDisk,
    decode_file,
    decode_object,
    encode_file,
    encode_object,
)
from bacula_adapter.names import VirtualName, find_name, parse_name
from replicator.errors import DamageError, RefusedError, StateError
from replicator.hardware import DiskSlot, Hardware, Nic
from tests.bacula_restore.lab import chain

UUID = "6f0a3c1e-2c55-5c7e-9d5e-7b1f0f3a9d21"


def described(count: int, *, noisy: bool = True, **values: Any) -> Description:
    dice = random.Random(count)
    vm = values.get("vm", "web")
    made = tuple(
        PartDisk(
            disk=f"disk-{number}",
            identity=f"id-{number}",
            size=1 << 40,
            kind="full",
            file=f"@nutanix/{vm}/disks/disk-{number}.raw",
            root=dice.randbytes(32) if noisy else bytes(32),
        )
        for number in range(count)
    )
    fields: dict[str, Any] = {
        "root_name": "@nutanix",
        "vm": vm,
        "uuid": UUID,
        "number": 1,
        "part": "0123abcd",
        "chain": "Nightly",
        "job": "Nightly.2026-11-25_10.00.00_03",
        "job_id": 7,
        "level": "F",
        "taken_at_us": 1_700_000_000_000_000,
        "grain": 65536,
        "algorithm": 1,
        "disks": made,
    }
    return Description(**{**fields, **values})


@pytest.mark.parametrize("disks", [0, 1, 2, 3, 4, 7, 40, 500, 5000])
@pytest.mark.parametrize("noisy", [True, False])
def test_an_object_is_what_every_catalogue_keeps(disks: int, noisy: bool) -> None:
    part = described(disks, noisy=noisy)
    data = encode_object(part)
    assert len(data) % 3 == 0, "SQLite and 9.6.7 damage others"
    assert len(data) < OBJECT_MAX
    if len(data) > 1000:  # what the file daemon does then
        assert all(len(zlib.compress(data, level)) >= len(data) for level in range(1, 10))
    assert decode_object(data) == part
    assert decode_file(encode_file(part)) == part


@given(st.text(min_size=1, max_size=60), st.integers(0, 30))
def test_any_text_comes_back(text: str, nics: int) -> None:
    hardware = Hardware(
        platform="nutanix",
        uuid=UUID,
        name=text,
        description=text * 20,
        nics=tuple(Nic(subnet=text, mac="50:6b:8d:00:00:01") for _ in range(nics)),
        disks=(DiskSlot(identity="id-0", bus="scsi", index=0, size=1 << 40),),
    )
    part = described(1, hardware=hardware)
    data = encode_object(part)
    assert len(data) % 3 == 0
    assert decode_object(data) == decode_file(encode_file(part)) == part


def test_one_that_is_too_long_names_the_vm() -> None:
    dice = random.Random(1)
    names = ["".join(chr(dice.randrange(0x4E00, 0x9FFF)) for _ in range(240)) for _ in range(3000)]
    nics = tuple(Nic(subnet=name) for name in names)
    part = described(1, hardware=Hardware(platform="x", uuid=UUID, name="x", nics=nics))
    with pytest.raises(RefusedError, match=r"VM web \(1 disks\) has [0-9]+ bytes, compressed"):
        encode_object(part)


def test_every_flipped_bit_is_found() -> None:
    part = chain().parts[-1].description
    for encode, decode in ((encode_object, decode_object), (encode_file, decode_file)):
        data = encode(part)
        for at in range(0, len(data) - 3, 7):
            harmed = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
            try:
                assert decode(harmed) == part
            except (DamageError, StateError):
                continue


@given(st.binary(max_size=3000))
def test_garbage_is_damage(data: bytes) -> None:
    for decode in (decode_object, decode_file):
        with pytest.raises(DamageError, match="damaged in"):
            decode(data)


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zlib.compress(bytes(50 << 20), 9)
    for _ in range(3):
        with pytest.raises(DamageError, match=r"another length|bytes"):
            decode_object(bomb)
        bomb = zlib.compress(bomb, 9)


def test_a_later_version_is_named() -> None:
    data = encode_file(described(1)).replace(b"description 1 ", b"description 2 ")
    with pytest.raises(StateError, match="version 2 is in the backup, this program reads 1"):
        decode_file(data)


INVALID: tuple[dict[str, Any], ...] = (
    {"version": 2},
    {"root_name": "@etc"},
    {"vm": ".."},
    {"vm": "a/b"},
    {"vm": "a\nb"},
    {"uuid": "no"},
    {"uuid": UUID.upper()},
    {"number": 0},
    {"number": 10**10},
    {"part": "0123ABCD"},
    {"part": "0123abcd", "parent": "0123abcd"},
    {"parent": "x"},
    {"parent_job": "a\x00"},
    {"job": "x" * 256},
    {"job_id": -1},
    {"taken_at_us": 1 << 63},
    {"grain": 65537},
    {"grain": 2 << 20},
    {"algorithm": 3},
    {"point": -1},
)


@pytest.mark.parametrize("values", INVALID, ids=str)
def test_only_valid_ones_can_be_built(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        described(0, **values)


DISK: dict[str, Any] = {
    "disk": "disk-0",
    "identity": "i",
    "size": 1,
    "kind": "full",
    "file": "@nutanix/web/disks/disk-0.raw",
    "root": bytes(32),
}


@pytest.mark.parametrize(
    "values",
    [
        {"disk": "disk-00000"},
        {"disk": "x"},
        {"size": 0},
        {"size": (1 << 50) + 1},
        {"bytes": -1},
        {"root": b"short"},
        {"base_root": bytes(32)},
        {"kind": "delta"},
        {"identity": "a\nb"},
    ],
    ids=str,
)
def test_only_valid_disks_can_be_built(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        PartDisk(**{**DISK, **values})


def test_disks_must_be_in_files_of_their_part() -> None:
    delta = PartDisk(
        **{
            **DISK,
            "kind": "delta",
            "base_root": bytes(32),
            "file": "@nutanix/web/disks/disk-0.000001-0123abcd.phcbt",
        }
    )
    assert described(0, disks=(delta,), parent="00000000").disk("disk-0") == delta
    for disks, more in (
        ((delta,), {}),  # no parent
        ((delta,), {"parent": "00000000", "number": 2}),
        ((delta,), {"parent": "00000000", "part": "aaaaaaaa"}),
        ((delta,), {"parent": "00000000", "vm": "db"}),
        ((PartDisk(**DISK), PartDisk(**DISK)), {}),
        ((msgspec.structs.replace(PartDisk(**DISK), disk="disk-1"),), {}),
    ):
        with pytest.raises(ValueError, match=r".+"):
            described(0, disks=disks, **more)


@given(
    st.sampled_from(["raw", "delta", "description"]),
    st.text(min_size=1, max_size=20),
    st.integers(0, 9999),
    st.integers(1, 10**10 - 1),
    st.integers(0, 2**32 - 1),
)
def test_names_and_back(kind: Any, vm: str, disk: int, number: int, part: int) -> None:
    numbers = (0, "") if kind == "raw" else (number, f"{part:08x}")
    name = VirtualName("@qemu", vm, kind, "" if kind == "description" else f"disk-{disk}", *numbers)
    found = parse_name(str(name))
    if found is None:
        assert vm in (".", "..") or "/" in vm or any(ord(c) < 32 for c in vm)
        return
    assert found == name
    for before in ("", "/x", "/x/@qemu/y", "/"):
        text = f"{before.rstrip('/')}/{name}" if before else str(name)
        assert find_name(text) == (before, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@nutanix",
        "@nutanix/web/disks/disk-0.img",
        "@nutanix/web/disks/disk-0.1-0123abcd.phcbt",
        "@nutanix/web/disks/disk-0.0000001-0123abcd.phcbt",
        "@nutanix/web/description.json",
        "@NUTANIX/web/disks/disk-0.raw",
        "@nutanix/web/disks/disk-0.raw\n",
        "@nutanix//disks/disk-0.raw",
    ],
)
def test_other_names_are_none_of_ours(text: str) -> None:
    assert parse_name(text) is None
    assert find_name(f"/x/{text}") is None
