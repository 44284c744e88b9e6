# SPDX-License-Identifier: AGPL-3.0-or-later
"""From bytes that are right to bytes that are not: flip, cut, repeat, swap, insert, and lie in a length."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import strategies as st

from replicator.phcbt.format import Codec, Kind, RecordHead, StreamHeader

#: Numbers at which something changes.
EDGES = (0, 1, 2, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 1 << 20, (1 << 20) + 1, 1 << 31, (1 << 32) - 1,
         1 << 48, 1 << 50, 1 << 60, 1 << 63, (1 << 64) - 1)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """One of the samples after one to five changes."""
    data = bytearray(draw(st.sampled_from(list(samples))))
    for _ in range(draw(st.integers(1, 5))):
        _change(draw, data)
    return bytes(data)


def _change(draw: st.DrawFn, data: bytearray) -> None:
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.integers(0, 3000)))
    match draw(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "swap", "insert", "number"])
    ):
        case "flip" if start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        case "set" if start < len(data):
            data[start] = draw(st.integers(0, 255))
        case "cut":
            del data[start:]
        case "drop":
            del data[start:end]
        case "repeat":
            data[start:start] = data[start:end]
        case "swap":
            middle = draw(st.integers(start, end))
            data[start:end] = data[middle:end] + data[start:middle]
        case "insert":
            data[start:start] = draw(st.binary(max_size=50))
        case "number":
            form = draw(st.sampled_from([">H", ">I", ">Q"]))
            number = draw(st.sampled_from(EDGES)) % (1 << 8 * struct.calcsize(form))
            if start + struct.calcsize(form) <= len(data):
                struct.pack_into(form, data, start, number)


cuts = st.lists(st.integers(0, 1 << 17), max_size=12)

_SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*EDGES, -1, -(1 << 63), 0.5, float("nan")]),
    st.sampled_from(["", "web", "../x", "/", "a\0b", "a\nb", "x" * 300, "1" * 16, "disk-0", "disk-99999", "\ud7ff"]),
    st.sampled_from([b"", b"\0" * 32, b"x" * 31, b"x" * 9000]),
)  # fmt: skip


@st.composite
def mutated_message(draw: st.DrawFn, bodies: Sequence[bytes]) -> bytes:
    """One of the bodies, still MessagePack, with values changed, left out or added at any depth."""
    value = msgspec.msgpack.decode(draw(st.sampled_from(list(bodies))))
    for _ in range(draw(st.integers(1, 4))):
        value = _change_value(draw, value)
    return msgspec.msgpack.encode(value)


def _change_value(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3), st.just([[]] * 300)))
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        changed = [*value]
        changed[at] = _change_value(draw, value[at])
        return draw(st.sampled_from([changed, value * 2, value[:at], [*value, value]]))
    key = draw(st.sampled_from(sorted(value)))
    rest = {name: each for name, each in value.items() if name != key}
    return draw(
        st.sampled_from(
            [value | {key: _change_value(draw, value[key])}, rest, value | {"new": value}]
        )
    )


@st.composite
def lying_stream(draw: st.DrawFn, valid: bytes, header: StreamHeader) -> bytes:
    """A stream whose every check is right, whatever its records say: only its author can make it."""
    records = draw(st.lists(_record(header), min_size=1, max_size=6))
    start = header.encode()
    rest = valid[len(start) :] if draw(st.booleans()) else b""
    return start + b"".join(records) + rest


@st.composite
def _record(draw: st.DrawFn, header: StreamHeader) -> bytes:
    number = st.one_of(st.sampled_from(EDGES), st.integers(0, 40).map(lambda n: n * header.grain))
    kind, codec = draw(st.sampled_from(Kind)), draw(st.sampled_from(Codec))
    offset, length = draw(number), draw(number)
    guarded = draw(st.one_of(st.binary(max_size=100), st.just(b"\1" * 64)))
    payload = draw(st.binary(max_size=200))
    claimed = draw(st.sampled_from([len(payload), len(guarded), 0, 1 << 20, (1 << 32) - 1]))
    head = RecordHead.build(kind, codec, claimed, offset=offset, length=length, guarded=guarded)
    return head.raw + guarded + payload
