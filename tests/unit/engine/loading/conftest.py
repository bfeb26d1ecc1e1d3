"""The checkpoint that tests of loading change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.loading.hub import weight_files
from tests.unit.engine.loading.checkpoint import SIZES


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Llama as its makers would publish it, in two shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.save_pretrained(tmp_path, max_shard_size="12kB")
    assert len(weight_files(tmp_path)) > 1
    return tmp_path
