# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pymerkle  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventstore import merkle
from eventstore.merkle import Frontier, ProofError

# Inputs, roots and proofs of the certificate-transparency project's reference tests of RFC 6962.
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    bytes.fromhex(text)
    for text in (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    )
]
NODE_0_1 = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
NODE_2_3 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
NODE_4_5 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
NODE_6_7 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
NODE_0_3 = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"
NODE_4_7 = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
LEAF_1 = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
LEAF_4 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
LEAF_5 = "4271a26be0d8a84f0bd54c8c302e7cb3a3b5d1fa6780a40bcce2873477dab658"
INCLUSION = [
    (0, 1, []),
    (0, 8, [LEAF_1, NODE_2_3, NODE_4_7]),
    (5, 8, [LEAF_4, NODE_6_7, NODE_0_3]),
    (2, 3, [NODE_0_1]),
    (1, 5, ["6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d", NODE_2_3, LEAF_4]),
]
CONSISTENCY = [
    (1, 1, []),
    (1, 8, [LEAF_1, NODE_2_3, NODE_4_7]),
    (6, 8, [NODE_4_5, NODE_6_7, NODE_0_3]),
    (2, 5, [NODE_2_3, LEAF_4]),
]
SIZES_MAX = 70

LEAVES = [merkle.leaf_hash(bytes([number])) for number in range(SIZES_MAX)]
sizes = st.integers(0, SIZES_MAX)


@cache
def root(size: int) -> bytes:
    frontier = Frontier()
    frontier.extend(LEAVES[:size])
    return frontier.root()


@cache
def judge(size: int) -> pymerkle.InmemoryTree:
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for number in range(size):
        tree.append_entry(bytes([number]))
    return tree


def node_of(leaves: Sequence[bytes]) -> merkle.NodeReader:
    def node(level: int, index: int) -> bytes:
        assert (index + 1) << level <= len(leaves), "a run that is not complete was asked for"
        if level == 0:
            return leaves[index]
        return merkle.node_hash(node(level - 1, 2 * index), node(level - 1, 2 * index + 1))

    return node


def included(index: int, size: int) -> list[bytes]:
    return merkle.inclusion_proof(index, size, node_of(LEAVES[:size]))


def consistent(old: int, new: int) -> list[bytes]:
    return merkle.consistency_proof(old, new, node_of(LEAVES[:new]))


def test_roots_are_the_published_ones() -> None:
    frontier = Frontier()
    assert [frontier.root()] == ROOTS[:1]
    for size, record in enumerate(INPUTS, start=1):
        frontier.extend([merkle.leaf_hash(record)])
        assert (frontier.size, frontier.root()) == (size, ROOTS[size])


@pytest.mark.parametrize(("index", "size", "published"), INCLUSION)
def test_inclusion_proofs_are_the_published_ones(
    index: int, size: int, published: list[str]
) -> None:
    leaves = [merkle.leaf_hash(record) for record in INPUTS[:size]]
    proof = merkle.inclusion_proof(index, size, node_of(leaves))
    assert [each.hex() for each in proof] == published
    merkle.verify_inclusion(leaves[index], index, size, proof, ROOTS[size])


@pytest.mark.parametrize(("old", "new", "published"), CONSISTENCY)
def test_consistency_proofs_are_the_published_ones(
    old: int, new: int, published: list[str]
) -> None:
    leaves = [merkle.leaf_hash(record) for record in INPUTS[:new]]
    proof = merkle.consistency_proof(old, new, node_of(leaves))
    assert [each.hex() for each in proof] == published
    merkle.verify_consistency(old, ROOTS[old], new, ROOTS[new], proof)


def test_another_implementation_has_the_same_roots_and_inclusion_paths() -> None:
    tree = judge(SIZES_MAX)
    for size in range(1, SIZES_MAX + 1):
        assert tree.get_root(size) == root(size)
        for index in range(size):
            theirs = tree.prove_inclusion(index + 1, size)
            # Theirs begins with the leaf itself, which RFC 9162 leaves out.
            assert theirs.path == [LEAVES[index], *included(index, size)]


def test_another_implementation_accepts_our_inclusion_proofs_and_refuses_forged_ones() -> None:
    for index, size in [(0, 1), (0, 2), (4, 5), (37, 70), (63, 64), (64, 65), (69, 70)]:
        theirs = judge(SIZES_MAX).prove_inclusion(index + 1, size)
        theirs.path = [LEAVES[index], *included(index, size)]
        pymerkle.verify_inclusion(LEAVES[index], root(size), theirs, index + 1, size)
        with pytest.raises(pymerkle.InvalidProof):
            pymerkle.verify_inclusion(LEAVES[index], root(size - 1), theirs, index + 1, size)


@given(sizes.filter(bool), sizes.filter(bool))
def test_another_implementation_proves_that_our_roots_continue_each_other(a: int, b: int) -> None:
    old, new = sorted((a, b))
    proof = judge(SIZES_MAX).prove_consistency(old, new)
    pymerkle.verify_consistency(root(old), root(new), proof, old, new)
    merkle.verify_consistency(old, root(old), new, root(new), consistent(old, new))


@given(sizes, sizes)
def test_every_size_continues_every_smaller_one_and_no_other_root_does(a: int, b: int) -> None:
    old, new = sorted((a, b))
    proof = consistent(old, new)
    merkle.verify_consistency(old, root(old), new, root(new), proof)
    wrong = bytes(32)
    with pytest.raises(ProofError):
        merkle.verify_consistency(old, wrong, new, root(new), proof)
    # Nothing is known of what follows an empty tree.
    if old or not new:
        with pytest.raises(ProofError):
            merkle.verify_consistency(old, root(old), new, wrong, proof)


@given(st.data())
def test_a_proof_holds_for_one_leaf_at_one_place_in_one_tree_only(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, SIZES_MAX))
    index = data.draw(st.integers(0, size - 1))
    other_index = data.draw(st.integers(0, SIZES_MAX).filter(lambda other: other != index))
    other_size = data.draw(st.integers(0, SIZES_MAX).filter(lambda other: other != size))
    proof = included(index, size)
    merkle.verify_inclusion(LEAVES[index], index, size, proof, root(size))
    refuse_inclusion(LEAVES[index], other_index, size, proof, root(size))
    refuse_inclusion(LEAVES[index], index, size, proof, root(other_size))
    refuse_inclusion(LEAVES[index - 1], index, size, proof, root(size), unless=size == 1)
    # The same hashes may prove a place in a tree of another size, but not with that tree's root.
    if other_size:
        refuse_inclusion(LEAVES[index], index, other_size, proof, root(other_size))


def refuse_inclusion(
    leaf: bytes,
    index: int,
    size: int,
    proof: Sequence[bytes],
    expected: bytes,
    *,
    unless: bool = False,
) -> None:
    if not unless:
        with pytest.raises(ProofError):
            merkle.verify_inclusion(leaf, index, size, proof, expected)


def changed(proof: list[bytes], data: st.DataObject) -> list[bytes]:
    """A proof with one thing wrong."""
    at = data.draw(st.integers(0, max(len(proof) - 1, 0)))
    flipped = bytes([proof[at][0] ^ 1]) + proof[at][1:] if proof else b""
    ways: list[Callable[[], list[bytes]]] = [
        lambda: [*proof, bytes(32)],
        lambda: [bytes(32), *proof],
        lambda: [*proof, *proof, b""],
    ]
    if proof:
        ways += [
            lambda: [*proof, proof[-1]],
            lambda: proof[:-1],
            lambda: proof[1:],
            lambda: [*proof[:at], flipped, *proof[at + 1 :]],
            lambda: [*proof[:at], proof[at][:31], *proof[at + 1 :]],
            lambda: [*proof[:at], proof[at] + b"\0", *proof[at + 1 :]],
        ]
    if len(set(proof)) > 1:
        ways.append(lambda: proof[::-1])
    return data.draw(st.sampled_from(ways))()


@given(st.data())
def test_a_changed_inclusion_proof_is_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, SIZES_MAX))
    index = data.draw(st.integers(0, size - 1))
    proof = changed(included(index, size), data)
    refuse_inclusion(LEAVES[index], index, size, proof, root(size))


@given(st.data())
def test_a_changed_consistency_proof_is_refused(data: st.DataObject) -> None:
    new = data.draw(sizes)
    old = data.draw(st.integers(0, new))
    proof = changed(consistent(old, new), data)
    with pytest.raises(ProofError):
        merkle.verify_consistency(old, root(old), new, root(new), proof)


@given(st.data())
def test_a_consistency_proof_of_other_sizes_is_refused(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, SIZES_MAX))
    old = data.draw(st.integers(1, new - 1))
    other = data.draw(st.integers(1, new - 1).filter(lambda other: other != old))
    with pytest.raises(ProofError):
        merkle.verify_consistency(other, root(other), new, root(new), consistent(old, new))
    with pytest.raises(ProofError):
        merkle.verify_consistency(old, root(old), new - 1, root(new - 1), consistent(old, new))


@pytest.mark.parametrize(
    ("index", "size"), [(-1, 1), (1, 1), (0, 0), (5, 3), (0, 1 << 63), (1 << 63, 1 << 64)]
)
def test_numbers_out_of_bounds_prove_nothing(index: int, size: int) -> None:
    with pytest.raises(ProofError, match="there is no leaf"):
        merkle.verify_inclusion(LEAVES[0], index, size, [], LEAVES[0])
    with pytest.raises(ValueError, match=r"there is no leaf|not within"):
        merkle.inclusion_proof(index, size, node_of(LEAVES))


@pytest.mark.parametrize(("old", "new"), [(-1, 1), (2, 1), (1, 1 << 63), (-2, -1)])
def test_sizes_out_of_bounds_are_not_consistent(old: int, new: int) -> None:
    with pytest.raises(ProofError, match="cannot continue"):
        merkle.verify_consistency(old, root(1), new, root(1), [])
    with pytest.raises(ValueError, match=r"cannot continue|not within"):
        merkle.consistency_proof(old, new, node_of(LEAVES))


def test_the_largest_tree_has_proofs() -> None:
    # All its leaves are the same, so that a run's hash depends on its level alone.
    runs = [LEAVES[0]]
    for _ in range(63):
        runs.append(merkle.node_hash(runs[-1], runs[-1]))

    def node(level: int, index: int) -> bytes:
        assert (index + 1) << level <= merkle.SIZE_MAX
        return runs[level]

    whole = Frontier(merkle.SIZE_MAX, runs[62::-1]).root()
    for index in (0, 12345, merkle.SIZE_MAX - 1):
        proof = merkle.inclusion_proof(index, merkle.SIZE_MAX, node)
        merkle.verify_inclusion(LEAVES[0], index, merkle.SIZE_MAX, proof, whole)
    for old in (1, 3, 1 << 62, merkle.SIZE_MAX - 1):
        places = merkle.complete_runs(old)
        small = Frontier(old, [runs[level] for level, _ in places]).root()
        proof = merkle.consistency_proof(old, merkle.SIZE_MAX, node)
        assert len(proof) <= merkle.PROOF_HASHES_MAX
        merkle.verify_consistency(old, small, merkle.SIZE_MAX, whole, proof)


def test_an_endless_proof_is_refused_before_it_is_hashed() -> None:
    with pytest.raises(ProofError, match="longer than any tree"):
        merkle.verify_inclusion(LEAVES[0], 0, merkle.SIZE_MAX, [bytes(32)] * 65, root(1))


def test_a_proof_that_goes_on_above_the_root_is_too_long() -> None:
    for size in range(1, 20):
        # The verifier stops there: what follows is not hashed, whatever it is.
        with pytest.raises(ProofError, match="too long"):
            merkle.verify_inclusion(LEAVES[0], 0, size, [*included(0, size), bytes(32)], root(size))
        proof = [*consistent(size, size + 1), bytes(32)]
        with pytest.raises(ProofError, match="too long"):
            merkle.verify_consistency(size, root(size), size + 1, root(size + 1), proof)


def test_a_proof_without_hashes_never_joins_two_sizes() -> None:
    for old in range(1, 9):
        with pytest.raises(ProofError, match="too short"):
            merkle.verify_consistency(old, root(old), old + 1, root(old + 1), [])


@given(st.lists(st.integers(0, 20), max_size=6))
def test_a_frontier_is_the_same_however_the_leaves_arrive(parts: list[int]) -> None:
    frontier, total = Frontier(), min(sum(parts), SIZES_MAX)
    at = 0
    for count in parts:
        frontier.extend(LEAVES[at : at + count])
        at += count
        # As a store would keep it.
        frontier = Frontier(frontier.size, frontier.hashes)
    assert frontier.size == total
    assert frontier.root() == root(total)
    assert len(frontier.hashes) == total.bit_count()


def test_a_frontier_reports_the_nodes_that_a_store_keeps() -> None:
    leaves = [merkle.leaf_hash(number.to_bytes(3)) for number in range(1 << 16)]
    frontier = Frontier()
    assert frontier.extend(leaves[:255]) == []
    (first,) = frontier.extend(leaves[255:256])
    assert (first.level, first.number, first.hash) == (8, 0, frontier.root())
    rest = frontier.extend(leaves[256:])
    assert [(node.level, node.number) for node in rest[:-1]] == [(8, n) for n in range(1, 256)]
    assert rest[-1] == (16, 0, frontier.root())


def test_a_copy_of_a_frontier_goes_its_own_way() -> None:
    frontier = Frontier()
    frontier.extend(LEAVES[:3])
    other = frontier.copy()
    assert other == frontier
    other.extend(LEAVES[3:4])
    assert other != frontier
    assert Frontier(1, LEAVES[:1]) != Frontier(1, LEAVES[1:2])
    assert other != "a frontier"
    assert (frontier.root(), other.root()) == (root(3), root(4))
    assert repr(other) == f"Frontier(size=4, root={root(4).hex()})"


@pytest.mark.parametrize(
    ("size", "hashes"),
    [(1, []), (0, [bytes(32)]), (3, [bytes(32)]), (1, [bytes(31)]), (-1, []), (1 << 63, [b""])],
)
def test_what_is_no_frontier_is_refused(size: int, hashes: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"no frontier|not within"):
        Frontier(size, hashes)


def test_what_is_no_leaf_hash_is_not_appended() -> None:
    frontier = Frontier()
    with pytest.raises(ValueError, match="leaf hash has 5 bytes"):
        frontier.extend([LEAVES[0], b"event"])
    assert frontier.size == 1
    full = Frontier(merkle.SIZE_MAX, [bytes(32)] * 63)
    with pytest.raises(ValueError, match="not within"):
        full.extend(LEAVES[:1])
