# SPDX-License-Identifier: AGPL-3.0-or-later
"""The page and the code say the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID

import blake3
import pytest
import xxhash

from replicator.phcbt import Algorithm, StreamHeader, encode_data, zero_record
from tests.phcbt.support import GRAIN, events_of, write_stream

PAGE = Path(__file__).parents[2] / "docs" / "phcbt01.md"


def example_from_page() -> bytes:
    blocks = re.findall(r"```hex\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    return bytes.fromhex("".join(blocks))


def test_the_worked_example_is_what_the_code_writes() -> None:
    header = StreamHeader(
        algorithm=Algorithm.XXH3_128,
        grain=4096,
        chunk=8192,
        disk_size=4101,
        vm=UUID("00112233-4455-6677-8899-aabbccddeeff"),
        base_point=0,
        target_point=1,
        base_root=bytes(32),
        disk_id="disk-0",
    )
    records = [zero_record(header, 0, 4096), encode_data(header, 4096, b"hello", None)]
    data = write_stream(header, records)
    assert data == example_from_page()
    assert len(data) == 421
    kinds = [type(event).__name__ for event in events_of(data)]
    assert kinds == ["Header", "ZeroRecord", "DataRecord", "IndexRecord", "End"]


def test_digests_are_the_libraries_over_padded_grains_and_zero_is_reserved() -> None:
    plain = b"a" * GRAIN + bytes(GRAIN) + b"tail"
    padded = b"tail" + bytes(GRAIN - 4)
    assert Algorithm.XXH3_128.digest_grains(plain, GRAIN) == (
        xxhash.xxh3_128_digest(b"a" * GRAIN) + bytes(16) + xxhash.xxh3_128_digest(padded)
    )
    assert Algorithm.BLAKE3_256.digest_grains(plain, GRAIN) == (
        blake3.blake3(b"a" * GRAIN).digest() + bytes(32) + blake3.blake3(padded).digest()
    )
    # A short last grain of zeros is a grain of zeros.
    assert Algorithm.XXH3_128.digest_grains(bytes(GRAIN + 1), GRAIN) == bytes(32)


def test_a_real_digest_that_comes_out_zero_is_told_from_zeros(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("replicator.phcbt.format._xxh3_128", lambda _: bytes(16))
    assert Algorithm.XXH3_128.digest_grains(b"a" * GRAIN, GRAIN) == bytes(15) + b"\x01"
