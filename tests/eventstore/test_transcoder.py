# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from eventsourcing.persistence import DataError, MapperDeserialisationError
from hypothesis import given
from hypothesis import strategies as st

from eventstore.transcoder import MsgpackTranscoder

CODEC = MsgpackTranscoder()
STAMP = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC))
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 99), inner)
)


@given(VALUES)
def test_what_is_stored_comes_back(value: Any) -> None:
    assert CODEC.decode(CODEC.encode(value)) == value


def test_a_time_is_integers_since_the_epoch_in_utc() -> None:
    east = STAMP.astimezone(timezone(timedelta(hours=9)))
    assert CODEC.encode(east) == CODEC.encode(STAMP)
    assert len(CODEC.encode(STAMP)) == 10
    assert CODEC.decode(CODEC.encode(east)).tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (UUID(int=1), "UUID"),
        (Decimal("1.50"), "Decimal"),
        ((1, 2), "tuple"),
        ({1}, "set"),
        (STAMP.replace(tzinfo=None), "datetime"),
        (STAMP.date(), "date"),
        ({"deep": [1, {"er": [UUID(int=1)]}]}, "UUID"),
        (object(), "object"),
        (1 << 64, "int"),
        ("\ud800", "surrogates"),
    ],
)
def test_what_would_change_is_refused_and_named(value: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        CODEC.encode(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(DataError, match="cannot be stored"):
        CODEC.encode(endless)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_value_or_the_library_error(data: bytes) -> None:
    try:
        CODEC.decode(data)
    except MapperDeserialisationError as error:
        assert "MessagePack" in str(error)  # noqa: PT017 - both outcomes are right


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\xa1\xff", b"\x91" * 100_000 + b"\x01"])
def test_no_messagepack_is_the_library_error(data: bytes) -> None:
    with pytest.raises(MapperDeserialisationError, match="no MessagePack"):
        CODEC.decode(data)
