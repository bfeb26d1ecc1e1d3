"""Turn text into tokens and back, exactly as the model's own tokenizer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidPrompt, ModelError
from engine.tokenization.length_bound import LengthBound
from engine.tokenization.token_bytes import PieceReader, UnreadableDecoder, piece_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


class Tokenizer:
    """The tokenizer and chat template of a model.

    The batch methods never raise for one bad item: its place in the result holds the `InvalidPrompt` instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hf_tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # A tokenizer.json may ask for padding or truncation to a fixed length. transformers switches both off in
            # its first call; done here, no answer depends on which call comes first.
            backend.no_padding()
            backend.no_truncation()
            self._special |= {token for token, info in backend.get_added_tokens_decoder().items() if info.special}

    @classmethod
    def from_pretrained(cls, directory: Path) -> Tokenizer | None:
        """Load from the directory of a model; None where it holds no tokenizer.

        Raises `ModelError` when there is one that does not load. No code from the directory runs.
        """
        if not any((directory / name).exists() for name in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False))
        except Exception as error:
            raise ModelError(f"the tokenizer in {directory} does not load: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self.hf_tokenizer.chat_template is not None

    @cached_property
    def chat_template(self) -> str:
        """The text of the model's chat template, or of all of them; empty where it has none."""
        found = self.hf_tokenizer.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of one text; raises `InvalidPrompt`."""
        try:
            token_ids: list[int] = self.hf_tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
                "input_ids"
            ]
        except Exception as error:
            raise InvalidPrompt(f"the prompt does not become tokens: {error}") from error
        return token_ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int] | InvalidPrompt]:
        """Return the tokens of many texts; a fast tokenizer uses all cores."""
        if not texts:
            return []
        try:
            encoded = self.hf_tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
            return list(encoded["input_ids"])
        except Exception:  # noqa: BLE001 - one by one, to find the text at fault
            return [self._encode_or_error(text, add_special_tokens=add_special_tokens) for text in texts]

    def _encode_or_error(self, text: str, *, add_special_tokens: bool) -> list[int] | InvalidPrompt:
        try:
            return self.encode(text, add_special_tokens=add_special_tokens)
        except InvalidPrompt as error:
            return error

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at least, without special tokens, found without tokenizing it; 0 if not known."""
        return 0 if self._length_bound is None else self._length_bound.least_tokens(text)

    @cached_property
    def _length_bound(self) -> LengthBound | None:
        backend = getattr(self.hf_tokenizer, "backend_tokenizer", None)
        return None if backend is None else LengthBound(backend)

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> str:
        """Return the conversation as the chat template writes it, ready for the assistant's turn.

        `template_options` reach the template (`tools`, `enable_thinking` ...). Raises `InvalidPrompt`.
        """
        if not self.has_chat_template:
            raise InvalidPrompt("this model has no chat template: send a prompt instead of messages")
        options = {"add_generation_prompt": True, **template_options}
        try:
            text: str = self.hf_tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **options
            )
        except Exception as error:
            # transformers quotes the whole conversation where its last message cannot be continued.
            reason = str(error).partition("Final message to continue:")[0]
            raise InvalidPrompt(f"the chat template cannot render these messages: {reason}") from error
        return text

    def encode_chat(self, messages: Sequence[Message], **template_options: Any) -> list[int]:
        """Return the tokens of one conversation, whose special tokens the template writes. Raises `InvalidPrompt`."""
        return self.encode(self.render_chat(messages, **template_options), add_special_tokens=False)

    def encode_chat_batch(self, conversations: Sequence[Sequence[Message]]) -> list[list[int] | InvalidPrompt]:
        """Return the tokens of many conversations."""
        rendered: list[str] = []
        places: list[int] = []
        results: list[list[int] | InvalidPrompt] = []
        for place, messages in enumerate(conversations):
            try:
                rendered.append(self.render_chat(messages))
            except InvalidPrompt as error:
                results.append(error)
            else:
                places.append(place)
                results.append([])
        for place, encoded in zip(places, self.encode_batch(rendered, add_special_tokens=False), strict=True):
            results[place] = encoded
        return results

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return what transformers' `decode` does. Incomplete UTF-8 becomes U+FFFD."""
        text: str = self.hf_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's own spelling of each token; empty for ids without a token."""
        return [piece or "" for piece in self.hf_tokenizer.convert_ids_to_tokens(list(token_ids))]

    def info(self) -> dict[str, Any]:
        """Return what `tokenizer_config.json` says of special tokens and the chat template."""
        tokenizer = self.hf_tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: getattr(tokenizer, name, None) for name in names},
            "chat_template": tokenizer.chat_template,
        }

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts of special tokens, as `decode` writes them where it does not leave them out."""
        return frozenset(filter(None, (self.decode([token], skip_special_tokens=False) for token in self._special)))

    def is_special(self, token_id: int) -> bool:
        """Return whether `decode` leaves the token out by default."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text, as UTF-8 that may begin or end within a character.

        A special token's bytes are its name. Ids without a token have none.
        """
        piece = self.hf_tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if self._read_piece is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        return self._read_piece(piece)

    @cached_property
    def _read_piece(self) -> PieceReader | None:
        backend = getattr(self.hf_tokenizer, "backend_tokenizer", None)
        try:
            return None if backend is None else piece_reader(backend.decoder)
        except UnreadableDecoder:
            return None
