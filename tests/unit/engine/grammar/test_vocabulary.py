"""Tokens as bytes, for each kind of tokenizer, against what the tokenizer itself decodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo.tokenizer import build_tokenizer
from engine.grammar.vocabulary import UnreadableVocabulary, Vocabulary
from tests.unit.engine.tokenization.test_tokenizer import byte_level, with_byte_fallback

MakeTokenizer = Callable[[], PreTrainedTokenizerFast]

KINDS: dict[str, MakeTokenizer] = {
    "byte-level": byte_level,
    "byte fallback": with_byte_fallback,
    "characters": lambda: build_tokenizer(100),
}


def vocabulary(
    tokenizer: PreTrainedTokenizerFast, padding: int = 0, eos: frozenset[int] = frozenset({1})
) -> Vocabulary:
    return Vocabulary.of(tokenizer, len(tokenizer) + padding, eos)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_token_bytes_join_to_what_the_tokenizer_decodes(make: MakeTokenizer) -> None:
    tokenizer = make()
    read = vocabulary(tokenizer)
    for text in ("the fox", '{"a": [1, 2]}', "a  b", "x\ny"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(read.tokens[token] for token in ids).decode().strip() == tokenizer.decode(ids).strip()


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
def test_decode_shows_incomplete_characters_as_replacement(make: MakeTokenizer) -> None:
    read = vocabulary(make())
    single = {token for token in read.tokens if len(token) == 1}
    assert len(single) >= 255  # 0xff stands in no text
    smile = [read.tokens.index(bytes([byte])) for byte in "🙂".encode()]
    assert read.decode(smile, skip_special_tokens=True) == "🙂"
    assert read.decode(smile[:3], skip_special_tokens=True) == "�"


def test_decode_keeps_a_leading_space() -> None:
    tokenizer = with_byte_fallback()
    token = tokenizer.convert_tokens_to_ids("▁the")
    assert tokenizer.decode([token]) == "the"
    assert vocabulary(tokenizer).decode([token], skip_special_tokens=True) == " the"


def test_decode_skips_special_tokens() -> None:
    read = vocabulary(byte_level())
    assert {0, 1, 2} <= read.special
    assert read.decode([0, 1], skip_special_tokens=True) == ""
    assert read.decode([0, 1], skip_special_tokens=False) == "<s></s>"


@pytest.mark.parametrize(
    ("make", "added"),
    [
        (with_byte_fallback, ["▁▁▁", "x▁y", "<0x4g>", "Ġ"]),
        (byte_level, ["ĠĠĠ", "Ġ é", "日本Ġ", "▁▁"]),
        (lambda: build_tokenizer(100), ["▁▁", "Ġ"]),
    ],
    ids=["byte fallback", "byte-level", "characters"],
)
def test_added_token_is_decoded_like_any_other(make: MakeTokenizer, added: list[str]) -> None:
    tokenizer = make()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    read = vocabulary(tokenizer)
    # A text's first token may lose its space: one stands in front.
    first = tokenizer.convert_tokens_to_ids("a")
    for token in tokenizer.convert_tokens_to_ids(added):
        expected = tokenizer.decode([first, token]).removeprefix("a")
        assert read.decode([token], skip_special_tokens=True) == expected


def test_special_token_is_decoded_by_the_decoder_and_named_as_it_is_written() -> None:
    tokenizer = with_byte_fallback()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a▁b>"]})
    read = vocabulary(tokenizer)
    token = tokenizer.convert_tokens_to_ids("<a▁b>")
    assert read.decode([token], skip_special_tokens=False) == tokenizer.decode([token]) == "<a b>"
    assert read.wire_tokens()[token] == b"\xff" + "<a▁b>".encode()


def test_vocabulary_is_read_when_the_tokenizer_pads_to_a_fixed_length() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_padding(length=64, pad_id=2, pad_token="<unk>")
    assert vocabulary(tokenizer).tokens == vocabulary(byte_level()).tokens


def test_token_ids_outside_the_vocabulary_end_nothing() -> None:
    read = Vocabulary([b"a", b"b", b"c"], {-1, 3, 2}, {-1, 3, 1}, 3)
    assert read.eos_token_ids == {1}
    assert read.special == {1, 2}
    assert read.eos_bits.tolist() == [1 << 1]


def test_token_too_long_for_llguidance_is_left_out() -> None:
    read = Vocabulary([b"a", b"b" * 1024, b"c" * 1025], (), {0}, 3)
    assert [len(token) for token in read.tokens] == [1, 1024, 0]
    assert read.for_llguidance.vocab_size == 4


def test_padding_rows_of_the_model_are_no_tokens() -> None:
    tokenizer = byte_level()
    read = vocabulary(tokenizer, padding=45)
    allowed = {t for t in range(read.num_words * 32) if read.real_bits[t // 32] >> (t % 32) & 1}
    assert allowed == {t for t in range(len(tokenizer)) if read.tokens[t]}
    assert read.end_id == len(tokenizer) + 45


def test_vocabulary_is_cut_when_the_model_is_smaller_than_its_tokenizer() -> None:
    tokenizer = byte_level()
    read = Vocabulary.of(tokenizer, len(tokenizer) - 10, {1})
    assert len(read.tokens) == len(tokenizer) - 10


class TestUnreadable:
    def make(self, decoder: object) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if decoder is not None:
            tokenizer.decoder = decoder
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")

    @pytest.mark.parametrize(
        ("decoder", "reason"),
        [(None, "no decoder"), (decoders.WordPiece(), "WordPiece"), (decoders.Fuse(), "no word")],
        ids=["none", "word pieces", "words"],
    )
    def test_unreadable_vocabulary_says_why(self, decoder: object, reason: str) -> None:
        with pytest.raises(UnreadableVocabulary, match=reason):
            vocabulary(self.make(decoder))

    def test_vocabulary_is_unreadable_when_the_decoder_writes_other_text(self) -> None:
        tokenizer = build_tokenizer(100)
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip("}", 0, 1)])
        with pytest.raises(UnreadableVocabulary, match="writes"):
            vocabulary(tokenizer)
