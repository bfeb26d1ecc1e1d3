"""The engine through Triton's kernels: in the interpreter on the CPU, on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.attention import make_backend
from engine.attention.triton import TritonAttention
from engine.errors import ModelError
from engine.models import rotary
from kernels import device as kernels_device
from tests.parity.comparing import LOGPROB_TOLERANCE
from tests.parity.tiny_models import NATIVE, TinyModel

NUM_TOKENS = 4
# One that is cut into chunks and longer than a window, one that begins like it, and the shortest.
PROMPTS = [list(range(3, 24)), [*range(3, 14), 99], [7]]
ON_GPU = torch.cuda.is_available() and not kernels_device.interprets()


def generate(directory: Path, attention: str, **options: object) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens, and their log-probabilities."""
    config = EngineConfig(
        attention=attention, device="cuda" if ON_GPU else "cpu", num_kv_blocks=64, block_size=8, **options
    )
    engine = Engine.from_pretrained(directory, config)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    outputs = engine.generate(PROMPTS, params)
    assert all(output.error is None for output in outputs)
    return (
        [list(output.token_ids) for output in outputs],
        [[entry.logprob for entry in output.completions[0].logprobs or ()] for output in outputs],
    )


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "llama",
        "gemma2",
        "gptj",
        *(
            pytest.param(m.name, marks=pytest.mark.slow)
            for m in NATIVE
            if m.name not in {"gpt2", "llama", "gemma2", "gptj"}
        ),
    ],
)
def test_kernels_give_the_tokens_of_plain_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: TinyModel = next(model for model in NATIVE if model.name == name)
    model.save(tmp_path)
    # Small steps: chunks of prompts beside decodes.
    with monkeypatch.context() as patch:
        # Queries and keys turn in the launch that writes keys, and nowhere else.
        patch.delattr(rotary, "rotate")
        tokens, logprobs = generate(tmp_path, "triton", max_num_batched_tokens=18)
    expected_tokens, expected_logprobs = generate(tmp_path, "torch")
    assert tokens == expected_tokens
    assert len({token for row in tokens for token in row}) >= len(PROMPTS)
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=LOGPROB_TOLERANCE, rtol=0)


def test_auto_attention_is_triton_only_on_a_gpu() -> None:
    chosen = make_backend(EngineConfig(device="cuda" if ON_GPU else "cpu"), torch.device("cuda" if ON_GPU else "cpu"))
    assert isinstance(chosen, TritonAttention) == ON_GPU


def test_triton_attention_is_refused_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_device, "interprets", lambda: False)
    kernels_device.device_of.cache_clear()
    with pytest.raises(ModelError, match="TRITON_INTERPRET=1"):
        make_backend(EngineConfig(attention="triton", device="cpu"), torch.device("cpu"))
