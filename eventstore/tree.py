# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Merkle tree over the records of one log, kept in LMDB beside it and changed in the same
transactions.

It knows hashes and notification ids, not records: whoever has the records gives their leaf hashes.
Leaf ``i`` (from 0) is the record with notification id ``i + 1``.

Rows of the one database, all integers big-endian:

head   key: the four letters ``head``. Value: size u64; the frontier, 32 bytes for each bit of the
       size that is set, the largest run first; check u64. A tree without the row is empty
node   for every complete run of 256, 256^2, 256^3, … leaves. Key: level u8 (8, 16, 24, …), index
       u64. Value: the 32 bytes of the run's hash; check u64
check  xxh3-64 of key and value without the check

What lies between is computed again: the lowest levels from the leaf hashes of one block of 256, the
others from up to 128 nodes. Checks find damage, not intent: so every answer about the tree is also
proven against the head's root before it is given, and a head is proven against what has left this
machine (`eventstore.checkpoint`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import xxhash
from eventsourcing.persistence import InternalError, ProgrammingError

from eventstore import merkle
from eventstore.environment import LMDBEnvironment
from eventstore.merkle import HASH_BYTES, Frontier

if TYPE_CHECKING:
    from eventstore.environment import Transaction

BLOCK_LEVEL = merkle.STORED_LEVEL_BITS
#: Leaves under one node of the lowest level that is stored.
BLOCK_LEAVES = 1 << BLOCK_LEVEL

_HEAD_KEY = b"head"
_NODE_KEY = struct.Struct(">BQ")
_CHECK_BYTES = 8

#: Called as ``leaves(first_index, count)`` for the leaf hashes of one block or, in the last block,
#: of its beginning: ``first_index`` is a multiple of 256 and ``count`` within 1..256.
Leaves = Callable[[int, int], Sequence[bytes]]


class TreeMismatchError(InternalError):
    """Records and tree do not fit each other, or the tree not itself.

    The fault is in the events with notification ids ``first``..``last``, or in the tree's rows over
    them.
    """

    def __init__(self, message: str, first: int, last: int) -> None:
        super().__init__(message)
        self.first = first
        self.last = last


class Head(NamedTuple):
    """The state of a whole log: how many events, and the root over them."""

    size: int
    root: bytes


class Verified(NamedTuple):
    """What `TreeLog.verify` has seen to be true; ``frontier`` is where the next call begins."""

    size: int
    root: bytes
    frontier: Frontier


class TreeLog:
    """The tree of the log that is called ``name`` (it ends in a slash) in an environment.

    Methods take the caller's transaction, so that tree and records are of one state; nothing is
    kept between calls, so several processes may have it open. Opening it blocks, and so does every
    method. Raises OperationalError if the tree is not there and not to be made, ProgrammingError
    if made inside a write.
    """

    __slots__ = ("_database", "name")

    def __init__(self, environment: LMDBEnvironment, name: str, *, create: bool = True) -> None:
        self.name = name
        self._database = environment.database(f"{name}tree", create=create)

    def extend(self, txn: Transaction, first_nid: int, leaves: Sequence[bytes]) -> None:
        """Append the leaf hashes of the records ``first_nid``, ``first_nid + 1``, …

        Raises InternalError if they do not follow the tree's last leaf, or a row is damaged: the
        transaction must be aborted then. ValueError for a leaf that is no hash.
        """
        frontier = self._frontier(txn)
        if first_nid != frontier.size + 1:
            raise InternalError(
                f"event {first_nid} does not follow the {frontier.size} events in the tree"
            )
        if not leaves:
            return
        for level, index, value in frontier.extend(leaves):
            key = _NODE_KEY.pack(level, index)
            if not txn.put(key, _sealed(key, value), overwrite=False, db=self._database):
                raise _mismatch("the tree has the node already", level, index)
        value = b"".join((frontier.size.to_bytes(8), *frontier.hashes))
        txn.put(_HEAD_KEY, _sealed(_HEAD_KEY, value), db=self._database)

    def head(self, txn: Transaction) -> Head:
        """Size and root of the whole tree. Raises InternalError if the row is damaged."""
        frontier = self._frontier(txn)
        return Head(frontier.size, frontier.root())

    def _frontier(self, txn: Transaction) -> Frontier:
        row = txn.get(_HEAD_KEY, db=self._database)
        if row is None:
            if txn.stat(self._database)["entries"]:
                raise InternalError("the tree's head is missing, but there are nodes")
            return Frontier()
        value = _opened(_HEAD_KEY, row)
        if value is None or len(value) % HASH_BYTES != 8:
            raise InternalError("the tree's head is damaged")
        try:
            return Frontier(
                int.from_bytes(value[:8]),
                [value[at : at + HASH_BYTES] for at in range(8, len(value), HASH_BYTES)],
            )
        except ValueError as error:
            raise InternalError(f"the tree's head is damaged: {error}") from error

    def node(self, txn: Transaction, level: int, index: int, leaves: Leaves) -> bytes:
        """The hash of the complete run of 2^level leaves that begins at ``index << level``.

        Raises ProgrammingError unless the tree has it, otherwise as `root_at`.
        """
        nodes = self._nodes(txn, leaves)
        if not (0 <= level < 63 and index >= 0 and (index + 1) << level <= nodes.size):
            raise ProgrammingError(f"a tree of {nodes.size} events has no node {level}/{index}")
        return nodes.proven(level, index)

    def frontier_at(self, txn: Transaction, size: int, leaves: Leaves) -> Frontier:
        """The frontier that the tree had when it held ``size`` events. Raises as `root_at`."""
        nodes = self._nodes(txn, leaves)
        nodes.check(size)
        return nodes.frontier(size)

    def root_at(self, txn: Transaction, size: int, leaves: Leaves) -> bytes:
        """The root that the tree had when it held ``size`` events.

        Raises TreeMismatchError if nodes, leaves and head do not fit each other, InternalError if
        the head or what ``leaves`` gave is damaged, ProgrammingError if the tree never was so large.
        """
        return self.frontier_at(txn, size, leaves).root()

    def inclusion_proof(
        self, txn: Transaction, index: int, size: int, leaves: Leaves
    ) -> list[bytes]:
        """The proof that leaf ``index`` (nid - 1) is in the tree of ``size`` events, for
        `merkle.verify_inclusion`.

        Asks ``leaves`` for two blocks at most. Raises ProgrammingError unless 0 ≤ index < size ≤
        the tree's size, otherwise as `root_at`.
        """
        nodes = self._nodes(txn, leaves)
        nodes.check(size)
        if not 0 <= index < size:
            raise ProgrammingError(f"there is no leaf {index} in a tree of {size} events")
        root = nodes.frontier(size).root()
        proof = merkle.inclusion_proof(index, size, nodes)
        with nodes.blaming():
            merkle.verify_inclusion(nodes(0, index), index, size, proof, root)
        return proof

    def consistency_proof(
        self, txn: Transaction, old: int, new: int, leaves: Leaves
    ) -> list[bytes]:
        """The proof that the tree of ``new`` events continues that of ``old``, for
        `merkle.verify_consistency`.

        Asks ``leaves`` for two blocks at most. Raises ProgrammingError unless 0 ≤ old ≤ new ≤ the
        tree's size, otherwise as `root_at`.
        """
        nodes = self._nodes(txn, leaves)
        nodes.check(new)
        if not 0 <= old <= new:
            raise ProgrammingError(f"a tree of {new} events cannot continue one of {old}")
        roots = nodes.frontier(old).root(), nodes.frontier(new).root()
        proof = merkle.consistency_proof(old, new, nodes)
        with nodes.blaming():
            merkle.verify_consistency(old, roots[0], new, roots[1], proof)
        return proof

    def verify(
        self,
        txn: Transaction,
        leaf_hashes: Iterable[tuple[int, bytes]],
        start: Frontier,
        stop: int | None = None,
    ) -> Verified:
        """Compute the tree again from records, and compare it with every node on the way.

        ``leaf_hashes`` gives (nid, leaf hash) in order from ``start.size + 1``; its own errors, for
        instance of a damaged record, pass through. ``start`` is an empty frontier, one that an
        earlier call returned, or `frontier_at`. With ``stop`` None the records must reach the head
        and end there, and the head is compared too; otherwise they are read up to ``stop``, so that
        a long log can be verified in several short transactions, the last of them without ``stop``.
        A part that was taken out of the middle is compared with its nodes only: `root_at` proves
        these against the head.

        Raises TreeMismatchError naming the events where it does not fit: one event if it is missing
        or not in the tree, else a block of 256, since a wrong record only shows in the hash of its
        block. ProgrammingError if ``start`` or ``stop`` is not within the tree.
        """
        head = self._frontier(txn)
        last = head.size if stop is None else stop
        if not start.size <= last <= head.size:
            raise ProgrammingError(
                f"events {start.size + 1}..{last} are not within a tree of {head.size} events"
            )
        frontier = start.copy()
        for block in _in_blocks(leaf_hashes, frontier.size, last, head.size):
            for level, index, value in frontier.extend(block):
                if self._row(txn, level, index) != value:
                    raise _mismatch("records do not have the hash in the tree", level, index)
        if frontier.size < last:
            raise TreeMismatchError(
                f"events {frontier.size + 1}..{last} are in the tree but missing from the log",
                frontier.size + 1,
                last,
            )
        if frontier.size == head.size:
            self._check_head(txn, head, frontier)
        return Verified(frontier.size, frontier.root(), frontier)

    def _check_head(self, txn: Transaction, head: Frontier, computed: Frontier) -> None:
        places = zip(merkle.complete_runs(head.size), head.hashes, computed.hashes, strict=True)
        for (level, index), expected, value in places:
            if expected != value:
                raise _mismatch("records do not have the hash in the tree's head", level, index)
        rows, level = int(head.size > 0), BLOCK_LEVEL
        while head.size >> level:
            rows += head.size >> level
            level += BLOCK_LEVEL
        found = txn.stat(self._database)["entries"]
        if found != rows:
            raise TreeMismatchError(
                f"the tree of {head.size} events has {found} rows, not {rows}", 1, head.size
            )

    def _nodes(self, txn: Transaction, leaves: Leaves) -> _Nodes:
        return _Nodes(
            self._frontier(txn), lambda level, index: self._row(txn, level, index), leaves
        )

    def _row(self, txn: Transaction, level: int, index: int) -> bytes:
        key = _NODE_KEY.pack(level, index)
        row = txn.get(key, db=self._database)
        if row is None:
            raise _mismatch("the tree's node is missing", level, index)
        value = _opened(key, row)
        if value is None or len(value) != HASH_BYTES:
            raise _mismatch("the tree's node is damaged", level, index)
        return value


class _Nodes:
    """Gives the hash of any complete run, for the length of one call on the tree: from the head's
    frontier, a row, or computed from those below; and proves answers against the head.
    """

    __slots__ = ("_blocks", "_head", "_known", "_leaves", "_root", "_row", "size")

    def __init__(self, head: Frontier, row: merkle.NodeReader, leaves: Leaves) -> None:
        self.size = head.size
        self._head = head
        self._root = head.root()
        self._row = row
        self._leaves = leaves
        self._known = dict(zip(merkle.complete_runs(head.size), head.hashes, strict=True))
        self._blocks: dict[int, list[bytes]] = {}

    def __call__(self, level: int, index: int) -> bytes:
        place = level, index
        found = self._known.get(place)
        if found is None:
            # At most 7 calls deep: to the next level that is stored, or to the leaves.
            if level == 0:
                block = self._block(index >> BLOCK_LEVEL)
                found = block[index % BLOCK_LEAVES]
            elif level % BLOCK_LEVEL == 0:
                found = self._row(level, index)
            else:
                found = merkle.node_hash(self(level - 1, 2 * index), self(level - 1, 2 * index + 1))
            self._known[place] = found
        return found

    def check(self, size: int) -> None:
        if not 0 <= size <= self.size:
            raise ProgrammingError(f"a tree of {self.size} events never had {size} only")

    def frontier(self, size: int) -> Frontier:
        """The frontier of the first ``size`` leaves, proven against the head."""
        frontier = Frontier(size, [self(*place) for place in merkle.complete_runs(size)])
        proof = merkle.consistency_proof(size, self.size, self)
        with self.blaming():
            merkle.verify_consistency(size, frontier.root(), self.size, self._root, proof)
        return frontier

    def proven(self, level: int, index: int) -> bytes:
        """A node, proven against the head: it is a leaf of the tree whose leaves are the runs of
        its level.
        """
        runs = index + 1
        root = self.frontier(runs << level).root()
        proof = merkle.inclusion_proof(index, runs, lambda up, at: self(level + up, at))
        with self.blaming():
            merkle.verify_inclusion(self(level, index), index, runs, proof, root)
        return self(level, index)

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Say of a proof that fails, as far as it can be known, which events are to blame."""
        try:
            yield
        except merkle.ProofError as error:
            for number, block in self._blocks.items():
                computed = Frontier()
                full = bool(computed.extend(block))
                runs = computed.hashes
                # A last block that is not full has no node yet: its runs end the head's frontier.
                stored = (
                    (self._row(BLOCK_LEVEL, number),) if full else self._head.hashes[-len(runs) :]
                )
                if runs != stored:
                    raise _mismatch(
                        "records do not have the hash in the tree", BLOCK_LEVEL, number
                    ) from error
            raise TreeMismatchError(
                f"the nodes of the tree do not fit its head of {self.size} events", 1, self.size
            ) from error

    def _block(self, number: int) -> list[bytes]:
        block = self._blocks.get(number)
        if block is None:
            first = number << BLOCK_LEVEL
            count = min(BLOCK_LEAVES, self.size - first)
            block = list(self._leaves(first, count))
            if len(block) != count or any(len(leaf) != HASH_BYTES for leaf in block):
                raise InternalError(f"these are not the leaf hashes of {count} events")
            self._blocks[number] = block
        return block


def _in_blocks(
    leaf_hashes: Iterable[tuple[int, bytes]], size: int, last: int, end: int
) -> Iterator[list[bytes]]:
    """The leaf hashes of events ``size + 1``..``last``, cut where a block of the tree ends. The
    tree has ``end`` events.
    """
    block: list[bytes] = []
    for nid, leaf in leaf_hashes:
        if nid > end and size == end:
            raise TreeMismatchError(f"event {nid} is in the log but not in the tree", nid, nid)
        if nid > last and size == last:
            break
        size += 1
        if nid != size:
            raise TreeMismatchError(
                f"event {nid} is where event {size} belongs in the log", size, size
            )
        block.append(leaf)
        if not size % BLOCK_LEAVES:
            yield block
            block = []
    yield block


def _mismatch(what: str, level: int, index: int) -> TreeMismatchError:
    first, last = (index << level) + 1, (index + 1) << level
    which = f"event {first}" if first == last else f"one of events {first}..{last}"
    return TreeMismatchError(f"{what}: {which}", first, last)


def _sealed(key: bytes, value: bytes) -> bytes:
    return value + xxhash.xxh3_64_digest(key + value)


def _opened(key: bytes, row: bytes) -> bytes | None:
    """The value of a row, None if it does not have its checksum."""
    value = row[:-_CHECK_BYTES]
    return value if row == _sealed(key, value) else None
