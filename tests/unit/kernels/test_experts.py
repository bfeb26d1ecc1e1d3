"""Routing and the grouped products of a mixture of experts against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import expert_mlp as expert_mlp_file
from kernels import expert_routing
from kernels.device import INTERPRETER, device_of
from kernels.expert_mlp import expert_mlp, product_launch, product_tiles, sum_launch
from kernels.expert_routing import Routing, blocks_bound, route
from kernels.launch import Launch
from tests.unit.kernels.references import expert_mlp_reference, route_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of what would be seen: NaN, or a pair and an expert far outside."""
    empty = torch.empty

    def poison(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poison)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same_routing(found: Routing, expected: Routing) -> None:
    torch.testing.assert_close(found.weights, expected.weights, equal_nan=True)
    assert found.experts.tolist() == expected.experts.tolist()
    assert found.block_rows.tolist() == expected.block_rows.tolist()
    for block, rows in enumerate(found.block_rows.tolist()):
        if rows:
            assert found.block_expert[block] == expected.block_expert[block]
            filled = slice(block * found.rows, block * found.rows + rows)
            assert found.pairs[filled].tolist() == expected.pairs[filled].tolist()


@pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "rows"),
    [(1, 8, 2, 16), (5, 5, 5, 16), (33, 8, 2, 16), (100, 60, 4, 32), (300, 3, 1, 16), (7, 129, 8, 16)],
)
def test_route_equals_its_reference(
    tokens: int, experts: int, per_token: int, rows: int, normalized: bool, device: torch.device
) -> None:
    # Columns of something wider, as any slice is.
    logits = randn(tokens, experts + 3).to(device)[:, :experts]
    options = {"normalized": normalized, "rows": rows}
    same_routing(route(logits, per_token, **options), route_reference(logits, per_token, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_equals_its_reference_in_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    # All different, or the order among equals would decide.
    logits = torch.stack([torch.randperm(24) for _ in range(40)]).to(dtype).to(device) / 4
    same_routing(route(logits, 6, normalized=True, rows=16), route_reference(logits, 6, normalized=True, rows=16))


def test_route_equals_its_reference_when_chunks_are_many(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than are added up at a time, and more blocks than a program describes."""
    monkeypatch.setattr(expert_routing, "_TOKENS", 2)
    monkeypatch.setattr(expert_routing, "_CHUNKS", 4)
    monkeypatch.setattr(expert_routing, "_BLOCKS", 2)
    logits = randn(25, 6).to(device)
    same_routing(route(logits, 2, normalized=True, rows=4), route_reference(logits, 2, normalized=True, rows=4))


@pytest.mark.parametrize("most_rows", [1, 16])
def test_most_rows_bound_is_tight(most_rows: int) -> None:
    for num_pairs in (1, 5, 16, 33, 64):
        for num_experts in (1, 4, 40):
            used = min(num_pairs, num_experts)
            # One pair for every expert but the first, and all others there.
            worst = used - 1 + -(-(num_pairs - used + 1) // most_rows)
            assert worst == blocks_bound(num_pairs, num_experts, most_rows) or most_rows > 1
            assert worst <= blocks_bound(num_pairs, num_experts, most_rows)


def test_equal_logits_choose_different_experts(device: torch.device) -> None:
    routing = route(torch.zeros(9, 6, device=device), 3, normalized=True, rows=16)
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())
    assert int(routing.block_rows.sum()) == 27
    torch.testing.assert_close(routing.weights, torch.full((9, 3), 1 / 3, device=device))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_rows_do_not_change_other_rows(device: torch.device) -> None:
    logits = randn(40, 7).to(device)
    clean = route(logits, 2, normalized=True, rows=16)
    logits[3] = float("nan")
    logits[5, 2] = float("inf")
    logits[6, 1] = float("nan")
    logits[9] = float("-inf")
    routing = route(logits, 2, normalized=True, rows=16)
    assert int(routing.block_rows.sum()) == 80
    filled = torch.cat(
        [routing.pairs[16 * block : 16 * block + rows] for block, rows in enumerate(routing.block_rows.tolist())]
    )
    assert sorted(filled.tolist()) == list(range(80))
    assert all(len(set(row)) == 2 and max(row) < 7 for row in routing.experts.tolist())
    bad = [3, 5, 6, 9]
    others = [row for row in range(40) if row not in bad]
    assert routing.weights[bad].isnan().any(dim=1).all()
    assert torch.equal(routing.weights[others], clean.weights[others])
    assert torch.equal(routing.experts[others], clean.experts[others])


def mixture(
    tokens: int, experts: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Rows, logits, and the experts' weights."""
    parts = [
        randn(tokens, hidden + 3)[:, :hidden],
        randn(tokens, experts),
        randn(experts, 2 * inner, hidden) / hidden**0.5,
        randn(experts, hidden, inner) / inner**0.5,
    ]
    return [part.to(device) if place == 1 else part.to(dtype).to(device) for place, part in enumerate(parts)]


@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "hidden", "inner", "dtype"),
    [
        *((1, 8, 2, 64, 32, dtype) for dtype in DTYPES),
        *((7, 3, 2, 33, 80, dtype) for dtype in DTYPES),
        (50, 4, 1, 70, 130, torch.bfloat16),
        (20, 24, 8, 48, 24, torch.float32),
        (0, 4, 2, 48, 24, torch.float32),
    ],
    ids=str,
)
def test_expert_mlp_equals_its_reference(
    tokens: int, experts: int, per_token: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> None:
    parts = mixture(tokens, experts, hidden, inner, dtype, device)
    normalized = tokens != 7
    found = expert_mlp(*parts, per_token, normalized=normalized)
    expected = expert_mlp_reference(*parts, per_token, normalized=normalized)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_expert_mlp_equals_its_reference_with_each_gate(activation: str, device: torch.device) -> None:
    parts = mixture(6, 3, 40, 24, torch.float32, device)
    found = expert_mlp(*parts, 2, normalized=True, activation=activation)
    expected = expert_mlp_reference(*parts, 2, normalized=True, activation=activation)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_expert_mlp_equals_its_reference_when_one_expert_gets_all_tokens(device: torch.device) -> None:
    """Several blocks of one expert, and experts whose weights must not be read."""
    x, logits, gate_up, down = mixture(70, 6, 40, 24, torch.float32, device)
    logits[:, 4] = 50.0
    logits[:, 1] = 40.0
    for expert in (0, 2, 3, 5):
        gate_up[expert] = down[expert] = float("nan")
    found = expert_mlp(x, logits, gate_up, down, 2, normalized=True)
    torch.testing.assert_close(
        found, expert_mlp_reference(x, logits, gate_up, down, 2, normalized=True), atol=2e-5, rtol=2e-5
    )


def test_expert_product_equals_its_reference_over_many_groups_of_blocks(device: torch.device) -> None:
    """More blocks than one group has, the last group not full, and more columns than one tile."""
    x, logits, gate_up, down = mixture(150, 5, 36, 140, torch.float32, device)
    tiles = product_tiles(300, 5, torch.float32, device_of(device))
    routing = route(logits, 2, normalized=True, rows=tiles.rows)
    middle, results, out = torch.empty(300, 140), torch.empty(300, 36), torch.empty(150, 36)
    middle, results, out = (tensor.to(device) for tensor in (middle, results, out))
    product_launch(x, gate_up, routing, middle, tiles, activation="silu").run()
    assert middle.isfinite().all()
    product_launch(middle, down, routing, results, tiles, activation=None).run()
    assert results.isfinite().all()
    sum_launch(results, routing.weights, out).run()
    torch.testing.assert_close(
        out, expert_mlp_reference(x, logits, gate_up, down, 2, normalized=True), atol=2e-5, rtol=2e-5
    )


def test_expert_product_refuses_blocks_of_another_size(device: torch.device) -> None:
    x, logits, gate_up, _ = mixture(3, 2, 8, 8, torch.float32, device)
    tiles = product_tiles(6, 2, torch.float32, device_of(device))
    routing = route(logits, 2, normalized=True, rows=2 * tiles.rows)
    with pytest.raises(ValueError, match="blocks of"):
        product_launch(x, gate_up, routing, torch.empty(6, 8), tiles, activation="silu")


def test_expert_mlp_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor without memory has no value that could be: a graph can hold all of it."""
    run: list[object] = []
    monkeypatch.setattr(Launch, "run", lambda launch: run.append(launch.kernel))
    for module in (expert_mlp_file, expert_routing):
        monkeypatch.setattr(module, "device_of", lambda _: INTERPRETER)
    parts = [part.to("meta") for part in mixture(9, 4, 16, 8, torch.float32, torch.device("cpu"))]
    assert expert_mlp(*parts, 2, normalized=True).shape == (9, 16)
    assert len(run) == 5
    with pytest.raises((RuntimeError, NotImplementedError)):
        expert_mlp_reference(*parts, 2, normalized=True)
