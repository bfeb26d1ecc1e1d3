"""Tokenizer against transformers' own: byte-level BPE, and pieces with byte fallback as in SentencePiece."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import InvalidPrompt, ModelError
from engine.tokenization.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "Grüße aus Köln", "naïve café", "one two three"] * 4
SPECIAL = ["<s>", "</s>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "a", "b", "the", "n"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, with_byte_fallback])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = request.param()
    return made


def test_encode_batch_equals_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["the fox", "", "Grüße 🙂", "a" * 300]
    assert Tokenizer(tokenizer).encode_batch(texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_decode_equals_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    ours = Tokenizer(tokenizer)
    tokens = [*tokenizer("the fox 🙂 naïve")["input_ids"], 1]
    for cut in range(len(tokens) + 1):  # also in the middle of a character
        for skip in (True, False):
            expected = tokenizer.decode(tokens[:cut], skip_special_tokens=skip)
            assert ours.decode(tokens[:cut], skip_special_tokens=skip) == expected
    assert ours.decode(tokens) == "the fox 🙂 naïve"
    assert ours.decode(tokens, skip_special_tokens=False).endswith("</s>")


def test_token_bytes_join_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    read, text = Tokenizer(tokenizer), "a the fox 🙂 naïve"
    tokens = tokenizer(text)["input_ids"]
    assert b"".join(map(read.token_bytes, tokens)).decode().strip() == text
    assert any(len(read.token_bytes(token)) == 1 for token in tokenizer("🙂")["input_ids"])
    assert read.token_bytes(1) == b"</s>"
    assert read.token_bytes(10**6) == b""
    assert read.is_special(1)
    assert not read.is_special(tokens[-1])


def test_token_bytes_are_the_text_when_the_decoder_is_unknown() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##")
    token = tokenizer.convert_tokens_to_ids("a")
    assert Tokenizer(tokenizer).token_bytes(token) == b"a"


def test_fixed_padding_and_truncation_of_a_tokenizer_json_are_off() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_padding(length=64, pad_id=2, pad_token="<unk>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    Tokenizer(tokenizer)
    assert tokenizer.backend_tokenizer.padding is None
    assert tokenizer.backend_tokenizer.truncation is None


def test_encode_batch_fails_one_bad_text_alone() -> None:
    first, second, third = Tokenizer(byte_level()).encode_batch(["fox", "\ud800", "dog"])
    assert isinstance(first, list)
    assert isinstance(second, InvalidPrompt)
    assert isinstance(third, list)
    with pytest.raises(InvalidPrompt):
        Tokenizer(byte_level()).encode("\ud800")


MESSAGES = [{"role": "user", "content": "the fox"}]


def with_template() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    return Tokenizer(tokenizer)


class TestChat:
    def test_chat_template_renders_and_encodes_as_in_transformers(self) -> None:
        tokenizer = with_template()
        assert tokenizer.render_chat(MESSAGES) == "<s>user: the fox</s><s>assistant:"
        expected = tokenizer.hf_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(MESSAGES) == expected
        assert tokenizer.encode_chat_batch([MESSAGES]) == [expected]

    def test_encode_chat_batch_fails_one_bad_conversation_alone(self) -> None:
        tokenizer, good = with_template(), MESSAGES
        results = tokenizer.encode_chat_batch([good, [{"role": "robot", "content": "x"}], [], good])
        assert [isinstance(result, InvalidPrompt) for result in results] == [False, True, True, False]
        assert "no robots" in str(results[1])
        assert results[0] == results[3]

    def test_render_chat_is_refused_when_the_model_has_no_template(self) -> None:
        with pytest.raises(InvalidPrompt, match="no chat template"):
            Tokenizer(byte_level()).render_chat(MESSAGES)


def test_tokenizer_loads_from_a_directory(tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(tmp_path) is None
    byte_level().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_tokenizer_that_does_not_load_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="does not load"):
        Tokenizer.from_pretrained(tmp_path)
