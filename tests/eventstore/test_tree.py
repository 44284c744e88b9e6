# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash
from eventsourcing.persistence import InternalError, OperationalError, ProgrammingError
from hypothesis import given
from hypothesis import strategies as st

from eventstore import merkle
from eventstore.environment import LMDBEnvironment
from eventstore.merkle import Frontier
from eventstore.tree import Head, TreeLog, TreeMismatchError

if TYPE_CHECKING:
    from eventstore.environment import Transaction

NAME = "events/app/events/"
#: Two levels of stored nodes, and a last block that is not full.
MANY = (1 << 16) + 600

LEAVES = [merkle.leaf_hash(number.to_bytes(4)) for number in range(MANY)]


@cache
def root(size: int) -> bytes:
    return frontier(size).root()


def frontier(size: int) -> Frontier:
    made = Frontier()
    made.extend(LEAVES[:size])
    return made


class Asked:
    """Leaf hashes as a recorder gives them, and how often it was asked."""

    def __init__(self, leaves: Sequence[bytes] = LEAVES) -> None:
        self.leaves = leaves
        self.blocks: list[tuple[int, int]] = []

    def __call__(self, first: int, count: int) -> Sequence[bytes]:
        assert first % 256 == 0
        assert 1 <= count <= 256
        self.blocks.append((first, count))
        return self.leaves[first : first + count]


def read_row(environment: LMDBEnvironment, key: bytes) -> bytes | None:
    database = environment.database(f"{NAME}tree")
    return environment.read(lambda txn: txn.get(key, db=database))


def write_row(environment: LMDBEnvironment, key: bytes, value: bytes | None) -> None:
    """As whoever can write the file, and knows the format: with the right check."""
    database = environment.database(f"{NAME}tree")

    def write(txn: Transaction) -> None:
        if value is None:
            txn.delete(key, db=database)
        else:
            txn.put(key, value + xxhash.xxh3_64_digest(key + value), db=database)

    environment.write(write)


def flip(environment: LMDBEnvironment, key: bytes, at: int) -> None:
    """As a disk does it: without the right check."""
    database = environment.database(f"{NAME}tree")

    def write(txn: Transaction) -> None:
        row = bytearray(txn.get(key, db=database) or b"")
        row[at] ^= 1
        txn.put(key, bytes(row), db=database)

    environment.write(write)


def node_key(level: int, index: int) -> bytes:
    return level.to_bytes(1) + index.to_bytes(8)


def made(environment: LMDBEnvironment, leaves: Sequence[bytes]) -> TreeLog:
    tree = TreeLog(environment, NAME)
    environment.write(lambda txn: tree.extend(txn, 1, leaves))
    return tree


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LMDBEnvironment, TreeLog]]:
    """A tree that no test changes."""
    with LMDBEnvironment.open(tmp_path_factory.mktemp("tree") / "events") as opened:
        yield opened, made(opened, LEAVES)


def verified(
    environment: LMDBEnvironment, tree: TreeLog, leaves: Sequence[bytes], first: int = 1
) -> tuple[int, bytes]:
    found = environment.read(
        lambda txn: tree.verify(txn, enumerate(leaves, first), frontier(first - 1))
    )
    return found.size, found.root


def test_a_tree_grows_with_its_log_and_is_the_same_when_opened_again(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as first:
        tree = TreeLog(first, NAME)
        assert first.read(tree.head) == Head(0, merkle.EMPTY_ROOT)
        assert verified(first, tree, []) == (0, merkle.EMPTY_ROOT)
        at = 0
        for count in (1, 0, 2, 253, 1, 300, 3):
            leaves = LEAVES[at : at + count]
            first.write(lambda txn, at=at, leaves=leaves: tree.extend(txn, at + 1, leaves))  # type: ignore[misc]
            at += count
            assert first.read(tree.head) == Head(at, root(at))
    with LMDBEnvironment.open(tmp_path / "events", readonly=True) as second:
        assert second.read(TreeLog(second, NAME, create=False).head) == Head(560, root(560))


def test_an_aborted_transaction_leaves_the_tree_as_it_was(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:255])

    def extend_and_fail(txn: Transaction) -> None:
        tree.extend(txn, 256, LEAVES[255:520])
        assert tree.head(txn).size == 520
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        environment.write(extend_and_fail)
    assert environment.read(tree.head) == Head(255, root(255))
    environment.write(lambda txn: tree.extend(txn, 256, LEAVES[255:520]))
    assert verified(environment, tree, LEAVES[:520]) == (520, root(520))


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_leaves_that_do_not_follow_are_refused(environment: LMDBEnvironment, first: int) -> None:
    tree = made(environment, LEAVES[:3])
    with pytest.raises(InternalError, match=f"event {first} does not follow the 3 events"):
        environment.write(lambda txn: tree.extend(txn, first, LEAVES[3:4]))
    assert environment.read(tree.head) == Head(3, root(3))


def test_a_tree_that_nobody_made_is_missing(environment: LMDBEnvironment) -> None:
    with pytest.raises(OperationalError, match="has no 'events/app/events/tree'"):
        TreeLog(environment, NAME, create=False)


def test_a_tree_stores_a_row_for_each_full_block_and_one_head(
    large: tuple[LMDBEnvironment, TreeLog],
) -> None:
    environment, _ = large
    database = environment.database(f"{NAME}tree")
    stat = environment.read(lambda txn: txn.stat(database))
    assert stat["entries"] == 1 + 256 + 2 + 1
    assert (read_row(environment, node_key(16, 0)) or b"")[:32] == root(1 << 16)


def test_the_head_has_exactly_these_bytes(environment: LMDBEnvironment) -> None:
    """The worked example of docs/eventstore-format.md: a later version must still read it."""
    leaves = [
        "70952ae0554d0cf8a580e33f1f948246fde66033345e1a3baae11ba573dba3a5",
        "ae862778c93c406f3c561cb85eff764fb88cfe254dabe85fc16cb2a14a65a4bc",
        "8c4fd684d15c825d4b7666eba8606c0ac53a43e4c421ecd94a80c32aba2800e8",
    ]
    tree = made(environment, [bytes.fromhex(leaf) for leaf in leaves])
    row = read_row(environment, b"head")
    assert row is not None
    assert row.hex() == (
        "0000000000000003"
        "39f433957396b690f0e3470ebc7fb95068458f8c07d0107c30c7c8a912f5088e"
        "8c4fd684d15c825d4b7666eba8606c0ac53a43e4c421ecd94a80c32aba2800e8"
        "ddca53dd71997e9d"
    )
    assert environment.read(tree.head).root.hex() == (
        "e566f41e58a436504df6b685a18dd2ad979c30893af9a82c04495f29d9d6d296"
    )


@given(st.data())
def test_any_proof_and_past_root_is_that_of_the_definition(
    large: tuple[LMDBEnvironment, TreeLog], data: st.DataObject
) -> None:
    environment, tree = large
    edges = st.sampled_from([1, 255, 256, 257, 512, 65535, 65536, 65537, MANY - 1, MANY])
    size = data.draw(edges | st.integers(1, MANY))
    old = data.draw(st.integers(0, size) | edges.filter(lambda edge: edge <= size))
    index = data.draw(st.integers(0, size - 1))
    asked = Asked()
    with_leaves = asked
    inclusion = environment.read(lambda txn: tree.inclusion_proof(txn, index, size, with_leaves))
    assert len(asked.blocks) <= 2
    merkle.verify_inclusion(LEAVES[index], index, size, inclusion, root(size))
    asked.blocks.clear()
    consistency = environment.read(lambda txn: tree.consistency_proof(txn, old, size, asked))
    assert len(asked.blocks) <= 2
    merkle.verify_consistency(old, root(old), size, root(size), consistency)
    assert environment.read(lambda txn: tree.root_at(txn, old, asked)) == root(old)
    assert environment.read(lambda txn: tree.frontier_at(txn, old, asked)) == frontier(old)


@given(st.data())
def test_any_node_is_the_root_of_its_leaves(
    large: tuple[LMDBEnvironment, TreeLog], data: st.DataObject
) -> None:
    environment, tree = large
    level = data.draw(st.integers(0, 16))
    index = data.draw(st.integers(0, (MANY >> level) - 1))
    expected = Frontier()
    expected.extend(LEAVES[index << level : (index + 1) << level])
    found = environment.read(lambda txn: tree.node(txn, level, index, Asked()))
    assert found == expected.root()


@pytest.mark.parametrize(
    "call",
    [
        lambda tree, txn: tree.inclusion_proof(txn, 3, 3, Asked()),
        lambda tree, txn: tree.inclusion_proof(txn, -1, 3, Asked()),
        lambda tree, txn: tree.inclusion_proof(txn, 0, 6, Asked()),
        lambda tree, txn: tree.consistency_proof(txn, 3, 2, Asked()),
        lambda tree, txn: tree.consistency_proof(txn, -1, 2, Asked()),
        lambda tree, txn: tree.consistency_proof(txn, 2, 6, Asked()),
        lambda tree, txn: tree.root_at(txn, 6, Asked()),
        lambda tree, txn: tree.root_at(txn, -1, Asked()),
        lambda tree, txn: tree.node(txn, 1, 2, Asked()),
        lambda tree, txn: tree.node(txn, 0, -1, Asked()),
        lambda tree, txn: tree.node(txn, 1 << 40, 0, Asked()),
        lambda tree, txn: tree.verify(txn, [], frontier(6)),
        lambda tree, txn: tree.verify(txn, [], frontier(3), 2),
        lambda tree, txn: tree.verify(txn, [], Frontier(), 6),
    ],
)
def test_what_the_tree_does_not_have_is_refused(
    environment: LMDBEnvironment, call: Callable[[TreeLog, Transaction], object]
) -> None:
    tree = made(environment, LEAVES[:5])
    with pytest.raises(ProgrammingError):
        environment.read(lambda txn: call(tree, txn))


@pytest.mark.parametrize("wrong", [LEAVES[:4], LEAVES[:6], [*LEAVES[:4], b"short"]])
def test_leaf_hashes_that_are_none_are_refused(
    environment: LMDBEnvironment, wrong: list[bytes]
) -> None:
    tree = made(environment, LEAVES[:5])
    with pytest.raises(InternalError, match="not the leaf hashes of 5 events"):
        environment.read(lambda txn: tree.inclusion_proof(txn, 1, 3, lambda *_: wrong))


# Verification: whole, in parts, and what each kind of tampering is called.


def test_a_sound_log_is_verified_whole_and_in_parts(
    large: tuple[LMDBEnvironment, TreeLog],
) -> None:
    environment, tree = large
    assert verified(environment, tree, LEAVES) == (MANY, root(MANY))

    def part(start: Frontier, stop: int | None) -> Frontier:
        records = enumerate(LEAVES[start.size :], start.size + 1)
        found = environment.read(lambda txn: tree.verify(txn, records, start, stop))
        assert found.root == root(found.size)
        return found.frontier

    at = part(part(Frontier(), 1000), 40000)
    assert at.size == 40000
    assert part(at, None).size == MANY
    past = environment.read(lambda txn: tree.frontier_at(txn, 700, Asked()))
    assert part(past, 700).size == 700
    assert part(past, 1300).size == 1300


@pytest.mark.parametrize(
    ("changed", "first", "last"), [(0, 1, 256), (255, 1, 256), (300, 257, 512), (514, 513, 514)]
)
def test_a_changed_record_is_found_in_its_block(
    environment: LMDBEnvironment, changed: int, first: int, last: int
) -> None:
    tree = made(environment, LEAVES[:515])
    records = list(LEAVES[:515])
    records[changed] = merkle.leaf_hash(b"changed")
    with pytest.raises(TreeMismatchError) as caught:
        verified(environment, tree, records)
    # The last 3 events are a run of two and a run of one in the head.
    expected = (515, 515) if changed == 514 else (first, last)
    assert (caught.value.first, caught.value.last) == expected
    assert str(caught.value).endswith(
        "event 515" if changed == 514 else f"one of events {first}..{last}"
    )


def test_swapped_records_are_found(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    records = list(LEAVES[:600])
    records[300], records[301] = records[301], records[300]
    with pytest.raises(TreeMismatchError, match=r"one of events 257\.\.512"):
        verified(environment, tree, records)


def test_a_dropped_tail_is_found(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    with pytest.raises(
        TreeMismatchError, match=r"591\.\.600 are in the tree but missing"
    ) as caught:
        verified(environment, tree, LEAVES[:590])
    assert (caught.value.first, caught.value.last) == (591, 600)


def test_a_gap_and_a_strange_event_are_named(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])

    def verify(records: list[tuple[int, bytes]]) -> None:
        environment.read(lambda txn: tree.verify(txn, records, Frontier()))

    records = list(enumerate(LEAVES[:600], 1))
    with pytest.raises(TreeMismatchError, match="event 301 is where event 300 belongs"):
        verify(records[:299] + records[300:])
    with pytest.raises(TreeMismatchError, match="event 300 is where event 301 belongs"):
        verify(records[:300] + records[299:])
    with pytest.raises(TreeMismatchError, match="event 601 is in the log but not in the tree"):
        verify([*records, (601, LEAVES[600])])


def test_an_error_of_whoever_reads_the_records_passes(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])

    def records() -> Iterator[tuple[int, bytes]]:
        yield from enumerate(LEAVES[:99], 1)
        raise InternalError("event 100 is damaged")

    with pytest.raises(InternalError, match="event 100 is damaged"):
        environment.read(lambda txn: tree.verify(txn, records(), Frontier()))


def test_a_damaged_or_missing_node_is_named_and_never_used(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:1000])
    key = node_key(8, 1)
    sound = read_row(environment, key)
    assert sound is not None

    def refused(match: str) -> None:
        with pytest.raises(TreeMismatchError, match=match) as caught:
            verified(environment, tree, LEAVES[:1000])
        assert (caught.value.first, caught.value.last) == (257, 512)
        with pytest.raises(TreeMismatchError, match=match):
            environment.read(lambda txn: tree.inclusion_proof(txn, 3, 1000, Asked()))

    for at in (0, 31, 39):
        flip(environment, key, at)
        refused(r"the tree's node is damaged: one of events 257\.\.512")
        flip(environment, key, at)
    write_row(environment, key, sound[:31])
    refused("node is damaged")
    write_row(environment, key, None)
    refused("node is missing")


def test_a_forged_node_is_found_although_its_check_is_right(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:1000])
    write_row(environment, node_key(8, 1), bytes(32))
    with pytest.raises(TreeMismatchError, match=r"one of events 257\.\.512"):
        verified(environment, tree, LEAVES[:1000])
    calls: list[Callable[[Transaction], object]] = [
        lambda txn: tree.inclusion_proof(txn, 3, 1000, Asked()),
        lambda txn: tree.inclusion_proof(txn, 3, 600, Asked()),
        lambda txn: tree.consistency_proof(txn, 256, 1000, Asked()),
        lambda txn: tree.root_at(txn, 256, Asked()),
        lambda txn: tree.node(txn, 8, 1, Asked()),
        lambda txn: tree.node(txn, 8, 0, Asked()),
    ]
    for call in calls:
        with pytest.raises(TreeMismatchError):
            environment.read(call)
    # What does not rest on the node is still answered.
    assert environment.read(lambda txn: tree.root_at(txn, 600, Asked())) == root(600)


def test_records_forged_together_with_their_node_do_not_fit_the_head(
    environment: LMDBEnvironment,
) -> None:
    tree = made(environment, LEAVES[:1000])
    records = list(LEAVES[:1000])
    records[300] = merkle.leaf_hash(b"forged")
    (node,) = Frontier().extend(records[256:512])
    write_row(environment, node_key(8, 1), node.hash)
    with pytest.raises(TreeMismatchError, match=r"tree's head: one of events 1\.\.512"):
        verified(environment, tree, records)
    with pytest.raises(TreeMismatchError, match="do not fit its head of 1000 events"):
        environment.read(lambda txn: tree.inclusion_proof(txn, 300, 1000, Asked(records)))


def test_wrong_leaves_give_no_proof_and_are_named(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    for changed, where in ((300, r"257\.\.512"), (550, r"513\.\.768")):
        records = list(LEAVES[:600])
        records[changed] = merkle.leaf_hash(b"changed")
        for call in (tree.inclusion_proof, tree.consistency_proof):
            with pytest.raises(TreeMismatchError, match=f"one of events {where}"):
                environment.read(
                    lambda txn, call=call, at=changed, have=records: call(  # type: ignore[misc]
                        txn, at - at % 2, 600, Asked(have)
                    )
                )


def test_a_damaged_head_is_refused_by_every_call(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    sound = read_row(environment, b"head")
    assert sound is not None
    for at in (0, 7, 8, len(sound) - 1):
        flip(environment, b"head", at)
        for call in (
            tree.head,
            lambda txn: tree.extend(txn, 601, LEAVES[600:601]),
            lambda txn: tree.root_at(txn, 3, Asked()),
            lambda txn: tree.verify(txn, [], Frontier()),
        ):
            with pytest.raises(InternalError, match="the tree's head is damaged"):
                environment.write(call)
        flip(environment, b"head", at)
    # A right check does not make a head of these.
    for value in (b"", b"\0" * 7, sound[:8], sound[:40], b"\xff" * 8 + bytes(32 * 64)):
        write_row(environment, b"head", value)
        with pytest.raises(InternalError, match="the tree's head is damaged"):
            environment.read(tree.head)
    write_row(environment, b"head", None)
    with pytest.raises(InternalError, match="the tree's head is missing"):
        environment.read(tree.head)


def test_a_forged_head_does_not_fit_nodes_and_records(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    other = list(LEAVES[:600])
    other[10] = merkle.leaf_hash(b"other")
    forged = Frontier()
    forged.extend(other)
    write_row(environment, b"head", b"".join(((600).to_bytes(8), *forged.hashes)))
    with pytest.raises(TreeMismatchError, match=r"the tree's head: one of events 1\.\.512"):
        verified(environment, tree, LEAVES[:600])
    with pytest.raises(TreeMismatchError):
        verified(environment, tree, other)
    with pytest.raises(TreeMismatchError):
        environment.read(lambda txn: tree.inclusion_proof(txn, 20, 600, Asked()))


def test_a_head_that_was_set_back_leaves_nodes_that_tell(environment: LMDBEnvironment) -> None:
    tree = made(environment, LEAVES[:600])
    early = frontier(500)
    write_row(environment, b"head", b"".join(((500).to_bytes(8), *early.hashes)))
    with pytest.raises(TreeMismatchError, match="the tree of 500 events has 3 rows, not 2"):
        verified(environment, tree, LEAVES[:500])
    with pytest.raises(InternalError, match=r"has the node already: one of events 257\.\.512"):
        environment.write(lambda txn: tree.extend(txn, 501, LEAVES[500:600]))


def test_a_file_that_was_rolled_back_is_sound_but_does_not_continue_its_checkpoint(
    tmp_path: Path,
) -> None:
    """Only what left the machine can tell: `eventstore.checkpoint`."""
    with LMDBEnvironment.open(tmp_path / "events") as environment:
        made(environment, LEAVES[:300])
    old = (tmp_path / "events" / "data.mdb").read_bytes()
    with LMDBEnvironment.open(tmp_path / "events") as environment:
        tree = TreeLog(environment, NAME)
        environment.write(lambda txn: tree.extend(txn, 301, LEAVES[300:600]))
        seen = environment.read(tree.head)
    (tmp_path / "events" / "data.mdb").write_bytes(old)
    with LMDBEnvironment.open(tmp_path / "events") as environment:
        tree = TreeLog(environment, NAME)
        assert verified(environment, tree, LEAVES[:300]) == (300, root(300))
        assert environment.read(tree.head).size < seen.size
        # It grows again with another history, and is as large as it was: no proof joins the two.
        fork = [merkle.leaf_hash(b"fork %d" % number) for number in range(400)]
        environment.write(lambda txn: tree.extend(txn, 301, fork))
        now = environment.read(tree.head)
        records = Asked([*LEAVES[:300], *fork])
        proof = environment.read(
            lambda txn: tree.consistency_proof(txn, seen.size, now.size, records)
        )
        with pytest.raises(merkle.ProofError):
            merkle.verify_consistency(*seen, *now, proof)
