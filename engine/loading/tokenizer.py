"""A model's tokenizer, from its directory or its GGUF file."""

from __future__ import annotations

from pathlib import Path

from engine.loading.configurations import auto_config
from engine.loading.hub import is_gguf
from engine.tokenization.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer with its chat template; None where there is none. Raises `ModelError`."""
    if not is_gguf(path):
        auto_config()  # which `AutoTokenizer` imports as well, and all the models with it
        return Tokenizer.from_pretrained(path)
    from engine.loading.gguf.file import GGUFFile
    from engine.loading.gguf.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(GGUFFile(path))
    return None if tokenizer is None else Tokenizer(tokenizer)
