"""The lower bound against what real tokenizers make of texts."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine.tokenization.length_bound import LengthBound

CORPUS = ["the cat sat on the mat and the dog sat on the cat", "aaaaaaaaaaaaaaaa        bbbb", "Grüße 日本 x = y"] * 4


def byte_level(**added: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|a longer special token|>", normalized=False, **added)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "aa", "▁aa"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "a"), ("▁a", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def shrinking() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("aaaa", "")])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), byte_level(lstrip=True, rstrip=True), sentencepiece(), shrinking()],
    ids=["byte level", "special tokens that strip", "sentencepiece", "a normalizer that shrinks"],
)
def test_bound_is_never_above_the_tokens_of_a_text(tokenizer: Tokenizer) -> None:
    bound = LengthBound(tokenizer)
    pieces = [
        "the cat ",
        "a",
        "aaaa",
        " " * 9,
        "\u2003",
        "ﬃ",
        "▁",
        "日本",
        "<|a longer special token|>",
        "b",
        "\n",
        "🙂",
    ]
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=draw.randrange(40)))
        assert bound.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids), repr(text)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
def test_bound_grows_with_the_text(tokenizer: Tokenizer) -> None:
    assert LengthBound(tokenizer).least_tokens("a" * 4_000_000) > 100_000


def test_bound_is_zero_when_the_tokenizer_loses_bytes() -> None:
    removing, unknowing = (
        byte_level(),
        Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
    )
    removing.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    unknowing.decoder = decoders.ByteLevel()
    for tokenizer in (removing, unknowing, Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))):
        assert LengthBound(tokenizer).least_tokens("b" * 100_000) == 0
