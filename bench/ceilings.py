"""What this machine can do at best, as torch and oneDNN reach it: matrix products, and reading memory.

    python -m bench.ceilings WORKLOAD PRECISION...

Products have the shapes of the workload's model, with as many rows as requests (a decode step) and with many (a chunk
of prompts). Weights are cold, as in a model that is larger than the caches. Of each product the fastest way counts.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.arithmetic import Geometry, Shape, Work, geometry
from bench.machine import cores, multiplies_int8
from bench.models import CONFIGS
from bench.workload import workloads
from kernels.integers import ceil_div

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 512  # rows of a chunk of prompts
COLD_BYTES = 128 << 20  # of weights to go through before the first ones come again, if it takes no more than
MOST_COPIES = 64
STREAM_BYTES = 512 << 20
SECONDS = 0.1  # for each of the runs of which the fastest counts
RUNS = 3
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """GFLOP/s of products in one precision, and GB/s of memory."""

    decode: Mapping[str, float]
    """By shape, with as many rows as there are requests."""

    chunk: Mapping[str, float]
    """By shape, with `CHUNK` rows."""

    memory: float

    @property
    def compute(self) -> float:
        """The fastest product of all."""
        return max(*self.decode.values(), *self.chunk.values())

    def seconds(self, model: Geometry, work: Work, precision: str) -> float:
        """The least time for a workload: all products as fast as measured, or all reading, whichever is longer."""
        products = work.attention_flops / self.compute
        for shape, count in model.linears.items():
            products += count * 2 * shape[0] * shape[1] * work.decode_tokens / self.decode[_key(shape)]
            products += count * 2 * shape[0] * shape[1] * work.prompt_tokens / self.chunk[_key(shape)]
        products += 2 * model.head[0] * model.head[1] * work.output_tokens / self.decode[_key(model.head)]
        reading = work.steps * model.weights * ITEM_BYTES[precision] / self.memory
        return max(products, reading) / 1e9


def measure(model: Geometry, rows: int, precision: str, threads: int) -> Ceilings:
    """Takes seconds; `rows` is the number of requests."""
    import torch

    torch.set_num_threads(threads)
    shapes = [*model.linears, model.head]
    with torch.inference_mode():
        return Ceilings(
            {_key(shape): _product(rows, shape, precision) for shape in shapes},
            # Only one token of a prompt needs the head.
            {_key(shape): _product(CHUNK, shape, precision) for shape in model.linears},
            memory_rate(),
        )


def memory_rate() -> float:
    """GB/s at which all threads together read memory."""
    import torch

    numbers = torch.ones(STREAM_BYTES // 4)
    matrix, vector = numbers.view(-1, 8192), torch.ones(8192)
    return STREAM_BYTES / min(_fastest(numbers.sum), _fastest(lambda: torch.mv(matrix, vector))) / 1e9


def _product(rows: int, shape: Shape, precision: str) -> float:
    """GFLOP/s of `[rows, inputs] x [inputs, outputs]`."""
    ways = _int8_ways(rows, shape) if precision == "int8" else _float_ways(rows, shape, precision)
    return 2 * rows * shape[0] * shape[1] / min(_fastest(way) for way in ways) / 1e9


def _float_ways(rows: int, shape: Shape, precision: str) -> Iterator[Callable[[], Any]]:
    import torch
    import torch.nn.functional as F

    inputs, outputs = shape
    dtype = getattr(torch, precision)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    copies = [weight.clone() for _ in range(_copies(shape, dtype.itemsize))]
    yield _in_turn(copies, lambda weight: F.linear(x, weight))
    ops = torch.ops.mkldnn
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if has_onednn and (precision == "float32" or ops._is_mkldnn_bf16_supported()):
        packed = [ops._reorder_linear_weight(weight, rows) for weight in copies]
        yield _in_turn(packed, lambda weight: ops._linear_pointwise(x, weight, None, "none", [], ""))


def _int8_ways(rows: int, shape: Shape) -> Iterator[Callable[[], Any]]:
    import torch

    inputs, outputs = shape
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    copies = [weight.clone() for _ in range(_copies(shape, 1))]
    if multiplies_int8():  # elsewhere it is a plain loop, which takes minutes
        x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
        yield _in_turn(copies, lambda weight: torch._int_mm(x, weight.t()))
    with warnings.catch_warnings():
        # Quantized tensors are to go from torch; the product needs no more than one to prepare the weights.
        warnings.simplefilter("ignore", UserWarning)
        packed = [
            torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(weight, 0.01, 0), None)
            for weight in copies
        ]
    values = torch.randn(rows, inputs)
    # It quantizes the activations itself, which a model must do, too.
    yield _in_turn(packed, lambda weight: torch.ops.quantized.linear_dynamic(values, weight))


def _copies(shape: Shape, item_bytes: int) -> int:
    return min(MOST_COPIES, ceil_div(COLD_BYTES, shape[0] * shape[1] * item_bytes))


def _in_turn(weights: Sequence[Any], product: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    turns = itertools.cycle(weights)
    return lambda: product(next(turns))


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds for one run, in the fastest of `RUNS` series."""
    run()
    best = float("inf")
    for _ in range(RUNS):
        count, began = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - began < SECONDS:
            run()
            count += 1
        best = min(best, (time.perf_counter() - began) / count)
    return best


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def main() -> None:
    workload = workloads()[sys.argv[1]]
    model = geometry(CONFIGS[workload.model]())
    requests = workload.requests(0)
    work = Work.of(model, requests, workload.shared_prefix)
    found = {}
    for precision in sys.argv[2:]:
        ceilings = measure(model, len(requests), precision, cores())
        seconds = ceilings.seconds(model, work, precision)
        found[precision] = {**asdict(ceilings), "compute": ceilings.compute, "least_seconds": seconds}
    print(json.dumps({"flops": work.flops(model), "precisions": found}))


if __name__ == "__main__":
    main()
