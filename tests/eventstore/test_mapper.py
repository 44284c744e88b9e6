# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import msgspec
import pytest
from eventsourcing.application import Application
from eventsourcing.cipher import AESCipher
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import (
    DataError,
    Mapper,
    MapperDeserialisationError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
)
from eventsourcing.utils import Environment
from hypothesis import given
from hypothesis import strategies as st

from eventstore.mapper import EventCipher, EventMapper
from eventstore.transcoder import MsgpackTranscoder
from eventstore.types import EventTypes, UnknownTopicError
from tests.eventstore.accounts import ACCOUNT, STAMP, TYPES, Account, AccountMapper

KEYS = {1: bytes(range(32)), 2: bytes(range(1, 33))}
PLAIN = EventMapper(types=TYPES)
SECRET = EventMapper(types=TYPES, cipher=EventCipher(KEYS, current=1))


def make(cls: Any, **attributes: Any) -> Any:
    """An event; the library does not tell the type checker what its classes take."""
    return cls(
        **{"originator_id": ACCOUNT, "originator_version": 7, "timestamp": STAMP} | attributes
    )


def credited(cents: Any = 150, reason: Any = "salary", *, at: datetime = STAMP) -> Any:
    return make(Account.Credited, timestamp=at, cents=cents, reason=reason)


def noted(note: Any, proof: Any = b"\x00\xff", who: Any = ACCOUNT) -> Any:
    return make(Account.Noted, note=note, proof=proof, who=who)


def stored(state: bytes, topic: str = "test:account.credited") -> StoredEvent:
    return StoredEvent(ACCOUNT, 7, topic, state)


def packed(*row: Any) -> StoredEvent:
    return stored(msgspec.msgpack.encode(row))


# Types


def test_an_aggregate_brings_its_events_its_snapshots_and_itself() -> None:
    assert TYPES.topics == {
        "test:account.opened",
        "test:account.credited",
        "test:account.noted",
        "eventsourcing.domain:Snapshot",
    }
    assert TYPES.resolve("test:account.credited") is Account.Credited
    assert TYPES.resolve("test:account") is Account
    assert TYPES.by_class(Account.Opened).fields == ("originator_topic", "owner")


def test_a_foreign_topic_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    created = msgspec.msgpack.encode([1, 0, "hostile_module:X", "eve"])
    snapshot = msgspec.msgpack.encode([1, 0, "hostile_module:X", {}])
    for state, topic in [
        (b"\x92\x01\x00", "hostile_module:X"),
        (created, "test:account.opened"),
        (snapshot, "eventsourcing.domain:Snapshot"),
    ]:
        with pytest.raises(UnknownTopicError, match="hostile_module:X"):
            PLAIN.to_domain_event(stored(state, topic))
    with pytest.raises(UnknownTopicError, match="hostile_module:X"):
        TYPES.resolve("hostile_module:X")
    assert "hostile_module" not in sys.modules


def test_a_created_event_names_an_aggregate_not_any_type() -> None:
    state = msgspec.msgpack.encode([1, 0, "test:account.credited", "eve"])
    with pytest.raises(UnknownTopicError, match=r"test:account\.credited"):
        PLAIN.to_domain_event(stored(state, "test:account.opened"))


def test_a_class_without_a_topic_of_its_own_is_refused() -> None:
    class Plain(Aggregate):
        pass

    class Inherits(Account.Noted):
        pass

    for cls in (Plain, Inherits):
        with pytest.raises(ProgrammingError, match="has no TOPIC of its own"):
            EventTypes(cls)


def test_a_nested_event_that_only_inherits_the_base_topic_is_refused() -> None:
    class Forgetful(Aggregate):
        TOPIC = "test:forgetful"

        class Event(Aggregate.Event):
            TOPIC = "test:forgetful.event"

    class Forgot(Forgetful.Event):
        more: int

    # In the class's body the library would refuse it first, saying that its topic is another's.
    Forgetful.Forgot = Forgot  # type: ignore[attr-defined]
    with pytest.raises(ProgrammingError, match="Forgot has no TOPIC of its own"):
        EventTypes(Forgetful)


def test_two_classes_of_one_topic_are_refused() -> None:
    class Other(Account.Noted):
        TOPIC = "test:account.noted"

    class Same(Account.Noted):
        TOPIC = "test:account"

    for other in (Other, Same):
        with pytest.raises(ProgrammingError, match="is used twice"):
            EventTypes(Account, other)
    assert EventTypes(Account, Account).topics == TYPES.topics


def test_versions_and_their_fields_must_fit() -> None:
    def declare(**attributes: Any) -> EventTypes:
        return EventTypes(type("Odd", (Account.Noted,), {"TOPIC": "test:odd", **attributes}))

    one: dict[int, tuple[str, ...]] = {1: ("old",)}
    upcast = staticmethod(lambda _: None)
    assert declare(class_version=2, FIELDS=one, upcast_v1_v2=upcast).topics == {"test:odd"}
    with pytest.raises(ProgrammingError, match="has no upcast_v1_v2"):
        declare(class_version=2, FIELDS=one)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"class_version": 2}, "FIELDS must list the versions 1..1"),
        ({"class_version": 1, "FIELDS": {3: ("old",)}}, "FIELDS must list"),
        ({"class_version": 128}, "not within 1..127"),
        ({"class_version": "2"}, "not within 1..127"),
        ({"FIELDS": {1: ("note",)}}, "are not its fields"),
        ({"class_version": 2, "FIELDS": {1: ("a", "a")}}, "repeat a name"),
        ({"class_version": 2, "FIELDS": {1: ("timestamp",)}}, "repeat a name"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ProgrammingError, match=message):
            declare(upcast_v1_v2=upcast, **wrong)


def test_the_order_of_the_fields_can_be_fixed_apart_from_the_declaration() -> None:
    class Turned(Account.Noted):
        TOPIC = "test:turned"
        FIELDS: ClassVar[dict[int, tuple[str, ...]]] = {1: ("who", "proof", "note")}

    event = make(Turned, note=1, proof=b"", who=ACCOUNT)
    mapper = EventMapper(types=EventTypes(Turned))
    whole = mapper.to_stored_event(event)
    assert msgspec.msgpack.decode(whole.state)[2:] == [ACCOUNT.bytes, b"", 1]
    assert mapper.to_domain_event(whole) == event


def test_only_event_classes_can_be_registered() -> None:
    class Thing:
        TOPIC = "test:thing"

    with pytest.raises(ProgrammingError, match="is not one of the library's event classes"):
        EventTypes(Thing)


# Plain states


def test_a_state_is_an_array_without_names() -> None:
    whole = PLAIN.to_stored_event(credited())
    assert whole == StoredEvent(ACCOUNT, 7, "test:account.credited", whole.state)
    assert msgspec.msgpack.decode(whole.state) == [2, 1_772_600_767_890_123, 150, "salary"]
    # Logs hold such bytes: they never change.
    assert whole.state.hex() == "9402cf00064c2bc71942cbcc96a673616c617279"


def test_an_event_comes_back_equal_with_its_time_in_utc() -> None:
    event = credited(at=STAMP.astimezone(timezone(timedelta(hours=9))))
    back = PLAIN.to_domain_event(PLAIN.to_stored_event(event))
    assert back == event
    assert (back.timestamp, back.timestamp.tzinfo) == (STAMP, UTC)
    assert vars(back).keys() == vars(event).keys()


@given(st.datetimes(timezones=st.just(UTC)), st.integers(-(1 << 63), (1 << 64) - 1), st.text())
def test_every_time_and_field_comes_back(at: datetime, cents: int, reason: str) -> None:
    event = credited(cents, reason, at=at)
    for mapper in (PLAIN, SECRET):
        assert mapper.to_domain_event(mapper.to_stored_event(event)) == event


def test_a_declared_type_is_restored() -> None:
    whole = PLAIN.to_stored_event(noted([1, {"a": None}]))
    assert ACCOUNT.bytes in whole.state
    assert PLAIN.to_domain_event(whole) == noted([1, {"a": None}])


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (credited(cents="150"), "cents"),
        (credited(cents=True), "cents"),
        (credited(cents=1 << 64), "cents"),
        (credited(reason="\ud800"), "reason"),
        (noted((1, 2)), "note of tuple would come back as list"),
        (noted(UUID(int=1)), "note of UUID would come back as bytes"),
        (noted(object()), "note"),
        (noted(STAMP.replace(tzinfo=None)), "note"),
        (noted(1, proof="text"), "proof"),
    ],
)
def test_what_would_not_come_back_is_refused_naming_the_field(event: Any, field: str) -> None:
    with pytest.raises(DataError, match=f"version 7 cannot be stored: field {field}"):
        PLAIN.to_stored_event(event)


def test_attributes_that_the_type_does_not_declare_are_refused() -> None:
    more, less = credited(), credited()
    vars(more)["extra"] = 1
    del vars(less)["cents"]
    for event, name in [(more, "extra"), (less, "cents")]:
        with pytest.raises(DataError, match=f"undeclared fields {name}"):
            PLAIN.to_stored_event(event)


@pytest.mark.parametrize("at", [STAMP.replace(tzinfo=None), 5, None])
def test_a_time_without_a_zone_is_refused(at: Any) -> None:
    event = credited()
    vars(event)["timestamp"] = at
    with pytest.raises(DataError, match="has no zone"):
        PLAIN.to_stored_event(event)


def test_an_unregistered_event_is_not_stored() -> None:
    class Stray(Account.Noted):
        TOPIC = "test:stray"

    event = make(Stray, note=1, proof=b"", who=ACCOUNT)
    with pytest.raises(ProgrammingError, match="Stray is not registered"):
        PLAIN.to_stored_event(event)


@pytest.mark.parametrize(
    "bad",
    [
        stored(b""),
        stored(b"\x90"),
        stored(b"\x94"),
        stored(b"\xdc\x00"),
        stored(b"\xc0"),
        stored(b"\x05"),
        stored(b"{}"),
        packed(2, 0, 1),
        packed(2, 0, 1, "x", 1),
        packed(2, "0", 1, "x"),
        packed(2, None, 1, "x"),
        packed(2, 0, "1", "x"),
        packed(2, 0, 1, b"x"),
        packed(2, 1 << 62, 1, "x"),
        packed(2, -(1 << 63), 1, "x"),
        packed(2, 0.5, 1, "x"),
        packed(0, 0, 1, "x"),
        packed(3, 0, 1, "x"),
        packed(1, 0, 1, "x"),
        packed(1, 0, "not a number"),
        packed("2", 0, 1, "x"),
        stored(packed(2, 0, 1, "x").state + b"\x00"),
        stored(msgspec.msgpack.encode({"timestamp": STAMP, "cents": 1})),
        stored(msgspec.msgpack.encode({"timestamp": 5, "euros": 1})),
        stored(msgspec.msgpack.encode({"timestamp": STAMP, "euros": 1, "class_version": []})),
        stored(b"\x81\x90\x01"),
        stored(b"\xc1"),
        stored(b"\xc1" + bytes(40)),
    ],
)
def test_a_bad_state_is_the_library_error_naming_the_event(bad: StoredEvent) -> None:
    with pytest.raises(MapperDeserialisationError) as caught:
        PLAIN.to_domain_event(bad)
    for named in ("test:account.credited", str(ACCOUNT), "version 7"):
        assert named in str(caught.value)


@given(st.binary(max_size=80), st.sampled_from(sorted(TYPES.topics)))
def test_no_bytes_raise_anything_else(state: bytes, topic: str) -> None:
    for mapper in (PLAIN, SECRET):
        for data in (state, b"\x94\x02" + state, b"\xc1\x00\x00\x00\x01" + state):
            try:
                mapper.to_domain_event(stored(data, topic))
            except MapperDeserialisationError as error:
                assert topic in str(error)  # noqa: PT017 - both outcomes are right


def test_an_id_of_text_becomes_the_type_that_the_class_declares() -> None:
    whole = PLAIN.to_stored_event(credited())
    text = StoredEvent(str(ACCOUNT), 7, whole.topic, whole.state)
    assert PLAIN.to_domain_event(text) == credited()
    with pytest.raises(MapperDeserialisationError, match="cannot be read"):
        PLAIN.to_domain_event(StoredEvent("no UUID", 7, whole.topic, whole.state))


# Older versions


def test_an_older_event_is_upcast() -> None:
    old = packed(1, 1_772_600_767_890_123, 3)
    assert PLAIN.to_domain_event(old) == credited(300, "unknown")


def test_what_the_library_mapper_stored_is_read() -> None:
    library: Mapper[UUID] = Mapper(transcoder=MsgpackTranscoder())
    assert PLAIN.to_domain_event(library.to_stored_event(credited())) == credited()
    first = stored(msgspec.msgpack.encode({"timestamp": STAMP, "euros": 3}))
    assert PLAIN.to_domain_event(first) == credited(300, "unknown")


@pytest.mark.parametrize(
    ("upcast", "message"),
    [
        (lambda state: state.pop("nothing"), "KeyError"),
        (lambda state: None, "other fields: note, old, proof, who"),  # noqa: ARG005
    ],
)
def test_an_upcast_that_fails_is_the_library_error(upcast: Any, message: str) -> None:
    attributes = {
        "TOPIC": "test:broken",
        "class_version": 2,
        "FIELDS": {1: ("old",)},
        "upcast_v1_v2": staticmethod(upcast),
    }
    mapper = EventMapper(types=EventTypes(type("Broken", (Account.Noted,), attributes)))
    bad = StoredEvent(ACCOUNT, 7, "test:broken", msgspec.msgpack.encode([1, 0, 5]))
    with pytest.raises(MapperDeserialisationError, match=message):
        mapper.to_domain_event(bad)


# Encryption


def test_an_encrypted_state_shows_nothing_and_comes_back() -> None:
    whole = SECRET.to_stored_event(credited(reason="very secret"))
    assert b"secret" not in whole.state
    assert whole.state[:5] == b"\xc1\x00\x00\x00\x01"
    plain = PLAIN.to_stored_event(credited(reason="very secret")).state
    assert len(whole.state) == len(plain) + 33
    assert SECRET.to_domain_event(whole) == credited(reason="very secret")
    assert SECRET.to_stored_event(credited(reason="very secret")).state != whole.state


def test_a_ciphertext_is_bound_to_its_place() -> None:
    state = SECRET.to_stored_event(credited()).state
    topic = "test:account.credited"
    for moved in [
        StoredEvent(UUID(int=1), 7, topic, state),
        StoredEvent(str(ACCOUNT), 7, topic, state),
        StoredEvent(ACCOUNT, 8, topic, state),
        StoredEvent(ACCOUNT, 7, "test:account.noted", state),
    ]:
        with pytest.raises(MapperDeserialisationError, match="did not encrypt it for this"):
            SECRET.to_domain_event(moved)


def test_every_changed_bit_and_every_cut_of_a_ciphertext_is_found() -> None:
    state = SECRET.to_stored_event(credited()).state
    changed = [
        state[:at] + bytes([state[at] ^ 1 << bit]) + state[at + 1 :]
        for at in range(len(state))
        for bit in range(8)
    ]
    for bad in [*changed, *(state[:end] for end in range(len(state))), state + b"\x00"]:
        with pytest.raises(MapperDeserialisationError):
            SECRET.to_domain_event(stored(bad))


def test_keys_rotate() -> None:
    old = SECRET.to_stored_event(credited())
    rotated = EventMapper(types=TYPES, cipher=EventCipher(KEYS, current=2))
    new = rotated.to_stored_event(credited())
    assert new.state[:5] == b"\xc1\x00\x00\x00\x02"
    for mapper in (SECRET, rotated):
        assert mapper.to_domain_event(old) == mapper.to_domain_event(new) == credited()
    dropped = EventMapper(types=TYPES, cipher=EventCipher({2: KEYS[2]}, current=2))
    with pytest.raises(MapperDeserialisationError, match="encrypted with key 1, which is not here"):
        dropped.to_domain_event(old)
    with pytest.raises(MapperDeserialisationError, match="there are no keys here"):
        PLAIN.to_domain_event(old)


def test_plain_and_encrypted_states_stand_in_one_log() -> None:
    assert SECRET.to_domain_event(PLAIN.to_stored_event(credited())) == credited()


def test_a_key_refuses_more_events_than_it_is_safe_for() -> None:
    cipher = EventCipher(KEYS, current=1, encrypted=(1 << 32) - 1)
    assert cipher.encrypt(ACCOUNT, 1, "t", b"last")
    with pytest.raises(OperationalError, match="event key 1 has encrypted 4294967296 events"):
        cipher.encrypt(ACCOUNT, 2, "t", b"one too many")


def test_a_cipher_does_not_show_its_keys() -> None:
    cipher = EventCipher(KEYS, current=1)
    assert repr(cipher) == "EventCipher(key ids [1, 2], current 1)"
    with pytest.raises(ProgrammingError) as caught:
        EventCipher({1: b"too short but secret"}, current=1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("keys", "current"), [({}, 1), ({-1: bytes(32)}, -1), (KEYS, 3)])
def test_bad_keys_are_refused(keys: dict[int, bytes], current: int) -> None:
    with pytest.raises(ProgrammingError, match="event key"):
        EventCipher(keys, current)


@pytest.mark.parametrize(("version", "topic"), [(-1, "t"), (1, "\ud800"), (1, "t" * 70_000)])
def test_what_cannot_be_bound_is_not_encrypted(version: int, topic: str) -> None:
    with pytest.raises(DataError, match="no event can be encrypted"):
        EventCipher(KEYS, current=1).encrypt(ACCOUNT, version, topic, b"")


# In the library's application


def test_an_application_takes_it_by_topic(tmp_path: Path) -> None:
    env = {
        "PERSISTENCE_MODULE": "eventstore",
        "LMDB_PATH": str(tmp_path),
        "MAPPER_TOPIC": f"{AccountMapper.__module__}:AccountMapper",
    }
    bank: Application[UUID] = Application(env)
    account = Account(owner="eve")
    account.credit(250, "salary")
    bank.save(account)
    assert bank.repository.get(account.id) == account
    notes = bank.notification_log.select(start=1, limit=10)
    assert [msgspec.msgpack.decode(note.state)[2:] for note in notes] == [
        ["test:account", "eve"],
        [250, "salary"],
    ]
    bank.close()


def test_a_mapper_needs_types_and_encodes_by_itself() -> None:
    with pytest.raises(ProgrammingError, match="needs the types"):
        EventMapper()
    key = AESCipher.create_key(32)
    with pytest.raises(ProgrammingError, match="only an EventCipher"):
        AccountMapper(cipher=AESCipher(Environment(env={"CIPHER_KEY": key})))
    with pytest.raises(ProgrammingError, match="no compressor"):
        AccountMapper(compressor=object())  # type: ignore[arg-type]
