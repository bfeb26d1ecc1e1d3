"""Native models with norms, rotations, gates, experts and draws by Triton's kernels, here in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from kernels import dispatch
from kernels.device import interprets
from tests.parity.comparing import LOGPROB_TOLERANCE
from tests.parity.tiny_models import NATIVE

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [11], [5, 6, 5, 6]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, seed=5, max_tokens=4, ignore_eos=True, logprobs=0),
    SamplingParams(
        temperature=0,
        repetition_penalty=1.5,
        frequency_penalty=1.0,
        presence_penalty=1.0,
        max_tokens=4,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
    ),
]


def generate(directory: Path) -> list[list[tuple[int, float]]]:
    engine = Engine.from_pretrained(directory, EngineConfig(attention="torch", device="cpu", num_kv_blocks=16))
    outputs = engine.generate(PROMPTS, PARAMS)
    assert all(output.error is None for output in outputs)
    scored = [[*(output.prompt_logprobs or ()), *(output.completions[0].logprobs or ())] for output in outputs]
    return [
        [pair for entry in entries if entry is not None for pair in ((entry.token_id, entry.logprob), *entry.top)]
        for entries in scored
    ]


@pytest.mark.skipif(not interprets(), reason="on a GPU, the kernels run anyway")
@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "qwen3",
        "gemma2",
        "qwen3-moe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "phi3", "gemma3", "mixtral")),
    ],
)
def test_fused_kernels_give_the_tokens_of_plain_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(model for model in NATIVE if model.name == name).save(tmp_path)
    expected = generate(tmp_path)
    used = set()

    def note(tensor: torch.Tensor) -> bool:
        used.add(tuple(tensor.shape[1:]))
        return True

    monkeypatch.setattr(dispatch, "use_triton", note)
    found = generate(tmp_path)
    assert used
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            assert abs(one - other) < LOGPROB_TOLERANCE
