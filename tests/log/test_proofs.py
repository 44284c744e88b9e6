# SPDX-License-Identifier: AGPL-3.0-or-later
"""Nothing in the log can be changed unseen, and what is in it can be proven to others."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio

from eventstore import merkle, records
from eventstore.checkpoint import Checkpoint, CheckpointKey, cosign, open_checkpoint, sign
from eventstore.environment import LMDBEnvironment
from eventstore.merkle import Frontier
from eventstore.segments import CanonicalParts, Segment, write_segment
from eventstore.tree import _HEAD_KEY, _NODE_KEY, _sealed
from replicator import durable
from replicator.errors import DamageError, RefusedError, StateError, UsageError
from replicator.log import EventLog, heads, open_log, proofs
from replicator.log.archive import SegmentAwayError
from replicator.log.heads import load_key
from replicator.log.peers import Peer, take_head, take_signed
from replicator.log.periods import Period
from tests.log.support import (
    WEB,
    Calendar,
    caught_up,
    live,
    live_rows,
    opened,
    take_away,
)

if TYPE_CHECKING:
    from eventstore.environment import Transaction

LOG = "events/replctl/events/"
#: Events of the log below, and the first that is live.
MANY, LIVE = 1060, 791


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of three months, the first two of them sealed, over five blocks of the tree."""
    folder = tmp_path_factory.mktemp("made") / "log"

    async def make() -> None:
        calendar = Calendar()
        with pytest.MonkeyPatch.context() as patch:
            calendar.install(patch)
            async with open_log(folder, clock=calendar) as log:
                await log.register(WEB, "web", "receiver")
                for count in (39, 749, 268):
                    async with log.change(WEB) as vm:
                        for number in range(count):
                            vm.lose_tracking(f"lost {number}")
                    if count != 268:
                        calendar.next_month()
                        await log.close_period()
                        await log.seal()
                await live(log, WEB, random.Random(1))
                await caught_up(log)
                assert (log.store.head(), log.periods[-1].first) == (MANY, LIVE)

    trio.run(make)
    return folder


def fault(folder: Path) -> str:
    """What a check of the log finds."""
    with opened(folder) as store, pytest.raises(DamageError) as caught:
        proofs.verify(store)
    return str(caught.value)


@contextmanager
def forging(folder: Path) -> Iterator[LMDBEnvironment]:
    """The log's environment, for somebody who knows how rows are laid out."""
    with LMDBEnvironment.open(folder) as environment:
        yield environment


def named(said: str) -> tuple[int, int]:
    """The events that a message blames."""
    found = re.search(r"(?:event|events|record|records) (\d+)(?:(?:\.\.| to )(\d+))?", said)
    assert found is not None, said
    return int(found[1]), int(found[2] or found[1])


def change_record(environment: LMDBEnvironment, nid: int) -> None:
    """Another state in a record, with a valid checksum."""
    rows = environment.database(LOG + "log")
    key = records.pack_u64(nid)

    def change(txn: Transaction) -> None:
        old = records.decode_record(nid, txn.get(key, db=rows) or b"")
        forged = old.state.replace(b"lost", b"kept")
        assert forged != old.state
        row = records.encode_record(nid, old.topic, old.version, old.key, forged)
        txn.put(key, row, db=rows)

    environment.write(change)


def test_a_log_that_nobody_touched(made: Path) -> None:
    reported: list[tuple[int, int]] = []
    with opened(made) as store:
        checked = proofs.verify(store, lambda done, total: reported.append((done, total)))
        assert checked.root == store.root_at(MANY)
    assert (checked.events, checked.away, checked.signed_heads) == (MANY, [], 0)
    assert checked.segments == ["000001-2026-01.segment", "000002-2026-02.segment"]
    assert reported[-1] == (MANY, MANY)
    assert reported == sorted(reported)


@pytest.mark.parametrize("nid", [LIVE + 1, 900, 1025, MANY - 1])
def test_a_live_record_is_changed(copied: Path, nid: int) -> None:
    with forging(copied) as environment:
        change_record(environment, nid)
    first, last = named(fault(copied))
    assert first <= nid <= last
    assert last - first < 256


def test_two_records_change_places(copied: Path) -> None:
    """Each with the checksum of its new place."""
    with forging(copied) as environment:
        rows = environment.database(LOG + "log")

        def swap(txn: Transaction) -> None:
            nids = 820, 830
            found = [
                records.decode_record(n, txn.get(records.pack_u64(n), db=rows) or b"") for n in nids
            ]
            for nid, old in zip(nids, reversed(found), strict=True):
                row = records.encode_record(nid, old.topic, old.version, old.key, old.state)
                txn.put(records.pack_u64(nid), row, db=rows)

        environment.write(swap)
    first, last = named(fault(copied))
    assert first <= 820
    assert last >= 820


def test_a_record_is_gone(copied: Path) -> None:
    with forging(copied) as environment:
        rows = environment.database(LOG + "log")
        environment.write(lambda txn: txn.delete(records.pack_u64(900), db=rows))
    assert "900" in fault(copied)


def test_a_record_is_damaged(copied: Path) -> None:
    with forging(copied) as environment:
        rows = environment.database(LOG + "log")

        def flip(txn: Transaction) -> None:
            row = bytearray(txn.get(records.pack_u64(901), db=rows) or b"")
            row[-1] ^= 1
            txn.put(records.pack_u64(901), bytes(row), db=rows)

        environment.write(flip)
    assert named(fault(copied)) == (901, 901)


@pytest.mark.parametrize("index", ["by stream", "by topic"])
def test_a_record_is_hidden(copied: Path, index: str) -> None:
    """It is in the log and in the tree, and no history finds it."""
    with opened(copied, readonly=False) as store:
        places = store.environment.database(LOG + "index", dupsort=True)
        rows = store.environment.database(LOG + "log")
        by_topic = store.recorder._log().by_topic
        assert by_topic is not None

        def hide(txn: Transaction) -> None:
            old = records.decode_record(901, txn.get(records.pack_u64(901), db=rows) or b"")
            if index == "by topic":
                by_topic.remove(txn, old.topic, [901])
            else:
                assert txn.delete(old.key, records.pack_entry(old.version, 901), db=places)

        store.environment.write(hide)
    assert named(fault(copied)) == (901, 901)


def test_a_topic_is_renamed(copied: Path) -> None:
    """One kind of event becomes another for all of its records at once."""
    with forging(copied) as environment:
        topics = environment.database(LOG + "topics")

        def rename(txn: Transaction) -> None:
            with txn.cursor(topics) as cursor:
                for key, row in cursor:
                    if row.endswith(b"replctl:vm.tracking-lost"):
                        number = int.from_bytes(key)
                        txn.put(*records.encode_topic(number, "replctl:vm.promoted"), db=topics)

        environment.write(rename)
    first, last = named(fault(copied))
    assert first <= LIVE + 1 <= last


@pytest.mark.parametrize("place", [(8, 0), (8, 1), (8, 3), "head"])
@pytest.mark.parametrize("checked", [False, True])
def test_a_row_of_the_tree_is_changed(copied: Path, place: Any, checked: bool) -> None:
    """Damaged, or forged with a valid check; of sealed events and of live ones."""
    with forging(copied) as environment:
        tree = environment.database(LOG + "tree")
        key = _HEAD_KEY if place == "head" else _NODE_KEY.pack(*place)

        def change(txn: Transaction) -> None:
            value = bytearray((txn.get(key, db=tree) or b"")[:-8])
            value[-1] ^= 1
            row = _sealed(key, bytes(value)) if checked else bytes(value) + bytes(8)
            txn.put(key, row, db=tree)

        environment.write(change)
    assert re.search(r"tree|hash", fault(copied))


# Against whoever can compute all of it anew


def keep_signed(folder: Path, *, old: int | None = None) -> int:
    """Let another side see the log's head (or that of ``old`` events) and sign it, as at a cycle's end; its size."""
    name = "other-side"
    other = CheckpointKey.generate(name)
    with opened(folder, readonly=False) as store:
        key = load_key(folder)
        size = store.head() if old is None else old
        head = sign(Checkpoint(key.verifier.name, size, store.root_at(size)), key)
        theirs = sign(Checkpoint(name, 0, merkle.EMPTY_ROOT), other)
        peer = take_head(None, str(other.verifier), theirs, (), key)
        peer = take_signed(peer, head, cosign(head, [key.verifier], other), key.verifier)
        store.peers.put(str(WEB), msgspec.msgpack.encode(peer))
        return size


def rewrite(folder: Path, size: int, change: Callable[[int, bytes], bytes]) -> None:
    """Make the log have ``size`` events, each record's state changed, and a tree that fits."""
    with opened(folder, readonly=False) as store:
        environment = store.environment
        log, tree = environment.database(LOG + "log"), environment.database(LOG + "tree")
        places = environment.database(LOG + "index", dupsort=True)
        topics = environment.database(LOG + "topics")
        by_topic = store.recorder._log().by_topic
        assert by_topic is not None

        def write(txn: Transaction) -> None:
            frontier = Frontier(
                LIVE - 1,
                store.tree.frontier_at(txn, LIVE - 1, store.recorder.leaves(txn)).hashes,
            )
            for nid in range(size + 1, MANY + 1):
                old = records.decode_record(nid, txn.get(records.pack_u64(nid), db=log) or b"")
                txn.delete(records.pack_u64(nid), db=log)
                txn.delete(old.key, records.pack_entry(old.version, nid), db=places)
                by_topic.remove(txn, old.topic, [nid])
            with txn.cursor(tree) as cursor:
                for key, _ in list(cursor):
                    if key != _HEAD_KEY and (int.from_bytes(key[1:]) + 1) * 256 > size:
                        txn.delete(key, db=tree)
            for nid in range(LIVE, size + 1):
                old = records.decode_record(nid, txn.get(records.pack_u64(nid), db=log) or b"")
                new = change(nid, old.state)
                row = records.encode_record(nid, old.topic, old.version, old.key, new)
                txn.put(records.pack_u64(nid), row, db=log)
                topic = records.decode_topic(
                    old.topic.to_bytes(4), txn.get(old.topic.to_bytes(4), db=topics) or b""
                )[1]
                leaf = merkle.leaf_hash(
                    records.canonical_record(nid, old.key, old.version, topic, new)
                )
                for level, index, value in frontier.extend([leaf]):
                    node = _NODE_KEY.pack(level, index)
                    txn.put(node, _sealed(node, value), db=tree)
            value = b"".join((frontier.size.to_bytes(8), *frontier.hashes))
            txn.put(_HEAD_KEY, _sealed(_HEAD_KEY, value), db=tree)

        environment.write(write)


def test_history_is_written_anew_with_its_tree(copied: Path) -> None:
    """Only what the other side has signed can show that."""
    signed = keep_signed(copied)
    with opened(copied) as store:
        assert proofs.verify(store).signed_heads == 1
    rewrite(copied, MANY, lambda nid, old: old.replace(b"lost", b"kept") if nid == 820 else old)
    said = fault(copied)
    assert f"one of events 1 to {signed} is not what it was when other-side signed" in said
    with opened(copied, readonly=False) as store:
        store.peers.delete(str(WEB))
        proofs.verify(store)


def test_the_tail_is_dropped_with_its_tree(copied: Path) -> None:
    keep_signed(copied)
    rewrite(copied, 900, lambda _nid, old: old)
    assert (
        f"the log ends at event 900, but other-side has signed one of {MANY}: events are missing"
        in fault(copied)
    )
    with opened(copied, readonly=False) as store:
        store.peers.delete(str(WEB))
        assert proofs.verify(store).events == 900


async def test_an_older_copy_is_put_back_and_grows_again(copied: Path, calendar: Calendar) -> None:
    """It lacks what the other side signed, and the file knows nothing of that: the other side has to show it (test_peers.py).
    Written down again after that, it is found here too, whatever has been added since.
    """
    before = (copied / "data.mdb").read_bytes()
    calendar.next_month()
    async with open_log(copied, clock=calendar) as log:
        await live(log, WEB, random.Random(1), 3)
    keep_signed(copied)
    with opened(copied) as store:
        kept = store.peers.get(str(WEB))
        signed = store.head()
    assert kept is not None
    (copied / "data.mdb").write_bytes(before)
    with opened(copied, readonly=False) as store:
        store.peers.put(str(WEB), kept)
    assert f"the log ends at event {MANY}, but" in fault(copied)
    async with open_log(copied, clock=calendar) as log:
        await live(log, WEB, random.Random(2), 9)
    assert f"one of events 1 to {signed} is not what it was" in fault(copied)


def test_what_the_other_side_signed_is_damaged_itself(copied: Path) -> None:
    keep_signed(copied)
    with opened(copied, readonly=False) as store:
        good = msgspec.msgpack.decode(store.peers.get(str(WEB)) or b"", type=Peer)
        ours = good.ours
        assert ours is not None
        for bad in (
            b"\xc1",
            msgspec.msgpack.encode([1, 2]),
            msgspec.msgpack.encode(msgspec.structs.replace(good, key="x+y+z")),
            msgspec.msgpack.encode(msgspec.structs.replace(good, ours="")),
            msgspec.msgpack.encode(
                msgspec.structs.replace(good, ours=ours.replace("\n", "\n1", 1))
            ),
        ):
            store.peers.put(str(WEB), bad)
            assert fault(copied)


# Segments


def forge(path: Path, change: Callable[[CanonicalParts], CanonicalParts]) -> None:
    """A segment in every way right but that it holds other records."""
    with Segment.open(path) as segment:
        info = segment.info
        changed = [change(parts) for parts in segment.records()]
    path.unlink()
    write_segment(
        path,
        origin=info.origin,
        label=info.label,
        first=info.first,
        last=info.last,
        frontier=info.frontier_before,
        checkpoint=info.checkpoint,
        records=changed,
    )


def test_a_segment_is_forged(copied: Path) -> None:
    path = copied / "segments" / "000002-2026-02.segment"
    forge(
        path,
        lambda p: p._replace(state=p.state.replace(b"lost", b"kept")) if p.nid == 200 else p,
    )
    said = fault(copied)
    assert path.name in said
    first, last = named(said.partition(path.name)[2])
    assert first <= 200 <= last
    assert last - first < 256


def test_a_segment_is_damaged(copied: Path) -> None:
    path = copied / "segments" / "000001-2026-01.segment"
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), max(1, len(data) // 25)):
        changed = bytearray(data)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        assert "segment" in fault(copied)
    path.write_bytes(data[: len(data) // 2])
    assert "segment" in fault(copied)


def test_a_segment_is_another(copied: Path) -> None:
    one, two = (
        copied / "segments" / name for name in ("000001-2026-01.segment", "000002-2026-02.segment")
    )
    shutil.copy(two, one)
    assert one.name in fault(copied)


def test_a_segment_that_is_away_is_named_and_the_rest_is_checked(copied: Path) -> None:
    path = copied / "segments" / "000001-2026-01.segment"
    take_away(path)
    with opened(copied) as store:
        checked = proofs.verify(store)
    assert (checked.away, checked.segments) == ([path.name], ["000002-2026-02.segment"])
    with forging(copied) as environment:
        change_record(environment, 1025)
    first, last = named(fault(copied))
    assert first <= 1025 <= last


def test_all_segments_are_away(copied: Path) -> None:
    """The live log can be checked, proven and shown to the other side without them."""
    keep_signed(copied)
    for path in (copied / "segments").glob("*.segment"):
        take_away(path)
    key = load_key(copied)
    with opened(copied) as store:
        checked = proofs.verify(store)
        assert (len(checked.away), checked.signed_heads) == (2, 1)
        for nid in (LIVE, LIVE + 1, 900, 1024, 1025, MANY):
            assert check(proofs.prove_event(store, key, nid)).startswith(f"event {nid} is in log ")
        for since in (LIVE - 1, LIVE, 900, 1023, 1024, MANY):
            assert check(proofs.prove_growth(store, key, since, None))
            head = heads.signed_head(store, key, since)
            merkle.verify_consistency(
                since, store.root_at(since), MANY, store.root_at(MANY), list(head.proof)
            )


def test_a_head_that_was_signed_within_a_segment_that_is_away(copied: Path) -> None:
    """It cannot be compared, which is no damage."""
    keep_signed(copied, old=300)
    with opened(copied) as store:
        assert proofs.verify(store).signed_heads == 1
    for path in (copied / "segments").glob("*.segment"):
        take_away(path)
    with opened(copied) as store:
        assert proofs.verify(store).signed_heads == 0


# While others write


@pytest.mark.usefixtures("by_hand")
async def test_a_check_while_the_log_is_sealed_and_grows(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go away under the check, events come, and the other side signs a head that was not there when it began."""
    monkeypatch.setattr(proofs, "_STRIDE", 16)
    async with open_log(tmp_path, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        for _ in range(3):
            async with log.change(WEB) as vm:
                for number in range(40):
                    vm.lose_tracking(f"lost {number}")
            calendar.next_month()
            await log.close_period()
        key = log.key
        other = CheckpointKey.generate("other-side")
        began = log.store.head()
        looks = 0

        async def meanwhile() -> None:
            await log.seal()
            await live(log, WEB, random.Random(1), 2)
            await log.close_period()
            head = await log.head(0)
            theirs = sign(Checkpoint("other-side", 0, merkle.EMPTY_ROOT), other)
            peer = take_head(None, str(other.verifier), theirs, (), key)
            signed = cosign(head.text, [key.verifier], other)
            await log.keep_peer(WEB, take_signed(peer, head.text, signed, key.verifier))

        def report(_done: int, _total: int) -> None:
            nonlocal looks
            looks += 1
            trio.from_thread.run(meanwhile)

        checked = await trio.to_thread.run_sync(proofs.verify, log.store, report)
        assert checked.signed_heads == 1
        assert began < checked.events < log.store.head()
        assert looks > began // 16
        assert live_rows(log.store)[0] > began


# Proofs


def check(proof: dict[str, Any], key: str | None = None) -> str:
    return proofs.check_proof(json.dumps(proof).encode(), key)


def test_every_event_can_be_proven(made: Path) -> None:
    key = load_key(made)
    with opened(made) as store:
        for nid in (1, 2, 40, 41, 255, 256, 257, 790, 791, 1024, 1025, MANY):
            proof = proofs.prove_event(store, key, nid)
            said = check(proof, str(key.verifier))
            assert said.startswith(f"event {nid} is in log {key.verifier.name} of {MANY} events: ")
            assert check(proof) == f"{said} (by the key in the proof itself)"
        for nid in (MANY + 1, 1 << 62, 1 << 63, 1 << 70):
            with pytest.raises(RefusedError, match=f"it ends at {MANY}"):
                proofs.prove_event(store, key, nid)


def test_every_growth_can_be_proven(made: Path) -> None:
    key = load_key(made)
    sizes = (0, 1, 40, 255, 256, 257, 790, 1024, 1059, MANY)
    with opened(made) as store:
        for old in sizes:
            for new in (None, *(size for size in sizes if size >= old)):
                said = check(proofs.prove_growth(store, key, old, new), str(key.verifier))
                size = MANY if new is None else new
                root = store.root_at(old).hex()
                assert said == (
                    f"log {key.verifier.name} of {size} events continues that of {old},"
                    f" whose root is {root}"
                )
        for old, new in ((2, 1), (MANY + 1, None), (1, MANY + 1), (1 << 70, None), (0, 1 << 70)):
            with pytest.raises(RefusedError, match="sizes must be in order and within it"):
                proofs.prove_growth(store, key, old, new)


@pytest.fixture(scope="module")
def given(made: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One good proof of each kind."""
    key = load_key(made)
    with opened(made) as store:
        return proofs.prove_event(store, key, 300), proofs.prove_growth(store, key, 300, None)


def test_a_proof_by_another_key(made: Path, given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    name = load_key(made).verifier.name
    for key in (CheckpointKey.generate("x"), CheckpointKey.generate(name)):
        for proof in given:
            with pytest.raises(DamageError, match="cannot be believed"):
                check(proof, str(key.verifier))
            with pytest.raises(DamageError, match="cannot be believed"):
                check(proof | {"key": str(key.verifier)})


def test_a_head_of_another_log_by_the_same_key(
    made: Path, given: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """The key has signed it, but as somebody else's."""
    key = load_key(made)
    with opened(made) as store:
        head = sign(Checkpoint("another-log", MANY, store.root_at(MANY)), key)
    for proof in given:
        with pytest.raises(DamageError, match="the head is of log another-log"):
            check(proof | {"head": head}, str(key.verifier))


def test_an_event_proof_that_was_changed(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    proof, _ = given
    record = base64.b64decode(proof["record"])
    steps = proof["proof"]
    changes: list[dict[str, Any]] = [
        {"record": base64.b64encode(record.replace(b"lost", b"kept")).decode()},
        {"record": base64.b64encode(record + b"\0").decode()},
        {"record": ""},
        {"record": "é" * 8},
        {"record": "!"},
        {"event": 301},
        {"index": 300},
        {"event": 301, "index": 300},
        {"event": 0, "index": -1},
        {"event": -(1 << 62), "index": -(1 << 62) - 1},
        {"event": 1 << 63, "index": (1 << 63) - 1},
        {"size": MANY - 1},
        {"size": MANY + 1},
        {"size": 1 << 63},
        {"proof": steps[:-1]},
        {"proof": steps[1:]},
        {"proof": [*steps, steps[0]]},
        {"proof": []},
        {"proof": steps[::-1]},
        {"proof": ["zz", *steps[1:]]},
        {"proof": ["00", *steps[1:]]},
        {"proof": ["é", *steps[1:]]},
        {"proof": [steps[0]] * 10_000},
        {"head": ""},
        {"head": proof["head"] * 2},
        {"head": proof["head"].replace(str(MANY), str(MANY + 1))},
        {"head": "x" * 100_000},
        {"key": ""},
        {"key": "x" * 100_000},
    ]
    for change in changes:
        with pytest.raises(DamageError):
            check(proof | change)


def test_a_growth_proof_that_was_changed(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, proof = given
    steps = proof["proof"]
    changes: list[dict[str, Any]] = [
        {"old_size": 299},
        {"old_size": 301},
        {"old_size": 0},
        {"old_size": -1},
        {"old_size": MANY + 1},
        {"old_size": 1 << 63},
        {"old_root": proof["new_root"]},
        {"old_root": ""},
        {"old_root": "é"},
        {"new_size": MANY - 1},
        {"new_size": MANY + 1},
        {"new_root": proof["old_root"]},
        {"old_size": MANY, "old_root": proof["new_root"]},
        {"new_size": 300, "new_root": proof["old_root"], "proof": []},
        {"proof": steps[:-1]},
        {"proof": [*steps, steps[0]]},
        {"proof": []},
        {"proof": ["zz"]},
        {"head": proof["head"][:-2]},
        {"key": "a+b+c"},
    ]
    for change in changes:
        with pytest.raises(DamageError):
            check(proof | change)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b'"\\ud800"',
        b"1e999",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"event": "1"}',
        bytes(1 << 20),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_proof_at_all(text: bytes) -> None:
    with pytest.raises(UsageError, match=r"^this is no proof: "):
        proofs.check_proof(text, None)


def test_a_proof_with_wrong_kinds_of_values(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for proof in given:
        for name in proof:
            wrongs: tuple[Any, ...] = (None, True, 1.5, {}, [[]], [1])
            for wrong in wrongs:
                with pytest.raises(UsageError, match="this is no proof"):
                    check(proof | {name: wrong})
        for name in proof:
            with pytest.raises(UsageError, match="this is no proof"):
                check({key: value for key, value in proof.items() if key != name})


async def test_what_another_side_has_seen_can_be_continued_while_its_segment_is_away(
    tmp_path: Path, calendar: Calendar
) -> None:
    """A VM that paused for a month: the head that was seen last lies in the middle of a segment."""
    folder = tmp_path / "log"
    async with open_log(folder, clock=calendar) as log:
        await log.register(WEB, "web", "receiver")
        await live(log, WEB, random.Random(5), 900)
    seen = 600
    keep_signed(folder, old=seen)
    async with open_log(folder, clock=calendar) as log:
        (period,) = await sealed(log)
        assert (period.first, period.last) == (1, 901)
        await live(log, WEB, random.Random(6), 3)
        take_away(log.store.archive.path(period))
        head = await log.head(seen)
        assert head.proof
        own = log.key.verifier
        merkle.verify_consistency(
            seen,
            log.store.root_at(seen),
            head.size,
            open_checkpoint(head.text, [own]).root,
            head.proof,
        )
        with pytest.raises(SegmentAwayError):
            await log.head(300)  # which nobody has seen


async def sealed(log: EventLog) -> list[Period]:
    await log.close_period()
    await log.seal()
    return log.store.archive.sealed()


# The key


def test_the_key_is_made_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = heads.ensure_key(tmp_path, 0)
    assert (tmp_path / "log.key").stat().st_mode & 0o777 == 0o600
    assert heads.ensure_key(tmp_path, 0).verifier == first.verifier
    assert CheckpointKey.generate("x").verifier != first.verifier
    # Cut before it had its name: a new one is made, and nothing is in the way.
    other = tmp_path / "other"
    other.mkdir()

    def cut(step: str, _path: str) -> None:
        if step == "rename":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "observe", cut)
        with pytest.raises(KeyboardInterrupt):
            heads.ensure_key(other, 0)
    assert not caplog.records
    # The log is there, and its key is not: that is said.
    heads.ensure_key(other, 9)
    assert "log.key is missing, a new key is made" in caplog.text
    assert [path.name for path in other.iterdir()] == ["log.key"]


@pytest.mark.parametrize("content", [b"", b"garbage\n", b"PRIVATE+KEY+a+b+c\n"])
def test_a_key_that_cannot_be_used_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError, match=r"log\.key"):
        heads.ensure_key(tmp_path, 9)
    with pytest.raises(StateError, match=r"log\.key"):
        load_key(tmp_path)
    assert path.read_bytes() == content
