"""Sharing, eviction and growth of KV blocks."""

from __future__ import annotations

import pytest

from engine.scheduling.block_manager import BlockManager, BlockTable


def filled(blocks: BlockManager, token_ids: list[int], salt: bytes = b"") -> BlockTable:
    """A table that holds these tokens, the cached prefix taken over."""
    table = BlockTable(salt=salt)
    blocks.attach_prefix(table, blocks.lookup(token_ids, salt, len(token_ids)))
    blocks.grow(table, len(token_ids))
    blocks.cache_full_blocks(table, token_ids, len(token_ids))
    return table


def cached(blocks: BlockManager, token_ids: list[int], salt: bytes = b"") -> int:
    return len(blocks.lookup(token_ids, salt, len(token_ids))) * blocks.block_size


def test_full_blocks_of_a_prefix_are_shared() -> None:
    blocks = BlockManager(8, 4)
    first = filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    assert blocks.num_used == 4
    blocks.check([first, second])
    blocks.release(first)
    blocks.check([second])
    blocks.release(second)
    blocks.check([])
    assert blocks.num_free == 8


def test_block_is_shared_only_after_the_same_prefix() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, [1, 2, 3, 4])
    assert cached(blocks, [3, 4]) == 0
    assert cached(blocks, [9, 9, 3, 4]) == 0
    assert cached(blocks, [1, 2, 3, 4]) == 4
    assert cached(blocks, [1, 2, 3, 9]) == 2


def test_block_is_not_shared_between_salts() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, [1, 2], b"a")
    assert cached(blocks, [1, 2], b"b") == 0
    assert cached(blocks, [1, 2], b"a") == 2


def test_hash_collision_shares_no_block() -> None:
    """hash(-1) == hash(-2) in CPython: the chains collide and still are told apart."""
    assert hash((b"", (-1, 5))) == hash((b"", (-2, 5)))
    blocks = BlockManager(8, 2)
    filled(blocks, [-1, 5, 7, 7])
    assert cached(blocks, [-2, 5, 7, 7]) == 0
    other = filled(blocks, [-2, 5, 7, 7])
    assert blocks.lookup([-2, 5, 7, 7], b"", 4)[0].block == other.blocks[0]


def test_lookup_stops_at_its_limit() -> None:
    blocks = BlockManager(8, 2)
    filled(blocks, [1, 2, 3, 4])
    assert [len(blocks.lookup([1, 2, 3, 4], b"", limit)) for limit in range(5)] == [0, 0, 1, 1, 2]


def test_least_recently_used_prefix_is_evicted_first() -> None:
    blocks = BlockManager(4, 2)
    for token in (1, 2):
        blocks.release(filled(blocks, [token] * 4))
    blocks.release(filled(blocks, [1] * 4))  # used again
    table = BlockTable()
    blocks.grow(table, 2)
    assert cached(blocks, [2] * 4) == 2  # its end went, its beginning is still of use
    assert cached(blocks, [1] * 4) == 4
    blocks.grow(table, 4)
    assert cached(blocks, [2] * 4) == 0
    assert cached(blocks, [1] * 4) == 4
    blocks.check([table])


def test_uncached_blocks_are_reused_before_cached_ones() -> None:
    blocks = BlockManager(4, 2)
    blocks.release(filled(blocks, [1, 2, 3]))  # one full block and one begun
    spare = BlockTable()
    blocks.grow(spare, 6)
    assert cached(blocks, [1, 2]) == 2
    blocks.grow(spare, 8)
    assert cached(blocks, [1, 2]) == 0


def test_equal_blocks_are_indexed_once() -> None:
    blocks = BlockManager(8, 2)
    tables = [BlockTable(), BlockTable()]
    for table in tables:  # both are computed before either is indexed
        blocks.grow(table, 4)
    for table in tables:
        blocks.cache_full_blocks(table, [1, 2, 3, 4], 4)
    assert blocks.num_cached == 2
    assert tables[0].nodes == tables[1].nodes
    blocks.check(tables)
    blocks.release(tables[1])
    blocks.check(tables[:1])
    assert cached(blocks, [1, 2, 3, 4]) == 4


def test_evicted_blocks_are_not_found() -> None:
    blocks = BlockManager(8, 2)
    table = filled(blocks, [1, 2, 3, 4])
    blocks.evict(table.blocks[1:])
    assert cached(blocks, [1, 2, 3, 4]) == 2
    blocks.release(table)
    blocks.check([])
    assert cached(blocks, [1, 2, 3, 4]) == 2


def test_capacity_predicates_agree_with_grow_and_attach() -> None:
    blocks = BlockManager(3, 2)
    blocks.release(filled(blocks, [1, 2, 3, 4]))
    other = BlockTable()
    blocks.grow(other, 2)
    hits = blocks.lookup([1, 2, 3, 4], b"", 4)
    assert len(hits) == 2
    assert blocks.num_unreferenced(hits) == 2
    # Two blocks are free, and both are the hits themselves.
    assert blocks.can_attach_prefix(hits, 4)
    assert not blocks.can_attach_prefix(hits, 5)
    assert not blocks.can_attach_prefix(hits[:1], 5)
    assert blocks.can_grow(other, 6)
    assert not blocks.can_grow(other, 7)
    assert blocks.growable(other) == 6


def test_lookup_finds_nothing_when_caching_is_off() -> None:
    blocks = BlockManager(4, 2, enable_prefix_caching=False)
    filled(blocks, [1, 2])
    assert cached(blocks, [1, 2]) == 0
    assert blocks.num_cached == 0


class TestAudit:
    """`check` sees what it is there to see."""

    def test_check_finds_a_leaked_block(self) -> None:
        blocks = BlockManager(4, 2)
        filled(blocks, [1, 2])
        with pytest.raises(AssertionError, match="1 references, 0 tables"):
            blocks.check([])

    def test_check_finds_a_block_in_use_and_free(self) -> None:
        blocks = BlockManager(4, 2)
        table = filled(blocks, [1, 2])
        blocks._free[table.blocks[0]] = None
        with pytest.raises(AssertionError, match="its place is wrong"):
            blocks.check([table])

    def test_check_finds_an_index_that_names_a_reused_block(self) -> None:
        blocks = BlockManager(4, 2)
        table = filled(blocks, [1, 2])
        blocks._key_of[table.blocks[0]] = None
        with pytest.raises(AssertionError, match="does not hold that prefix"):
            blocks.check([table])
