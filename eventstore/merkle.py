# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Merkle tree of RFC 6962 and RFC 9162: hashes, frontier, proofs and their verifiers.

Pure: it knows numbers and hashes, not where they are kept, nor what a leaf stands for. A tree of n
leaves is all of the first n leaves, so every size that the log once had is a tree of its own, and a
proof of one size says nothing about another.

A *node* is named by level and index: it is the hash over the complete aligned run of 2^level leaves
that begins at leaf ``index << level``. Leaves count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

HASH_BYTES = 32
#: Notification ids are below 2^63, and so is every size.
SIZE_MAX = (1 << 63) - 1
#: No proof in a tree of that size is longer.
PROOF_HASHES_MAX = 64
#: The frontier reports complete runs of 256^n leaves: what a store may keep.
STORED_LEVEL_BITS = 8
#: RFC 6962, section 2.1: the hash of an empty list is the hash of an empty string.
EMPTY_ROOT = sha256().digest()

_LEAF = b"\x00"
_NODE = b"\x01"

#: The hash of the node at (level, index).
NodeReader = Callable[[int, int], bytes]


class ProofError(ValueError):
    """A proof does not prove what it was given for. Nothing that came with it is to be believed."""


class Node(NamedTuple):
    """A complete run of leaves (``number`` is its index), and its hash."""

    level: int
    number: int
    hash: bytes


def leaf_hash(record: bytes) -> bytes:
    """The hash of a leaf: SHA-256(0x00 ‖ record). RFC 6962, section 2.1; RFC 9162, 2.1.1."""
    return sha256(_LEAF + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two neighbours: SHA-256(0x01 ‖ left ‖ right). RFC 6962, section 2.1."""
    return sha256(_NODE + left + right).digest()


def complete_runs(size: int) -> Iterator[tuple[int, int]]:
    """(level, index) of the largest complete runs that cover leaves 0..size-1, from the left.

    There is one for each bit of ``size`` that is set: the places of a frontier's hashes.
    """
    return _runs(0, size)


class Frontier:
    """All that is needed to append to a tree and to know its root: the hashes of its largest
    complete runs, from the left. At most 63 of them.

    Raises ValueError unless there are exactly as many hashes as ``size`` has bits set.
    """

    __slots__ = ("_hashes", "size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        _check_size(size)
        if len(hashes) != size.bit_count() or any(len(each) != HASH_BYTES for each in hashes):
            raise ValueError(f"these {len(hashes)} hashes are no frontier of {size} leaves")
        self.size = size
        self._hashes = list(hashes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frontier):
            return NotImplemented
        return self.size == other.size and self._hashes == other._hashes

    __hash__ = None  # type: ignore[assignment] # it changes

    def __repr__(self) -> str:
        return f"Frontier(size={self.size}, root={self.root().hex()})"

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """The hashes at the places that `complete_runs` gives for this size."""
        return tuple(self._hashes)

    def copy(self) -> Frontier:
        """Another frontier of the same tree; appending to one leaves the other."""
        return Frontier(self.size, self._hashes)

    def extend(self, leaves: Iterable[bytes]) -> list[Node]:
        """Append leaf hashes in order. Returns the nodes of level 8, 16, 24, … that they completed,
        lower ones first, for whoever keeps them.

        Raises ValueError for a leaf that is no hash, or past 2^63-1 leaves; those before it are
        appended then.
        """
        hashes = self._hashes
        completed: list[Node] = []
        for leaf in leaves:
            if len(leaf) != HASH_BYTES:
                raise ValueError(f"a leaf hash has {len(leaf)} bytes, not {HASH_BYTES}")
            left = self.size
            _check_size(left + 1)
            node, level = leaf, 0
            # Adding a leaf is adding one to a binary number: each carry joins two runs.
            while left & 1:
                node = sha256(_NODE + hashes.pop() + node).digest()
                left >>= 1
                level += 1
                if not level % STORED_LEVEL_BITS:
                    completed.append(Node(level, left, node))
            hashes.append(node)
            self.size += 1
        return completed

    def root(self) -> bytes:
        """The hash of the whole tree, MTH of RFC 6962, section 2.1."""
        return _join(self._hashes)


def inclusion_proof(index: int, size: int, node: NodeReader) -> list[bytes]:
    """The audit path of leaf ``index`` in the tree of ``size`` leaves, from the leaf upwards.

    PATH of RFC 6962, section 2.1.1 (RFC 9162, 2.1.3.1). ``node`` is asked only for complete runs
    inside ``size``, and its errors pass through. Raises ValueError unless 0 ≤ index < size.
    """
    _check_size(size)
    if not 0 <= index < size:
        raise ValueError(f"there is no leaf {index} in a tree of {size}")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if index < middle:
            path.append(_range_root(middle, end, node))
            end = middle
        else:
            path.append(_range_root(begin, middle, node))
            begin = middle
    path.reverse()
    return path


def consistency_proof(old: int, new: int, node: NodeReader) -> list[bytes]:
    """The proof that the tree of ``new`` leaves begins with the tree of ``old`` leaves.

    PROOF of RFC 6962, section 2.1.2 (RFC 9162, 2.1.4.1). It is empty if the sizes are equal, and,
    beyond the RFC, if ``old`` is 0. ``node`` as for `inclusion_proof`. Raises ValueError unless
    0 ≤ old ≤ new.
    """
    _check_size(new)
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {new} leaves cannot continue one of {old}")
    proof: list[bytes] = []
    if old == 0:
        return proof
    begin, end = 0, new
    while old != end:
        middle = begin + _split(end - begin)
        if old <= middle:
            proof.append(_range_root(middle, end, node))
            end = middle
        else:
            proof.append(_range_root(begin, middle, node))
            begin = middle
    # The old tree itself, when it is one complete run, is what the verifier holds already.
    if begin:
        proof.append(_range_root(begin, end, node))
    proof.reverse()
    return proof


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Return only if ``leaf`` (a leaf hash) is leaf ``index`` of the tree (``size``, ``root``).

    RFC 9162, section 2.1.3.2. Everything is checked: the bounds of the numbers, the length of each
    hash, and that the proof has as many hashes as the tree has levels there. Raises ProofError.
    """
    _check_proof(proof, leaf, root)
    if not 0 <= index < size <= SIZE_MAX:
        raise ProofError(f"there is no leaf {index} in a tree of {size}")
    fn, sn = index, size - 1
    result = leaf
    for each in proof:
        if sn == 0:
            raise ProofError(f"the inclusion proof of leaf {index} of {size} is too long")
        if fn & 1 or fn == sn:
            result = node_hash(each, result)
            while fn and not fn & 1:
                fn >>= 1
                sn >>= 1
        else:
            result = node_hash(result, each)
        fn >>= 1
        sn >>= 1
    if sn:
        raise ProofError(f"the inclusion proof of leaf {index} of {size} is too short")
    if result != root:
        raise ProofError(f"leaf {index} is not what the tree of {size} leaves holds there")


def verify_consistency(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Return only if the tree (``new_size``, ``new_root``) begins with (``old_size``, ``old_root``).

    RFC 9162, section 2.1.4.2. Both roots are computed from the proof and both must fit. The RFC
    leaves out the empty tree: here every tree continues it, its root must be `EMPTY_ROOT`, and the
    proof must be empty. Raises ProofError.
    """
    _check_proof(proof, old_root, new_root)
    if not 0 <= old_size <= new_size <= SIZE_MAX:
        raise ProofError(f"a tree of {new_size} leaves cannot continue one of {old_size}")
    for size, root in ((old_size, old_root), (new_size, new_root)):
        if size == 0 and root != EMPTY_ROOT:
            raise ProofError("the root of an empty tree is not that of an empty tree")
    if old_size in (0, new_size):
        if proof:
            raise ProofError(f"the consistency proof {old_size} → {new_size} is too long")
        if old_size and old_root != new_root:
            raise ProofError(f"two trees of {new_size} leaves differ")
        return
    old, new = _roots_of_proof(old_size, old_root, new_size, proof)
    if old != old_root or new != new_root:
        raise ProofError(f"the tree of {new_size} leaves does not continue that of {old_size}")


def _roots_of_proof(
    old_size: int, old_root: bytes, new_size: int, proof: Sequence[bytes]
) -> tuple[bytes, bytes]:
    """The two roots that a consistency proof leads to, for 0 < old < new."""
    # A power of two is one complete run, and the proof leaves out its hash.
    steps = [old_root, *proof] if old_size.bit_count() == 1 else list(proof)
    if not steps:
        raise ProofError(f"the consistency proof {old_size} → {new_size} is too short")
    fn, sn = old_size - 1, new_size - 1
    while fn & 1:
        fn >>= 1
        sn >>= 1
    old = new = steps[0]
    for each in steps[1:]:
        if sn == 0:
            raise ProofError(f"the consistency proof {old_size} → {new_size} is too long")
        if fn & 1 or fn == sn:
            old = node_hash(each, old)
            new = node_hash(each, new)
            while fn and not fn & 1:
                fn >>= 1
                sn >>= 1
        else:
            new = node_hash(new, each)
        fn >>= 1
        sn >>= 1
    if sn:
        raise ProofError(f"the consistency proof {old_size} → {new_size} is too short")
    return old, new


def _range_root(begin: int, end: int, node: NodeReader) -> bytes:
    """The hash over leaves begin..end-1, for a range that stands in the tree as a whole."""
    return _join([node(level, index) for level, index in _runs(begin, end)])


def _runs(begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin < end:
        level = (end - begin).bit_length() - 1
        yield level, begin >> level
        begin += 1 << level


def _join(hashes: Sequence[bytes]) -> bytes:
    if not hashes:
        return EMPTY_ROOT
    result = hashes[-1]
    for left in reversed(hashes[:-1]):
        result = node_hash(left, result)
    return result


def _split(count: int) -> int:
    """The largest power of two below ``count``: where RFC 6962 divides a list of ``count`` > 1."""
    return 1 << ((count - 1).bit_length() - 1)


def _check_size(size: int) -> None:
    if not 0 <= size <= SIZE_MAX:
        raise ValueError(f"a tree's size {size} is not within 0..2^63-1")


def _check_proof(proof: Sequence[bytes], *others: bytes) -> None:
    if len(proof) > PROOF_HASHES_MAX:
        raise ProofError(f"a proof of {len(proof)} hashes is longer than any tree is high")
    if any(len(each) != HASH_BYTES for each in (*proof, *others)):
        raise ProofError(f"a hash does not have {HASH_BYTES} bytes")
