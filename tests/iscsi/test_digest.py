# SPDX-License-Identifier: AGPL-3.0-or-later
"""CRC32C against RFC 7143's examples and against the definition, bit by bit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.iscsi.digest import crc32c


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        (bytes(32), "aa36918a"),
        (b"\xff" * 32, "43aba862"),
        (bytes(range(32)), "4e79dd46"),
        (bytes(range(31, -1, -1)), "5cdb3f11"),
    ],
)
def test_the_examples_of_the_rfc(data: bytes, digest: str) -> None:
    assert crc32c(data).to_bytes(4, "little").hex() == digest


def by_the_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.binary(max_size=300))
def test_short_data(data: bytes) -> None:
    assert crc32c(data) == by_the_bit(data)


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4096, 10_001, 65_536, 100_003])
def test_long_data_in_lanes(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == by_the_bit(data)
    assert crc32c(memoryview(data)) == crc32c(bytearray(data))
