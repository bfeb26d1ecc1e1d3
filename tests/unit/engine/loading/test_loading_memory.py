"""Memory that loading and the KV cache take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention import AttentionLayer
from engine.attention.kv_cache import KVCache
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.execution.model_runner import ModelRunner
from engine.loading.buffer_pool import BufferPool
from engine.loading.hub import weight_files
from tests.support.paths import REPOSITORY
from tests.unit.engine.loading.checkpoint import CPU, SIZES
from tests.unit.kernels.cpu_variants import cpu_library

BESIDE = 96 * 2**20
"""Bytes that loading may take beside the weights: a part of a file, and a few modules on their way."""


def test_kv_cache_is_sized_by_memory_and_by_need(directory: Path) -> None:
    def blocks(**options: Any) -> int:
        return ModelRunner.from_pretrained(directory, EngineConfig(device="cpu", **options)).num_blocks

    # Two layers of one head of 8, keys and values, 16 positions, 4 bytes.
    each = 2 * 8 * 2 * 16 * 4
    # One more is there for padding.
    assert blocks(cpu_kv_cache_bytes=11 * each + 1) == 10
    assert blocks(max_num_seqs=3) == 3 * 64 // 16
    with pytest.raises(ModelError, match="no memory is left"):
        blocks(cpu_kv_cache_bytes=each - 1)


@pytest.mark.slow
def test_kv_cache_takes_memory_only_when_used() -> None:
    layer = AttentionLayer(0, 8, 8, 64, 64, 1.0)
    before = _memory("VmRSS")
    cache = KVCache.allocate([layer], 2**15, 16, dtype=torch.bfloat16, device=CPU)
    size = sum(tensor.nbytes for tensor in cache.layers[0].tensors)
    assert size > 2**30
    assert _memory("VmRSS") - before < size / 8
    assert not cache.layers[0].keys[123].any()
    taken = KVCache.allocate([layer], 2**12, 16, dtype=torch.bfloat16, device=CPU, takes_memory=True)
    assert _memory("VmRSS") - before > sum(tensor.nbytes for tensor in taken.layers[0].tensors)


def test_kv_cache_grows_as_it_fills(tmp_path: Path) -> None:
    """Its limit is 2 GiB here, of which a prompt of 1,600 tokens needs 50 MiB: as much as its blocks.

    Measured in a process of its own, whose memory nothing else changes.
    """
    from transformers import AutoConfig

    sizes = SIZES | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 8}
    AutoConfig.for_model("llama", **sizes | {"max_position_embeddings": 2048}).save_pretrained(tmp_path)
    program = r"""
import re, sys
from pathlib import Path
from engine import EngineConfig
from engine.batch import Batch, BatchEntry
from engine.execution.model_runner import ModelRunner
memory = lambda key: int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
config = EngineConfig(device="cpu", random_weights=True, dtype="float32", num_kv_blocks=4096)
runner = ModelRunner.from_pretrained(sys.argv[1], config)
untouched = memory("RssAnon")  # without mapped files, which the system may take back at any time
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
runner.run(Batch([BatchEntry([1] * 1600, 0, range(100), 1)]))
limit = sum(tensor.nbytes for layer in runner.cache.layers for tensor in layer.tensors)
print(limit, untouched, memory("RssAnon") - untouched, memory("VmHWM") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    limit, untouched, kept, most = map(int, done.stdout.split())
    used = 1600 * limit // (4097 * 16)
    assert limit > 2**31
    assert untouched < limit / 2
    assert used <= kept
    assert most < 2 * used + BESIDE


def _memory(key: str) -> int:
    """Bytes, of a line of this process's status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """280 MB in one file, all weights alike, because drawing them takes longer than the test."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("checkpoint")
    sizes = SIZES | {"vocab_size": 8000, "hidden_size": 672, "intermediate_size": 3072, "num_hidden_layers": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(path, max_shard_size="1GB")
    return path


@pytest.mark.parametrize(("quantization", "kept"), [("", 1.0), ("int8", 0.4)])
def test_loading_takes_the_weights_and_a_bounded_part_beside(
    tmp_path: Path, checkpoint: Path, quantization: str, kept: float
) -> None:
    """Measured in a process of its own, from when all libraries are imported."""
    if quantization:
        cpu_library("native")
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = sum(path.stat().st_size for path in weight_files(checkpoint))
    program = r"""
import re, sys
from pathlib import Path
from engine import EngineConfig
from engine.models.llama import Llama
from engine.execution.model_runner import ModelRunner
config = EngineConfig(device="cpu", num_kv_blocks=1, quantization=sys.argv[3] or None)
load = lambda directory: ModelRunner.from_pretrained(directory, config)
load(sys.argv[1])
# The peak that getrusage gives begins with that of the process before `exec`.
memory = lambda key: int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model = load(sys.argv[2])
print(memory("VmHWM") - before)
"""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(checkpoint), quantization],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert weights > 2.5 * BESIDE
    assert int(done.stdout) < kept * weights + BESIDE


def test_buffer_pool_reuses_memory_without_tensors() -> None:
    pool, shape = BufferPool(), torch.Size([600, 1000])
    first = pool.empty(shape, torch.float32)
    second = pool.empty(shape, torch.float32)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[3:]
    del first
    assert pool.empty(shape, torch.float32).data_ptr() not in (address, second.data_ptr())
    del view
    assert pool.empty(torch.Size([1200, 500]), torch.float32).data_ptr() == address
    assert pool.empty(torch.Size([600, 999]), torch.float32).data_ptr() != address
