"""The models of the workloads: the shapes of known ones with random weights, made once and kept on disk, and SmolLM2.

Speed does not depend on what the weights say, unless a model is to end its answers. They are saved in bfloat16, which
every contender can load exactly into the type that it computes in.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.packaged_models import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
# A spread above the initial one, so that greedy outputs are no single repeated token.
SPREAD = 1.5


def _gpt2(**shape: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _llama3() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _smollm2() -> Any:
    from engine.loading.hub import load_config

    return load_config(fetch("smollm2"))


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2-large": lambda: _gpt2(n_embd=1280, n_layer=36, n_head=20),
    "qwen3-0.6b": _qwen3,
    "llama-3.1-8b": _llama3,
    "smollm2": _smollm2,
    "tiny": lambda: _gpt2(n_embd=128, n_layer=2, n_head=2, vocab_size=16_000, n_positions=256),
}


def model_directory(name: str, cache: Path) -> Path:
    """The model's directory under `cache`, with weights and tokenizer; made where it is not there yet."""
    directory = cache / "models" / name
    if not directory.exists():
        draft = directory.with_name(f".{name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        if name == "smollm2":
            _save_smollm2(draft)
        else:
            _save_weights(CONFIGS[name](), draft)
            save_tokenizer(CONFIGS[name]().vocab_size, draft)
        draft.rename(directory)  # at once, so that what is there is whole
    return directory


def end_tokens(directory: Path) -> list[int]:
    """The tokens that end an answer of the model in a directory."""
    found = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


def save_config(name: str, directory: Path) -> None:
    """A directory without weights, for an engine that makes them up itself."""
    CONFIGS[name]().save_pretrained(directory)
    save_tokenizer(CONFIGS[name]().vocab_size, directory)


def _save_weights(config: Any, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(SPREAD)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(directory)


def _save_smollm2(directory: Path) -> None:
    """The packaged GGUF file, dequantized, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from engine.loading.gguf.file import GGUFFile
    from engine.loading.gguf.tensors import checkpoint_name, undo_conversion

    file, config = GGUFFile(fetch("smollm2")), _smollm2()
    state = {}
    for name in file.tensors:
        undo = undo_conversion(file.architecture, config, name)
        tensor = file.read(name)
        state[checkpoint_name(file.architecture, name)] = tensor if undo is None else undo(tensor)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id[-1]
    )
    model.save_pretrained(directory)
    smollm2_tokenizer().save(str(directory / "tokenizer.json"))
    special = file.metadata["tokenizer.ggml.tokens"][config.eos_token_id[-1]]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings |= {f"{kind}_token": special for kind in ("bos", "eos", "pad", "unk")}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@functools.cache
def smollm2_tokenizer() -> Tokenizer:
    """The tokenizer in SmolLM2's file."""
    from engine.loading.gguf.file import GGUFFile
    from engine.loading.gguf.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(GGUFFile(fetch("smollm2")))
    assert tokenizer is not None
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


def save_tokenizer(vocab_size: int, directory: Path) -> None:
    """A byte-level BPE tokenizer with a token for each id of the model, so that every output becomes text.

    Texts are encoded byte by byte: the longer tokens have no merges that lead to them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    tokens = itertools.chain([END], letters, words)
    vocabulary = {token: number for number, token in enumerate(itertools.islice(tokens, vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
    # The class's name of before transformers 5, which older rivals need and newer ones understand.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
