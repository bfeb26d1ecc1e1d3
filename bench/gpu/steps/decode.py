"""Step 5: the decode kernel in every way it could be launched: blocks, stages, warps, programs a multiprocessor.

The share is that of the copy rate: keys and values are read once, everything else is small beside them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from bench.gpu.reporting import attempt, report, step_options
from bench.gpu.steps.paged_inputs import GPT2_LARGE, QWEN3, TINY, Heads, PagedInputs
from bench.gpu.timing import Stopwatch, input_sets
from bench.profiling.peaks import DevicePeaks, LimitSizes, measure_limits
from kernels.device import device_of
from kernels.paged_decode import DecodePlan, decode_launches, plan_decode
from kernels.paged_layout import Scoring


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of launching the kernel."""

    num_stages: int
    num_warps: int
    programs_per_sm: int

    def __str__(self) -> str:
        return f"{self.num_stages} stages, {self.num_warps} warps, {self.programs_per_sm} programs/SM"


def ragged(count: int, least: int, most: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(least, most) for _ in range(count)]


BATCHES: dict[str, Sequence[int]] = {
    "64 x 1,024": [1024] * 64,
    "256 x 100..1,500": ragged(256, 100, 1500),
    "8 x 32,768": [32_768] * 8,
    "4,096 x 33": [33] * 4096,
}
VARIANTS = [Variant(*one) for one in itertools.product((2, 3, 4, 5), (4, 8), (4, 16, 32))]


class Bench:
    """Times batches on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: DevicePeaks, repeats: int) -> None:
        self.device, self.dtype, self.limits = device, dtype, limits
        self.stopwatch = Stopwatch(device, repeats)
        self.num_sms = device_of(device).num_sms

    def launch(self, heads: Heads, inputs: PagedInputs, variant: Variant) -> Callable[[], None]:
        """A layer's launch over a plan that is made here, once."""
        plan = DecodePlan.allocate(
            len(inputs.sequences.seq_lens),
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.dim,
            value_dim=heads.dim,
            kv_dtype=self.dtype,
            window=None,
            device=self.device,
            target_splits=max(1, self.num_sms * variant.programs_per_sm // heads.num_kv_heads),
        )
        plan_decode(plan, inputs.sequences.seq_lens, inputs.sequences.query_starts)
        out = torch.empty_like(inputs.query)
        (decode,) = decode_launches(inputs.query, inputs.cache, inputs.sequences, plan, out, Scoring(heads.dim**-0.5))
        return replace(decode, num_warps=variant.num_warps, num_stages=variant.num_stages).run

    def batch(self, heads: Heads, title: str, lengths: Sequence[int], block_size: int, ways: Sequence[Variant]) -> None:
        """Report each variant of a batch as a detail, then the best."""
        moved = sum(lengths) * heads.num_kv_heads * heads.dim * 2 * self.dtype.itemsize
        sets = [
            PagedInputs.random(heads, lengths, block_size, device=self.device, dtype=self.dtype)
            for _ in range(input_sets(moved))
        ]
        self._compile(heads, sets[0], ways)
        found = {}
        for variant in ways:
            what = f"{heads.name} b{block_size}, {title}: {variant}"
            with attempt(what, is_detail=True):
                seconds = self.stopwatch.time([self.launch(heads, inputs, variant) for inputs in sets])
                found[variant] = seconds
                share = moved / seconds / self.limits.bytes_per_second
                report(what, seconds=seconds, share=share, limit="copy", is_detail=True)
        if found:
            best = min(found, key=lambda variant: found[variant])
            share = moved / found[best] / self.limits.bytes_per_second
            title = f"best of {heads.name} b{block_size}, {title}"
            report(title, seconds=found[best], share=share, limit="copy", launch=str(best))

    def _compile(self, heads: Heads, inputs: PagedInputs, ways: Sequence[Variant]) -> None:
        """All variants at once, in threads: compiling leaves Python's lock to others."""
        if self.device.type != "cuda":
            return
        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(self.launch(heads, inputs, variant)) for variant in ways]:
                with attempt("compile", is_detail=True):
                    done.result()
        torch.cuda.synchronize()


def main() -> None:
    options = step_options()
    torch.set_grad_enabled(False)
    if options.is_dry:
        device, dtype, sizes, repeats = torch.device("cpu"), torch.float32, LimitSizes(1 << 16, 64), 1
    else:
        device, dtype, sizes, repeats = torch.device("cuda"), torch.bfloat16, LimitSizes(1 << 30, 8192), 20
    bench = Bench(device, dtype, measure_limits(device, dtype, sizes), repeats)
    if options.is_dry:
        bench.batch(TINY, "2 x 40", [40, 20], 16, [Variant(2, 4, 4)])
        return
    for title, lengths in BATCHES.items():
        for heads, block_size in itertools.product((QWEN3, GPT2_LARGE), (64, 16)):
            if heads.num_kv_heads * heads.dim * sum(lengths) < 1 << 31:  # what fits several times
                bench.batch(heads, title, lengths, block_size, VARIANTS)


if __name__ == "__main__":
    main()
