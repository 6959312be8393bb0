"""The bytes of tokens for decoders and added tokens that the small tokenizers lack, and how far a bound on a text's
tokens can be trusted. The judge of text is transformers; of the bound, encoding itself."""

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quire.text.token_bytes import byte_level_alphabet
from quire.text.tokenizer import Tokenizer as OurTokenizer
from tests.text.small_tokenizers import byte_level, write_directory

PIECES = ["<unk>", "▁", "▁hello", "▁world", "hello", "a", "▁▁", "b▁c", "▁é"]


def word_pieces(decoder: Any) -> Tokenizer:
    """Whole pieces, with this decoder."""
    backend = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<unk>"))
    backend.add_tokens([AddedToken("<x>", special=False), AddedToken(" y", special=False)])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoder
    return backend


DECODERS = {
    "metaspace always": lambda: decoders.Metaspace(prepend_scheme="always"),
    "metaspace first": lambda: decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": lambda: decoders.Metaspace(prepend_scheme="never"),
    "metaspace of another sign": lambda: decoders.Metaspace(replacement="b"),
    "replaced, fused": lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
    "fused, replaced": lambda: decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
    "two replaced": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Replace(" ", "_"), decoders.Fuse()]
    ),
    "stripped of one": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "stripped of two": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    ),
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_are_those_of_transformers(tmp_path: Any, kind: str) -> None:
    """Each piece first, after another, and after a special token, shown or not."""
    path = write_directory(tmp_path, word_pieces(DECODERS[kind]()))
    ours, theirs = OurTokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    everything = range(len(theirs))
    (begin,) = theirs.encode("<s>", add_special_tokens=False)
    for first in everything:
        for ids in ([first], *([first, second, 2] for second in everything), [begin, first], [1, begin, first, first]):
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == expected, ids


def test_spaces_go_between_special_tokens_that_are_shown(tmp_path: Any) -> None:
    """Without them added tokens that are not special are told apart by spaces as before."""
    ours = OurTokenizer.from_directory(write_directory(tmp_path, word_pieces(None)))
    ids = [len(PIECES)] * 2
    assert ours.decode(ids) == ours.decode(ids, spaces_between_special_tokens=False) == "<x> <x>"
    assert ours.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "<x><x>"


def test_added_tokens_beside_the_alphabet_of_bytes(tmp_path: Any) -> None:
    """An added token is its own text, unless every character of it stands for a byte: then the decoder reads bytes."""
    backend = byte_level()
    backend.add_tokens([AddedToken(text, special=False) for text in ("é你", "Ġx", "ab", " z", "née", "日é")])
    path = write_directory(tmp_path, backend)
    ours, theirs = OurTokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    ids = list(range(len(theirs) - 6, len(theirs)))
    for one in ids:
        assert ours.decode([one]) == theirs.decode([one], clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert [ours.token_bytes(one) for one in ids[:2]] == ["é你".encode(), b" x"]


def single_bytes() -> Tokenizer:
    """Byte-level without merges: a token is a byte of the normalised text."""
    backend = Tokenizer(models.BPE(vocab={text: byte for text, byte in byte_level_alphabet().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


NORMALISERS: dict[str, tuple[Any, int | None]] = {
    "none": (None, 1),
    "nfc": (normalizers.NFC(), 3),
    "nfc twice": (normalizers.Sequence([normalizers.NFC(), normalizers.NFC()]), 9),
    "prepended": (normalizers.Prepend("▁"), 1),
    "longer": (normalizers.Replace(" ", "▁"), 1),
    "as long": (normalizers.Replace("é", "ab"), 1),
    "shorter in bytes": (normalizers.Replace("é", "e"), None),
    "by a pattern": (normalizers.Replace(Regex(" +"), " "), None),
    "nfkc": (normalizers.NFKC(), None),
    "stripped": (normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), None),
}


def assert_bound(ours: OurTokenizer, bound: int | None) -> None:
    """The tokenizer's bound is this one, and it holds for texts that normalisers and pre-tokenisers shorten most."""
    assert ours.max_token_bytes == bound
    for text in ("\u212a" * 50, "é " * 50, " " * 50, "e\u0301" * 50, "\ufb03" * 50, "a b" * 50):
        assert bound is None or len(ours.encode(text)) * bound >= len(text.encode())


@pytest.mark.parametrize("kind", NORMALISERS)
def test_the_bound_counts_what_the_normaliser_takes_away(tmp_path: Any, kind: str) -> None:
    normaliser, bound = NORMALISERS[kind]
    backend = single_bytes()
    if normaliser is not None:
        backend.normalizer = normaliser
    assert_bound(OurTokenizer.from_directory(write_directory(tmp_path, backend, files=BARE)), bound)


BARE = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
"""No named tokens, which would be the longest ones."""


@pytest.mark.parametrize(
    ("splitter", "bound"),
    [
        (pre_tokenizers.Split(" ", "isolated"), 1),
        (pre_tokenizers.Split(" ", "merged_with_previous"), 1),
        (pre_tokenizers.Split(" ", "removed"), None),
        (pre_tokenizers.Digits(), 1),
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.Punctuation("removed"), None),
        (pre_tokenizers.Punctuation("isolated"), 1),
    ],
    ids=str,
)
def test_there_is_no_bound_where_text_is_removed(tmp_path: Any, splitter: Any, bound: int | None) -> None:
    backend = single_bytes()
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, backend.pre_tokenizer])
    assert_bound(OurTokenizer.from_directory(write_directory(tmp_path, backend, files=BARE)), bound)


def test_the_bound_is_of_the_longest_token(tmp_path: Any) -> None:
    """By bytes, added tokens and merges included."""
    for token, bound in (("<end>", 5), ("分分", 6)):
        backend = single_bytes()
        backend.add_tokens([AddedToken(token, special=False, normalized=False)])
        assert_bound(OurTokenizer.from_directory(write_directory(tmp_path / token, backend, files=BARE)), bound)
    backend = Tokenizer(
        models.BPE(vocab=byte_level_alphabet() | {"ab": 256, "abab": 257}, merges=[("a", "b"), ("ab", "ab")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ours = OurTokenizer.from_directory(write_directory(tmp_path / "merged", backend, files=BARE))
    assert_bound(ours, 4)
    assert len(ours.encode("abab" * 9)) == 9
