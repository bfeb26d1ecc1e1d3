"""Integer arithmetic of grids, blocks and pages."""

from __future__ import annotations


def ceil_div(count: int, each: int) -> int:
    """How many groups of `each` hold `count` things."""
    return -(-count // each)
