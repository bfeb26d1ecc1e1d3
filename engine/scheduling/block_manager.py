"""Which sequences hold which blocks of the KV cache, and which blocks can be shared.

blocks      0      1      2      3      4      5            physical blocks of `block_size` positions
references  2      1      0      0      1      0            how many block tables name the block
content     A·     A·B    A·C    -      -      D·           "A·B": indexed as the prefix A, B; "-": not indexed
                          |      |             |
free list          front [3, 2, 5] back                     no references; the front is reused first (LRU)
"""

# A prefix is a chain of nodes, one a full block. The index maps (parent node, the block's tokens) to a node, and a
# node's number is never used twice; the first block's parent is the salt. Python's dict compares keys by equality, so
# a hash collision can slow a lookup but never show one request another's text.

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from kernels.integers import ceil_div

Node = int
_Key = tuple[Hashable, tuple[int, ...]]


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks. `blocks[i]` holds positions `i * block_size .. (i + 1) * block_size`."""

    salt: Hashable = b""
    """Prefixes are shared only under equal salts. No int: those are nodes."""

    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """`nodes[i]` stands for everything up to and including block i; only full blocks have one."""


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A cached block that continues a prefix."""

    node: Node
    block: int


class BlockManager:
    """Hands out blocks, counts references, and remembers full blocks until their room is needed."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a KV cache has at least one block of one position")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._index: dict[_Key, CachedBlock] = {}
        self._key_of: list[_Key | None] = [None] * num_blocks
        self._next_node = itertools.count()

    @property
    def num_free(self) -> int:
        """Blocks that no table names, whether or not they hold a cached prefix."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold an indexed prefix, in use or not."""
        return len(self._index)

    def blocks_for(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.block_size)

    def lookup(self, token_ids: Sequence[int], salt: Hashable, max_tokens: int) -> list[CachedBlock]:
        """The longest cached prefix of `token_ids`, in whole blocks and at most `max_tokens` long."""
        if not self.enable_prefix_caching:
            return []
        cached: list[CachedBlock] = []
        parent: Hashable = salt
        for end in range(self.block_size, max_tokens + 1, self.block_size):
            found = self._index.get((parent, tuple(token_ids[end - self.block_size : end])))
            if found is None:
                break
            cached.append(found)
            parent = found.node
        return cached

    def num_unreferenced(self, cached: Iterable[CachedBlock]) -> int:
        """How many of these cached blocks are free now, so that attaching them uses up free blocks."""
        return sum(self._references[found.block] == 0 for found in cached)

    def can_attach_prefix(self, cached: Sequence[CachedBlock], num_tokens: int) -> bool:
        """Whether `attach_prefix(cached)` and then `grow(num_tokens)` of an empty table would succeed."""
        return self.blocks_for(num_tokens) - len(cached) <= self.num_free - self.num_unreferenced(cached)

    def attach_prefix(self, table: BlockTable, cached: Iterable[CachedBlock]) -> None:
        """Let an empty table begin with a cached prefix."""
        for found in cached:
            if self._references[found.block] == 0:
                del self._free[found.block]
            self._references[found.block] += 1
            table.blocks.append(found.block)
            table.nodes.append(found.node)

    def can_grow(self, table: BlockTable, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) - len(table.blocks) <= self.num_free

    def growable(self, table: BlockTable) -> int:
        """How many positions the table could cover if it took every free block."""
        return (len(table.blocks) + self.num_free) * self.block_size

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Let the table cover `num_tokens` positions; what the reused blocks had cached is forgotten."""
        for _ in range(self.blocks_for(num_tokens) - len(table.blocks)):
            block, _ = self._free.popitem(last=False)
            self._evict(block)
            self._references[block] = 1
            table.blocks.append(block)

    def cache_full_blocks(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` positions findable.

        A block whose content is indexed already stays a private copy; its successors continue the indexed chain.
        """
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        for position in range(len(table.nodes), num_tokens // size):
            parent = table.nodes[-1] if table.nodes else table.salt
            key = (parent, tuple(token_ids[position * size : (position + 1) * size]))
            found = self._index.get(key)
            if found is None:
                block = table.blocks[position]
                found = self._index[key] = CachedBlock(next(self._next_node), block)
                self._key_of[block] = key
            table.nodes.append(found.node)

    def evict(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable because their content was never computed or is not to be trusted."""
        for block in blocks:
            self._evict(block)
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def release(self, table: BlockTable) -> None:
        """Give the table's blocks back. The end of a cached prefix is reused first: no child outlives its parent."""
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)
        table.blocks.clear()
        table.nodes.clear()

    def _evict(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._index[key]
            self._key_of[block] = None

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Audit against every table in use; raises AssertionError that says what does not add up."""
        tables = list(tables)
        references = Counter(itertools.chain.from_iterable(table.blocks for table in tables))
        for block in range(self.num_blocks):
            if self._references[block] != references[block]:
                raise AssertionError(f"block {block}: {self._references[block]} references, {references[block]} tables")
            if (block in self._free) != (references[block] == 0):
                raise AssertionError(f"block {block} has {references[block]} references and its place is wrong")
        if len(self._free) + len(references) != self.num_blocks:
            raise AssertionError("free and used blocks do not add up")

        for key, found in self._index.items():
            if self._key_of[found.block] != key or len(key[1]) != self.block_size:
                raise AssertionError(f"the index names block {found.block}, which does not hold that prefix")
        if sum(key is not None for key in self._key_of) != len(self._index):
            raise AssertionError("a block holds a prefix that the index does not name")
        if len({found.node for found in self._index.values()}) != len(self._index):
            raise AssertionError("a node's number was used twice")

        for table in tables:
            if len(set(table.blocks)) != len(table.blocks):
                raise AssertionError("a table names a block twice")
            if len(table.nodes) > len(table.blocks):
                raise AssertionError("a table has more nodes than blocks")
