# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from eventsourcing.application import Application
from eventsourcing.persistence import Mapper

from eventstore.mapper import EventMapper
from eventstore.projector import fold
from tests.eventstore.accounts import TYPES, Account


class Bank(Application[UUID]):
    is_snapshotting_enabled = True
    snapshotting_intervals = {Account: 10}  # noqa: RUF012 - the library declares it so
    snapshotting_projectors = {Account: fold}  # noqa: RUF012 - the same

    def construct_mapper(self) -> Mapper[Any]:
        return EventMapper(types=TYPES)


def test_events_are_applied_in_their_order() -> None:
    class Appended:
        def __init__(self, letter: str) -> None:
            self.letter = letter

        def mutate(self, text: str | None) -> str:
            return (text or "") + self.letter

    assert fold(None, map(Appended, "abc")) == "abc"
    assert fold("x", iter(map(Appended, "yz"))) == "xyz"
    assert fold("as it was", []) == "as it was"


def test_what_cannot_be_applied_is_an_error() -> None:
    with pytest.raises(AttributeError):
        fold(None, [object()])


def test_an_application_replays_events_and_snapshots_with_it(tmp_path: Path) -> None:
    bank = Bank({"PERSISTENCE_MODULE": "eventstore", "LMDB_PATH": str(tmp_path)})
    account = Account(owner="eve")
    for cents in range(25):
        account.credit(cents, "salary")
        bank.save(account)
    whole = bank.repository.get(account.id, projector_func=fold)
    assert (whole.owner, whole.cents, whole.version) == ("eve", sum(range(25)), 26)
    assert whole == account
    assert bank.snapshots is not None
    taken = list(bank.snapshots.get(account.id))
    assert [snapshot.originator_version for snapshot in taken] == [10, 20]
    assert bank.repository.get(account.id, version=12, projector_func=fold).cents == sum(range(11))
    bank.close()
