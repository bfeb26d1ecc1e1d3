"""The engine with blocks that several decodes begin with read once: in the interpreter, on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.attention import triton as triton_attention
from kernels import device as kernels_device
from kernels.paged_layout import StepSequences
from kernels.prefix_groups import PrefixGroups, find_shared_prefixes
from tests.parity.tiny_models import NATIVE

ON_GPU = torch.cuda.is_available() and not kernels_device.interprets()
# Blocks of 8; in the interpreter a group has eight members.
FAMILIES = {"a": list(range(3, 27)), "b": list(range(40, 64))}
ORDER = "abaababaaaa"


def generate(directory: Path, attention: str = "triton", **options: bool) -> list[list[int]]:
    config = EngineConfig(
        attention=attention,
        device="cuda" if ON_GPU else "cpu",
        dtype="float32",
        num_kv_blocks=128,
        block_size=8,
        decode_steps=3,
        **options,
    )
    engine = Engine.from_pretrained(directory, config)
    engine.generate(list(FAMILIES.values()), SamplingParams(temperature=0, max_tokens=1))
    prompts = [[*FAMILIES[family], 70 + place] for place, family in enumerate(ORDER)]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert all(output.error is None for output in outputs)
    return [list(output.token_ids) for output in outputs]


def test_sequences_sorted_by_prefix_get_their_own_tokens(tmp_path: Path) -> None:
    """In plain torch, for which the order is all that changes."""
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    expected = generate(tmp_path, "torch")
    assert generate(tmp_path, "torch", shared_prefix_attention=True) == expected
    assert len({tuple(tokens) for tokens in expected}) >= 4


@pytest.mark.slow
def test_shared_prefixes_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(model for model in NATIVE if model.name == "llama").save(tmp_path, torch.float32)
    expected = generate(tmp_path)
    found: list[list[int]] = []

    def find(groups: PrefixGroups, sequences: StepSequences, block_size: int) -> None:
        find_shared_prefixes(groups, sequences, block_size)
        found.append(groups.positions[: -(-len(sequences.seq_lens) // groups.members)].tolist())

    monkeypatch.setattr(triton_attention, "LEAST_SHARED", 16)
    monkeypatch.setattr("engine.execution.model_runner.LEAST_SHARED", 16)
    monkeypatch.setattr(triton_attention, "find_shared_prefixes", find)
    assert generate(tmp_path, shared_prefix_attention=True) == expected
    assert len({tuple(tokens) for tokens in expected}) >= 4
    # The families' sequences were interleaved; sorted by their blocks, both groups share what there is to share.
    assert ON_GPU or [16, 16] in found
