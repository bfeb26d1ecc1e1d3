"""Batch sizes that graphs are captured for."""

from __future__ import annotations

from engine.device.cuda_graphs import batch_size


def test_graph_batch_sizes_waste_little_padding() -> None:
    sizes = {batch_size(count) for count in range(1, 4097)}
    assert len(sizes) < 70
    assert all(batch_size(count) >= count for count in range(1, 4097))
    assert all(batch_size(count) < 1.25 * count for count in range(33, 4097))
    assert batch_size(2048) == 2048
