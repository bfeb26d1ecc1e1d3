"""Step 6: the prefill kernel with several pipeline depths, beside torch's attention on keys that lie in one piece."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.reporting import attempt, report, step_options
from bench.gpu.steps.paged_inputs import GPT2_LARGE, QWEN3, TINY, Heads, PagedInputs
from bench.gpu.timing import Stopwatch
from bench.profiling.peaks import DevicePeaks, LimitSizes, measure_limits
from kernels.device import device_of
from kernels.paged_layout import Scoring
from kernels.paged_prefill import PrefillPlan, plan_prefill, prefill_launch, prefill_tiles

BATCHES = ((4, 1024), (1, 4096), (1, 16_384))
STAGES = (2, 3, 4, 5)


def our_work(heads: Heads, inputs: PagedInputs, stages: int | None) -> Callable[[], None]:
    """The launch of a layer; stages None: as the table of the kernel says."""
    query = inputs.query
    group = heads.num_heads // heads.num_kv_heads
    tiles = prefill_tiles(group, heads.dim, heads.dim, query.dtype, device_of(query.device))
    block_q = tiles.block_q(group)
    num_blocks = len(query) // block_q + len(inputs.sequences.seq_lens)
    plan = PrefillPlan.allocate(num_blocks, block_q=block_q, device=query.device)
    plan_prefill(plan, inputs.sequences.query_starts, len(query))
    launch = prefill_launch(
        query, inputs.cache, inputs.sequences, plan, torch.empty_like(query), Scoring(heads.dim**-0.5)
    )
    return (launch if stages is None else replace(launch, num_stages=stages)).run


def rivals(heads: Heads, batch: int, length: int, query: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """torch's own attention on the same numbers of heads and tokens. Each may raise when it is called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shapes = [(batch, count, length, heads.dim) for count in (heads.num_heads, *[heads.num_kv_heads] * 2)]
    q, k, v = (torch.randn(shape, dtype=query.dtype, device=query.device) for shape in shapes)

    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def work() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return work

    if not query.is_cuda:
        yield "SDPA, plain", sdpa(SDPBackend.MATH)
        return
    yield "SDPA, flash", sdpa(SDPBackend.FLASH_ATTENTION)
    yield "SDPA, cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    # Without grouped heads in its arguments, keys and values are repeated: more bytes, and the same products.
    group = heads.num_heads // heads.num_kv_heads
    flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(batch * length, -1, heads.dim) for x in (q, k, v))
    flat_k, flat_v = flat_k.repeat_interleave(group, dim=1), flat_v.repeat_interleave(group, dim=1)
    # torch 2.10 says is_causal, later ones a window.
    takes = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    yield "varlen_attn", lambda: varlen_attn(flat_q, flat_k, flat_v, starts, starts, length, length, **causal)


def batch(
    heads: Heads, size: tuple[int, int], block_size: int, stages: Sequence[int | None], limits: DevicePeaks,
    stopwatch: Stopwatch, device: torch.device, dtype: torch.dtype,
) -> None:  # fmt: skip
    number, length = size
    flops = 2 * number * heads.num_heads * heads.dim * length * (length + 1)
    title = f"{heads.name} b{block_size}, {number} x {length:,}"
    inputs = PagedInputs.random(heads, [length] * number, block_size, new=length, device=device, dtype=dtype)

    def timed(what: str, work: Callable[[], object]) -> None:
        with attempt(what):
            seconds = stopwatch.time([work])
            report(what, seconds=seconds, share=flops / seconds / limits.flops_per_second, limit="matmul")

    for each in stages:
        with attempt(f"{title}: {each} stages"):
            timed(f"{title}: {each or 'usual'} stages", our_work(heads, inputs, each))
    with attempt(f"{title}: rivals"):
        for name, work in rivals(heads, number, length, inputs.query):
            timed(f"{title}: {name}", work)


def main() -> None:
    options = step_options()
    torch.set_grad_enabled(False)
    if options.is_dry:
        device, dtype = torch.device("cpu"), torch.float32
        limits = measure_limits(device, dtype, LimitSizes(1 << 16, 64))
        batch(TINY, (2, 20), 16, [None], limits, Stopwatch(device, 1), device, dtype)
        return
    device, dtype = torch.device("cuda"), torch.bfloat16
    limits = measure_limits(device, dtype, LimitSizes(1 << 30, 8192))
    for size, heads, block_size in itertools.product(BATCHES, (QWEN3, GPT2_LARGE), (64, 16)):
        batch(heads, size, block_size, STAGES, limits, Stopwatch(device, 10), device, dtype)


if __name__ == "__main__":
    main()
