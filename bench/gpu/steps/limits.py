"""Step 0: what the card and its software are, and the two rates that everything else is measured against."""

from __future__ import annotations

import inspect
import subprocess
from dataclasses import asdict

import torch

from bench.gpu.reporting import attempt, report, step_options
from bench.machine import circumstances
from bench.profiling.peaks import LimitSizes, measure_limits

DRY_SIZES = LimitSizes(copy_bytes=1 << 16, matmul=64)


def main() -> None:
    options = step_options()
    report("machine", **circumstances())
    device = torch.device("cpu" if options.is_dry else "cuda")
    dtype = torch.float32 if options.is_dry else torch.bfloat16
    for attempted in ("first", "second"):
        with attempt(f"rates, {attempted} time"):
            sizes = DRY_SIZES if options.is_dry else LimitSizes(copy_bytes=4 << 30, matmul=8192)
            limits = measure_limits(device, dtype, sizes)
            rates = {"copy_gb_s": limits.bytes_per_second / 1e9, "matmul_tflop_s": limits.flops_per_second / 1e12}
            report(f"rates, {attempted} time", **rates, **asdict(limits))
    with attempt("gcc"):
        told = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
        report("gcc", version=told.splitlines()[0])
    with attempt("varlen_attn"):
        from torch.nn.attention.varlen import varlen_attn

        report("varlen_attn", signature=str(inspect.signature(varlen_attn)))


if __name__ == "__main__":
    main()
