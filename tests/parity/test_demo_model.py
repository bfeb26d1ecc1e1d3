"""The shipped demo model: it answers right, through our engine, and as transformers would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
from demo.evaluate import LEAST_SHARE, score
from demo.tasks import LONGEST_ANSWER, TASKS, holdout, mixed_holdout
from engine import Engine, EngineConfig, SamplingParams
from engine.errors import InvalidPrompt
from engine.tokenization.tokenizer import Tokenizer
from kernels.cpu.library import CpuKernelsUnavailable, library

MODEL = Path(demo.__file__).parent / "model"
GREEDY = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER + 2)


def load(dtype: str = "auto", *, random_weights: bool = False) -> Engine:
    config = EngineConfig(dtype=dtype, device="cpu", num_kv_blocks=1024, random_weights=random_weights)
    return Engine.from_pretrained(MODEL, config)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(MODEL)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(("dtype", "count"), [("float32", 400), ("bfloat16", 100)])
def test_held_out_problems_are_answered_exactly(dtype: str, count: int) -> None:
    engine = load(dtype)
    for task in TASKS:
        result = score(engine, task, holdout(task, count, seed=1))
        assert result.share >= LEAST_SHARE, result.wrong


def test_int8_still_answers_exactly() -> None:
    try:
        library()
    except CpuKernelsUnavailable as error:
        pytest.skip(str(error))
    engine = Engine.from_pretrained(MODEL, EngineConfig(device="cpu", num_kv_blocks=1024, quantization="int8"))
    for task in TASKS:
        result = score(engine, task, holdout(task, 100, seed=1))
        assert result.share >= LEAST_SHARE, result.wrong


def test_random_weights_answer_nothing() -> None:
    assert score(load(random_weights=True), "sort", holdout("sort", 50)).share == 0


def test_greedy_tokens_equal_those_of_transformers(engine: Engine) -> None:
    prompts = [problem.prompt for problem in mixed_holdout(60, seed=2)]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == torch.float32
    for prompt, output in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        theirs = model.generate(**inputs, max_new_tokens=GREEDY.max_tokens)[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(output.token_ids) == theirs
        assert theirs[-1] == tokenizer.eos_token_id
        assert output.text == tokenizer.decode(theirs, skip_special_tokens=True)


def test_chat_asks_what_its_last_user_message_says(engine: Engine, tokenizer: Tokenizer) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "sort garden"},
        {"role": "assistant", "content": "adegnr"},
        {"role": "user", "content": " reverse garden\n"},
    ]
    rendered = tokenizer.encode_chat(conversation)
    assert rendered == tokenizer.encode("reverse garden =")
    assert rendered == tokenizer.encode_chat([{"role": "user", "content": "reverse garden ="}])
    assert engine.generate([rendered], GREEDY)[0].text == "nedrag"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "system", "content": "x"}, "there is no user message"),
        ({"role": "user", "content": [{"type": "text", "text": "sort garden"}]}, "not plain text"),
    ],
)
def test_chat_without_a_users_text_is_refused(tokenizer: Tokenizer, message: dict[str, object], error: str) -> None:
    with pytest.raises(InvalidPrompt, match=error):
        tokenizer.encode_chat([message])


def test_tokenizer_gives_back_every_character_it_knows(tokenizer: Tokenizer) -> None:
    known = "".join(map(chr, range(32, 127))) + "\n  two  spaces , and don't ! "
    assert tokenizer.decode(tokenizer.encode(known)) == known
    assert len(tokenizer.encode(known)) == 1 + len(known)
    assert tokenizer.decode(tokenizer.encode("aé\t\x00b")) == "ab"


def test_model_has_fewer_than_a_million_weights() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) < 1_000_000  # noqa: SIM118
