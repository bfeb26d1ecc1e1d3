"""The vocabulary of a model as llguidance reads it: tokens as bytes, special tokens by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from engine.grammar.spelling import Speller
from engine.tokenization.token_bytes import UnreadableDecoder, piece_reader
from kernels.integers import ceil_div

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Words = npt.NDArray[np.int32]

_SPECIAL = b"\xff"
"""Before a special token's name, by llguidance's convention; no UTF-8 holds this byte."""

_MAX_TOKEN_BYTES = 1024
"""llguidance's trie counts a node's parents in 10 bits, and panics at longer tokens: no grammar allows them."""

_SAMPLES = ('{"name": "Ada", "tags": [1, 2.5, true, null]}', "a b  c", "x = y\n", "Grüße, naïve 日本 🙂", "reverse")


class UnreadableVocabulary(Exception):
    """The bytes of a tokenizer's tokens are unknown; the message says why."""


class Vocabulary:
    """Tokens as bytes, and which of them end an output.

    Token ids from `len(tokens)` on, up to `vocab_size`, are rows that the model pads its output with; no grammar allows
    them. llguidance is told of one more token, `end_id`, which no model has: its bit says that the output may end.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Collection[int],
        eos_token_ids: Collection[int],
        vocab_size: int,
        *,
        special_names: Mapping[int, bytes] | None = None,
    ) -> None:
        """`tokens` are what each token adds to a text. Grammars call a special token by its name in `special_names`,
        or else by its bytes. Ids outside the vocabulary are ignored."""
        self.vocab_size = vocab_size
        self.tokens = [*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))]
        self.eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self.special = frozenset(token for token in special if 0 <= token < vocab_size) | self.eos_token_ids
        self._special_names = special_names or {}
        for token, name in enumerate(self.tokens):
            # llguidance would take a first byte 0xFF for the mark of a special token.
            if token not in self.special and (name.startswith(_SPECIAL) or len(name) > _MAX_TOKEN_BYTES):
                self.tokens[token] = b""
        self.end_id = vocab_size
        self._speller: Speller | None = None
        self.real_bits = self._bits(token for token, name in enumerate(self.tokens) if name)
        """Tokens that a grammar may allow; `num_words` words, bit `t % 32` of word `t // 32` for token t."""
        self.eos_bits = self._bits(self.eos_token_ids)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Collection[int]) -> Vocabulary:
        """Read a tokenizer, without changing it; raises `UnreadableVocabulary`.

        Takes about half a second for 128,000 tokens.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnreadableVocabulary("its tokenizer is not one of the tokenizers library")
        try:
            to_bytes = piece_reader(backend.decoder)
        except UnreadableDecoder as error:
            raise UnreadableVocabulary(str(error)) from error
        added = backend.get_added_tokens_decoder()
        pieces: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(pieces.values(), default=-1) + 1)
        for piece, token in pieces.items():
            tokens[token] = to_bytes(piece)
        special = {token for token, info in added.items() if info.special} | set(tokenizer.all_special_ids)
        names = {token: info.content.encode() for token, info in added.items()}
        vocabulary = cls(tokens, special, eos_token_ids, vocab_size, special_names=names)
        vocabulary._compare(backend)
        vocabulary._speller = Speller(backend, vocabulary.tokens, vocabulary.special)
        return vocabulary

    @property
    def can_spell(self) -> bool:
        """Whether there is a tokenizer that says how a text is spelled, so that grammars may force tokens."""
        return self._speller is not None

    @property
    def num_words(self) -> int:
        return ceil_div(self.vocab_size + 1, 32)

    @cached_property
    def for_llguidance(self) -> LLTokenizer:
        """The trie of all tokens; takes about a second for 128,000."""
        return LLTokenizer(_Wrapped(self.wire_tokens(), self.end_id, self._speller))

    def wire_tokens(self) -> list[bytes]:
        """Return tokens as llguidance reads them: special ones marked, `end_id` last."""
        wire = [
            _SPECIAL + self._special_names.get(token, text) if token in self.special else text
            for token, text in enumerate(self.tokens)
        ]
        return [*(name if len(name) <= _MAX_TOKEN_BYTES else b"" for name in wire), b""]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text that the grammar saw, which tokenizers trim and tidy. Incomplete UTF-8 becomes U+FFFD."""
        skipped = self.special if skip_special_tokens else frozenset()
        return b"".join(self.tokens[token] for token in token_ids if token not in skipped).decode(errors="replace")

    def _bits(self, token_ids: Iterable[int]) -> Words:
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[list(token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    def _compare(self, backend: Any) -> None:
        """Compare bytes with what the tokenizer decodes, on samples; it may trim one leading space.

        Raises `UnreadableVocabulary`.
        """
        compared = 0
        for sample in _SAMPLES:
            encoding = backend.encode(sample, add_special_tokens=False)
            # A tokenizer may pad to a fixed length.
            ids = [token for token, is_text in zip(encoding.ids, encoding.attention_mask, strict=True) if is_text]
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
    """The attributes of a tokenizer that llguidance reads; it is called for text that a grammar forces."""

    def __init__(self, tokens: list[bytes], end_id: int, speller: Speller | None) -> None:
        self._speller = speller
        self.is_tokenizer_wrapper = True
        self.tokens = tokens
        self.special_token_ids: list[int] = []
        self.eos_token_id = end_id
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        assert self._speller is not None, "a grammar forces tokens that cannot be spelled"
        return self._speller.spell(text if isinstance(text, str) else text.decode())
