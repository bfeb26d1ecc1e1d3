"""A model's tokens as bytes, which is what grammars are about."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Words = npt.NDArray[np.int32]

_SPECIAL = b"\xff"
"""Before a special token's name, by llguidance's convention; no UTF-8 holds this byte."""

_SAMPLES = ('{"name": "Ada", "tags": [1, 2.5, true, null]}', "a b  c", "x = y\n", "Grüße, naïve 日本 🙂", "reverse")


class UnreadableVocabulary(Exception):
    """A tokenizer whose tokens cannot be told as bytes; the message says why."""


class Vocabulary:
    """Tokens as bytes, and who among them ends an output.

    Token ids from `len(tokens)` on, up to `vocab_size`, are rows that the model pads its output with; no grammar allows
    them. llguidance is told of one more token, `end_id`, which no model has: its bit says that the output may end.
    """

    def __init__(
        self, tokens: Sequence[bytes], special: Collection[int], eos_token_ids: Collection[int], vocab_size: int
    ) -> None:
        self.vocab_size = vocab_size
        self.tokens = [*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))]
        self.special = frozenset(token for token in (*special, *eos_token_ids) if token < vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        for token, name in enumerate(self.tokens):
            # A byte that no text holds, alone: llguidance would take it for the mark of a special token.
            if token not in self.special and name.startswith(_SPECIAL):
                self.tokens[token] = b""
        self.end_id = vocab_size
        self.real_bits = self._bits(token for token, name in enumerate(self.tokens) if name)
        """Tokens that a grammar may allow; `num_words` words, bit `t % 32` of word `t // 32` for token t."""
        self.eos_bits = self._bits(self.eos_token_ids)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Collection[int]) -> Vocabulary:
        """Read a tokenizer; raises `UnreadableVocabulary`. Takes about half a second for 128,000 tokens."""
        # Nothing here changes the tokenizer, so that others may use it meanwhile.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnreadableVocabulary("its tokenizer is not one of the tokenizers library")
        to_bytes = _reader(backend.decoder)
        added = backend.get_added_tokens_decoder()
        pieces: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(pieces.values(), default=-1) + 1)
        for piece, token in pieces.items():
            tokens[token] = piece.encode() if token in added else to_bytes(piece)
        special = {token for token, info in added.items() if info.special} | set(tokenizer.all_special_ids)
        vocabulary = cls(tokens, special, eos_token_ids, vocab_size)
        vocabulary._compare(backend)
        return vocabulary

    @property
    def num_words(self) -> int:
        return -(-(self.vocab_size + 1) // 32)

    @cached_property
    def for_llguidance(self) -> LLTokenizer:
        """The trie of all tokens; costs about a second for 128,000."""
        return LLTokenizer(_Wrapped(self.wire_tokens(), self.end_id))

    def wire_tokens(self) -> list[bytes]:
        """Tokens as llguidance takes them, special ones marked, the end last."""
        marked = [_SPECIAL + name if token in self.special else name for token, name in enumerate(self.tokens)]
        return [*marked, b""]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The very text that the grammar saw: tokenizers trim and tidy theirs. Incomplete UTF-8 becomes U+FFFD."""
        skipped = self.special if skip_special_tokens else frozenset()
        return b"".join(self.tokens[token] for token in token_ids if token not in skipped).decode(errors="replace")

    def _bits(self, token_ids: Iterator[int] | Collection[int]) -> Words:
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[[token for token in token_ids if token < self.vocab_size]] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _compare(self, backend: Any) -> None:
        """See on samples that our bytes are what the tokenizer says; one leading space is its to trim."""
        compared = 0
        for sample in _SAMPLES:
            ids = backend.encode(sample, add_special_tokens=False).ids
            if not ids or not self.special.isdisjoint(ids) or max(ids) >= self.vocab_size:
                continue
            theirs: str = backend.decode(ids, skip_special_tokens=False)
            ours = self.decode(ids, skip_special_tokens=False)
            if ours.removeprefix(" ") != theirs.removeprefix(" "):
                raise UnreadableVocabulary(f"its tokenizer writes {theirs!r} where its tokens say {ours!r}")
            compared += 1
        if compared == 0:
            raise UnreadableVocabulary("its tokenizer knows no word of plain text")


class _Wrapped(TokenizerWrapper):
    """What llguidance asks of a tokenizer. It never tokenises: our grammars force no tokens."""

    def __init__(self, tokens: list[bytes], end_id: int) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens = tokens
        self.special_token_ids: list[int] = []
        self.eos_token_id = end_id
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        raise AssertionError("a grammar forces tokens")


def _reader(decoder: Any) -> Callable[[str], bytes]:
    """How a piece of the vocabulary becomes bytes, by the tokenizer's decoder."""
    if decoder is None:
        raise UnreadableVocabulary("its tokenizer has no decoder")
    parts = list(_flat(json.loads(decoder.__getstate__())))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda piece: b"".join(table.get(char) or char.encode() for char in piece)
    unknown = kinds - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if unknown:
        raise UnreadableVocabulary(f"its tokenizer decodes by {', '.join(sorted(unknown))}")
    replaced = [(part["replacement"], " ") for part in parts if part["type"] == "Metaspace"]
    for part in parts:
        if part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise UnreadableVocabulary("its tokenizer decodes by a regular expression")
            replaced.append((part["pattern"]["String"], part["content"]))
    falls_back = "ByteFallback" in kinds

    def to_bytes(piece: str) -> bytes:
        if falls_back and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return to_bytes


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder


def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
