"""How long from nothing to the first token, and how much memory beside the weights: `python -m bench.startup`.

gpt2-large from a checkpoint on disk, as a user's program would: a Python that starts, loads the model and generates one
token. Precisions take turns, each turn a new process. The checkpoint lies in the system's file cache from the round
before the first that counts on.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.models import model_directory
from bench.report import save

if TYPE_CHECKING:
    from torch import Tensor, nn

MODEL = "gpt2-large"
PRECISIONS = ("float32", "int8")
CACHE = Path(".bench")
PROMPT = list(range(1_000, 1_008))
KV_CACHE_BYTES = 256 << 20
ROUNDS = 3


def measure() -> dict[str, Any]:
    """Seconds to the first token and bytes, by precision."""
    directory = model_directory(MODEL, CACHE)
    turns: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    for round_number in range(ROUNDS + 1):
        for precision in PRECISIONS:
            found = _turn(directory, precision)
            if round_number:
                turns[precision].append(found)
    return {
        "model": MODEL,
        "kv_cache_bytes": KV_CACHE_BYTES,
        "rounds": ROUNDS,
        "seconds_to_first_token": {
            precision: _spread([turn["seconds"] for turn in found]) for precision, found in turns.items()
        },
        "weight_bytes": {precision: found[0]["weights"] for precision, found in turns.items()},
        "peak_bytes_beside_weights_and_kv_cache": {
            precision: _spread([turn["peak"] - turn["weights"] - KV_CACHE_BYTES for turn in found])
            for precision, found in turns.items()
        },
    }


def _turn(directory: Path, precision: str) -> dict[str, float]:
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench.startup", str(directory), precision]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": seconds, **json.loads(line)}


def _start(directory: Path, precision: str) -> None:
    """What is measured: load, generate a token, say so."""
    from engine import Engine, EngineConfig, SamplingParams
    from engine.execution.model_runner import ModelRunner

    is_int8 = precision == "int8"
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16" if is_int8 else precision,  # bfloat16: as the checkpoint has it
        quantization="int8" if is_int8 else None,
        cpu_kv_cache_bytes=KV_CACHE_BYTES,
    )
    engine = Engine.from_pretrained(directory, config)
    engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert isinstance(engine.runner, ModelRunner)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    print(json.dumps({"weights": weight_bytes(engine.runner.model), "peak": peak}), flush=True)


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take, as they lie in memory; what two layers share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in _weights(model)}.values())


def _weights(model: nn.Module) -> Iterator[Tensor]:
    from engine.linears.packed import PackedLinear

    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module.weight.panels
            if module.weight.scale is not None:
                yield module.weight.scale


def _spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


if __name__ == "__main__":
    if arguments := sys.argv[1:]:
        _start(Path(arguments[0]), arguments[1])
    else:
        save("startup", measure())
