"""From a GGUF file's vocabulary to the tokenizer that transformers has for it.

Two kinds: byte-level BPE ("gpt2"), whose merges are in the file and whose way of cutting text into words has a name in
it, and SentencePiece ("llama"), whose merges follow from scores or, for Gemma, from the order of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer

from engine.errors import InvalidWeights, UnsupportedModel
from engine.loading.gguf.file import GGUFFile
from engine.loading.gguf.merges import merges_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
"""What SentencePiece writes a space as."""


@dataclass(frozen=True, slots=True)
class _Words:
    """How text is cut into words before its bytes are merged."""

    pattern: str | None = None
    """None: as GPT-2 does."""

    single_digits: bool = False
    composes: bool = False
    """Unicode's composed form (NFC) first."""

    whole_words: bool = False
    """A word that is in the vocabulary is a token even where no merges lead to it."""

    adds_bos: bool = False
    """Where the file does not say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _Words(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST, whole_words=True, adds_bos=True)

_WORDS = {
    "deepseek-r1-qwen": _Words(_QWEN2),
    "gpt-2": _Words(),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Words(_QWEN2, composes=True),
    "smollm": _Words(single_digits=True),
    "starcoder": _Words(single_digits=True),
}
"""By `tokenizer.ggml.pre`."""


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerBase | None:
    """Return the file's tokenizer with its chat template; None where the file has no vocabulary.

    Raises `UnsupportedModel` for kinds of tokenizers that are not known, `InvalidWeights` for damaged ones.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none" or "tokenizer.ggml.tokens" not in metadata:
        return None
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"{file.path.name} has a tokenizer of the kind {kind!r}; gpt2 and llama are read")
    try:
        backend = _byte_level(file) if kind == "gpt2" else _sentencepiece(file)
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        special = {name: _token(file, f"tokenizer.ggml.{key}_token_id", tokens) for name, key in _SPECIAL.items()}
        _add_tokens(backend, _spelled(file), metadata.get("tokenizer.ggml.token_type") or ())
        _frame(backend, file, special)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=metadata.get(f"{file.architecture}.context_length"),
            **special,
        )
    except (InvalidWeights, UnsupportedModel):
        raise
    except Exception as error:
        raise InvalidWeights(f"{file.path.name}: the tokenizer does not load: {error}") from error


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _token(file: GGUFFile, key: str, tokens: Sequence[str]) -> str | None:
    token_id = file.metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise InvalidWeights(f"{file.path.name}: {key} is {token_id!r}, no token of the {len(tokens)}")
    return tokens[token_id]


def _words(file: GGUFFile) -> _Words:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name not in _WORDS:
        says = "does not say how its tokenizer cuts text" if name is None else f"cuts text as {name!r} does"
        raise UnsupportedModel(
            f"{file.path.name} {says} (tokenizer.ggml.pre); known ways are {', '.join(sorted(_WORDS))}"
        )
    return _WORDS[name]


def _byte_level(file: GGUFFile) -> BackendTokenizer:
    words = _words(file)
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.merges" not in file.metadata:
        raise InvalidWeights(f"{file.path.name} lacks tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = BackendTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole_words, byte_fallback=False)
    )
    if words.composes:
        backend.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None)
    before: list[Any] = []
    if words.pattern is not None:
        before.append(pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"))
    if words.single_digits:
        before.append(pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_]) if before else bytes_
    backend.decoder = decoders.ByteLevel()
    return backend


def _is_gemma(file: GGUFFile) -> bool:
    return file.architecture.startswith("gemma")


def _spelled(file: GGUFFile) -> list[str]:
    """The vocabulary as the tokenizer spells it; Gemma's files have tokens of spaces alone as spaces."""
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    if not _is_gemma(file):
        return tokens
    return [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]


def _sentencepiece(file: GGUFFile) -> BackendTokenizer:
    metadata = file.metadata
    tokens, kinds = _spelled(file), metadata.get("tokenizer.ggml.token_type") or ()
    is_gemma = _is_gemma(file)
    if is_gemma:
        # The scores in the file are not those that it was trained with; the order of the vocabulary is.
        ranks = [-float(index) for index in range(len(tokens))]
        ranks = [0.0 if kind == _USER_DEFINED else rank for rank, kind in zip(ranks, kinds, strict=False)]
    else:
        ranks = metadata.get("tokenizer.ggml.scores") or []
    if not len(tokens) == len(ranks) == len(kinds):
        raise InvalidWeights(
            f"{file.path.name} has {len(tokens)} tokens, but {len(ranks)} scores and {len(kinds)} types of them"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = BackendTokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(tokens, ranks, kinds),
            unk_token=_token(file, "tokenizer.ggml.unknown_token_id", tokens),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", _SPACE)
    decoder: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), space])
        decoder.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(decoder)
    return backend


def _add_tokens(backend: BackendTokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that are found in a text before anything else is."""
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, its_kind in zip(tokens, kinds, strict=False)
            if its_kind == kind and token
        ]
        if is_special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)


def _frame(backend: BackendTokenizer, file: GGUFFile, special: dict[str, str | None]) -> None:
    """Put the beginning and the end that the file asks for around each text."""
    metadata = file.metadata
    adds_bos = _words(file).adds_bos if metadata["tokenizer.ggml.model"] == "gpt2" else True
    first = special["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    last = special["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    around = {token: backend.token_to_id(token) for token in (first, last) if token is not None}

    def framed(text: str, kind: int) -> list[str]:
        return [f"{part}:{kind}" for part in (first, text, last) if part is not None]

    template = processors.TemplateProcessing(
        single=framed("$A", 0), pair=framed("$A", 0) + framed("$B", 1), special_tokens=list(around.items())
    )
    is_byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    backend.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template]) if is_byte_level else template
    )
