"""Step 4: the attention, write and sampling kernels at ragged sizes under `compute-sanitizer`.

Blocks are those at the end of the cache, and torch allocates each tensor by itself, so that a read beyond one is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from torch import Tensor

from bench.gpu.reporting import report, skip, step_options
from bench.gpu.steps.decode import Bench, Variant
from bench.gpu.steps.paged_inputs import QWEN3, TINY, PagedInputs
from bench.gpu.steps.prefill import our_work
from bench.profiling.peaks import DevicePeaks

PROGRAM = "program"


def program(*, is_dry: bool) -> None:
    """One launch of each kernel, with lengths that fill no tile and no block."""
    from kernels.kv_write import write_kv

    device = torch.device("cpu" if is_dry else "cuda")
    dtype, heads = (torch.float32, TINY) if is_dry else (torch.bfloat16, QWEN3)
    for block_size in (16,) if is_dry else (16, 64):
        lengths = [1, 17, 33] if is_dry else [1, 63, 65, 700, 1025, 16]
        inputs = PagedInputs.random(heads, lengths, block_size, device=device, dtype=dtype)
        bench = Bench(device, dtype, DevicePeaks(1.0, 1.0), 1)
        bench.launch(heads, inputs, Variant(2 if is_dry else 3, 4, 4))()
        new = 19 if is_dry else 129
        prompts = PagedInputs.random(heads, [new] * 2, block_size, new=new, device=device, dtype=dtype)
        our_work(heads, prompts, None)()
        last = len(inputs.cache.keys) * block_size - 1
        slots = torch.tensor([last, 0, last - 1], device=device)
        key, value = (torch.randn(3, heads.num_kv_heads, heads.dim, dtype=dtype, device=device) for _ in range(2))
        write_kv(key, value, inputs.cache, slots)
    # Rows that several programs share, and rows that have one each.
    for rows in (3,) if is_dry else (3, 300):
        _choose_tokens(torch.randn(rows, 50 if is_dry else 151_937, dtype=dtype, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def _choose_tokens(logits: Tensor) -> None:
    """Greedy, drawn and filtered."""
    from kernels.sampling import argmax, sample
    from kernels.sampling_fallback import Filters

    rows, device = len(logits), logits.device
    argmax(logits)
    for filtered in (False, True):
        reals = {name: torch.full((rows,), 0.9, device=device) for name in ("temperature", "top_p", "min_p")}
        whole = torch.arange(1, rows + 1, device=device)
        sample(
            logits, reals["temperature"], whole + 20, reals["top_p"], reals["min_p"] * 0.01, whole, whole, whole,
            filters=Filters(top_k=64 if filtered else 0, top_p=filtered, min_p=filtered),
        )  # fmt: skip


def main() -> None:
    options = step_options()
    if options.names == (PROGRAM,) or options.is_dry:
        program(is_dry=options.is_dry)
        report("program ran", checked=not options.is_dry)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        skip("there is no compute-sanitizer")
        return
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, "-m", __spec__.name, PROGRAM],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "Invalid" in line]
    if done.returncode:
        report("memcheck", failure=f"code {done.returncode}: {'; '.join(summary[:4])}")
    else:
        report("memcheck", summary="; ".join(summary))


if __name__ == "__main__":
    main()
