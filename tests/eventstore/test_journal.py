# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from eventsourcing.persistence import DataError, InternalError, OperationalError, ProgrammingError
from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore import Journal, LMDBEnvironment, journal

KEYS = st.text(alphabet="ab/é\U0001f40d", min_size=1, max_size=4)
CHANGES = st.lists(
    st.tuples(st.dictionaries(KEYS, st.binary(max_size=5), max_size=3), st.sets(KEYS, max_size=3)),
    max_size=6,
)


def test_entries_survive_the_handle_and_leave_when_deleted(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as first:
        work = Journal(first, "work")
        work.put("snapshot/1", b"one")
        work.put("snapshot/1", b"two")
        work.put("group/1", b"")
        work.delete("group/1")
        work.delete("never there")
    with LMDBEnvironment.open(tmp_path / "events") as second:
        work = Journal(second, "work")
        assert work.items() == [("snapshot/1", b"two")]
        assert work.get("snapshot/1") == b"two"
        assert work.get("group/1") is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(changes=CHANGES, prefix=st.text(alphabet="ab/é", max_size=2))
def test_items_are_those_of_a_dictionary_in_byte_order(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[dict[str, bytes], set[str]]],
    prefix: str,
) -> None:
    model: dict[str, bytes] = {}
    with LMDBEnvironment.open(tmp_path_factory.mktemp("journal") / "events") as opened:
        work = Journal(opened, "work")
        for puts, deletes in changes:
            if puts.keys() & deletes:
                with pytest.raises(ProgrammingError):
                    work.change(puts, deletes)
                continue
            work.change(puts, deletes)
            for key in deletes:
                model.pop(key, None)
            model |= puts
        expected = sorted(
            (item for item in model.items() if item[0].startswith(prefix)),
            key=lambda item: item[0].encode(),
        )
        assert work.items(prefix) == expected
        assert {key: work.get(key) for key in model} == model


def test_journals_of_different_names_are_apart(environment: LMDBEnvironment) -> None:
    Journal(environment, "a").put("k", b"1")
    assert Journal(environment, "b").items() == []


@pytest.mark.parametrize("key", ["", "k" * 401, "é" * 201, "\ud800"])
def test_a_key_out_of_bounds_changes_nothing(environment: LMDBEnvironment, key: str) -> None:
    work = Journal(environment, "work")
    with pytest.raises(DataError, match="journal key"):
        work.change(puts={"good": b"", key: b""})
    with pytest.raises(DataError, match="journal key"):
        work.change(puts={"good": b""}, deletes=[key])
    with pytest.raises(DataError, match="journal key"):
        work.get(key)
    assert work.items() == []


def test_the_longest_key_and_value_fit(environment: LMDBEnvironment) -> None:
    work = Journal(environment, "work")
    work.put("k" * 400, b"v" * (1 << 20))
    assert work.items("k" * 400) == [("k" * 400, b"v" * (1 << 20))]
    with pytest.raises(DataError, match="is over"):
        work.put("k", b"v" * ((1 << 20) + 1))


@pytest.mark.parametrize("name", ["", "a/b", "n" * 101])
def test_a_bad_name_is_refused(environment: LMDBEnvironment, name: str) -> None:
    with pytest.raises(ProgrammingError):
        Journal(environment, name)


def test_entries_that_nobody_settles_are_bounded_and_can_still_be_settled(
    environment: LMDBEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ENTRIES_MAX", 2)
    work = Journal(environment, "work")
    work.change(puts={"a": b"", "b": b""})
    with pytest.raises(OperationalError, match="nobody settles"):
        work.put("c", b"")
    work.change(puts={"c": b""}, deletes=["a"])
    assert [key for key, _ in work.items()] == ["b", "c"]


def test_an_entry_that_was_changed_on_the_disk_is_not_believed(
    environment: LMDBEnvironment,
) -> None:
    work = Journal(environment, "work")
    work.put("snapshot/1", b"delete me")
    database = environment.database("journal/work")
    row = environment.read(lambda txn: txn.get(b"snapshot/1", db=database))
    assert row is not None
    environment.write(lambda txn: txn.put(b"snapshot/1", row[:-1] + b"E", db=database))
    with pytest.raises(InternalError, match="'snapshot/1' is damaged"):
        work.get("snapshot/1")
    # The same bytes under another name would undo something that is not ours.
    environment.write(lambda txn: txn.put(b"snapshot/2", row, db=database))
    with pytest.raises(InternalError, match="'snapshot/2' is damaged"):
        work.items("snapshot/2")
