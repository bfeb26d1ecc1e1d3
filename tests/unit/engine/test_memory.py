"""Memory of a real engine: while weights are loaded, over a long run, and for what is queued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.paths import REPOSITORY

MIB = 2**20
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1003,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def in_a_process_of_its_own(script: str, *arguments: object) -> dict[str, int]:
    """Runs a script that prints numbers as JSON: this process's own memory is not counted."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers: dict[str, int] = json.loads(done.stdout)
    sys.stdout.write(f"{numbers}\n")
    return numbers


LOAD = """
import json, sys
from pathlib import Path
import torch
from engine import EngineConfig
from engine.loading.hub import resolve_model
from engine.execution.model_runner import ModelRunner, load_config

def status(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

load_config(resolve_model(sys.argv[1])), torch.ones(64, 64) @ torch.ones(64, 64)  # what the libraries bring along
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
runner = ModelRunner.from_pretrained(sys.argv[1], EngineConfig(device="cpu", num_kv_blocks=8))
print(json.dumps({"peak": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


@pytest.mark.slow
def test_loading_peak_is_the_weights_and_one_shard(tmp_path: Path) -> None:
    """Some 400 MB of weights in eight files."""
    hidden, inner, layers = 1024, 2816, 8
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 64,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | sizes))
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shards = []
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": torch.ones(CONFIG["vocab_size"], hidden)}  # type: ignore[call-overload]
            tensors |= {"lm_head.weight": torch.ones(CONFIG["vocab_size"], hidden)}  # type: ignore[call-overload]
            tensors |= {"model.norm.weight": torch.ones(hidden)}
        shards.append(dict.fromkeys(tensors, f"model-{layer + 1:05}-of-{layers:05}.safetensors"))
        save_file(tensors, tmp_path / f"model-{layer + 1:05}-of-{layers:05}.safetensors")
    index = {"metadata": {}, "weight_map": {name: file for shard in shards for name, file in shard.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]

    found = in_a_process_of_its_own(LOAD, tmp_path)
    assert sum(files) > 350 * MIB
    assert found["peak"] < sum(files) + max(files) + 32 * MIB
    assert found["after"] < sum(files) + 32 * MIB


RUN = """
import ctypes, gc, json, sys
from collections import Counter
from pathlib import Path
from engine import Engine, EngineConfig, SamplingParams
from engine.errors import RequestRejected

engine = Engine.from_pretrained(sys.argv[1], EngineConfig(
    device="cpu", random_weights=True, num_kv_blocks=100, block_size=8, max_num_seqs=32, max_num_batched_tokens=256,
))
params = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(max_tokens=17, top_p=0.9, seed=3),
    SamplingParams(max_tokens=5, top_k=20, min_p=0.01, logprobs=2),
    SamplingParams(max_tokens=12, presence_penalty=0.5, repetition_penalty=1.1, n=2),
    SamplingParams(max_tokens=7, prompt_logprobs=1),
]

def run(first, last):
    for number in range(first, last):
        length = 500 if number % 50 == 0 else 3 + number * 7 % 90
        prompt = [3 + (number % 10 + place * 13) % 1000 for place in range(length)]
        try:
            engine.add(str(number), prompt, params[number % len(params)])
        except RequestRejected:
            pass
        if number % 37 == 0:
            engine.abort(str(number))
        while engine.num_requests_wanted() == 0 and engine.has_unfinished:
            engine.step()
    while engine.has_unfinished:
        engine.step()
    engine.check()

def look():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024
    return resident, len(gc.get_objects())

number = int(sys.argv[2])
run(0, number)
warm_bytes, warm_objects = look()
run(number, 4 * number)
late_bytes, late_objects = look()
stats = engine.stats()
print(json.dumps({
    "warm_bytes": warm_bytes, "late_bytes": late_bytes, "warm_objects": warm_objects, "late_objects": late_objects,
    "preemptions": stats.preemptions, "rejected": stats.rejected, "ended": sum(stats.finished.values()),
}))
"""


@pytest.mark.slow
def test_engine_memory_is_flat_over_a_long_run(tmp_path: Path) -> None:
    """Of requests that ended, were aborted or preempted, no object stays and no memory."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    number = 300
    found = in_a_process_of_its_own(RUN, tmp_path, number)
    assert found["rejected"] + found["ended"] == 4 * number
    assert found["preemptions"] > 0
    # A request alone is some thirty objects and several kilobytes.
    assert found["late_objects"] - found["warm_objects"] < number
    assert found["late_bytes"] - found["warm_bytes"] < 8 * MIB


QUEUE = """
import gc, json, sys
from pathlib import Path
from engine import Engine, EngineConfig, SamplingParams

config = EngineConfig(device="cpu", random_weights=True, num_kv_blocks=64)
engine = Engine.from_pretrained(sys.argv[1], config)
params = SamplingParams(max_tokens=20)

def resident():
    gc.collect()
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024

def add(first, last):
    for number in range(first, last):
        engine.add(str(number), [3 + (number + place) % 1000 for place in range(32)], params)

add(0, 1000)
before = resident()
add(1000, 101000)
print(json.dumps({"bytes_each": (resident() - before) // 100000}))
"""


@pytest.mark.slow
def test_queued_request_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert in_a_process_of_its_own(QUEUE, tmp_path)["bytes_each"] < 4096
