"""Tokenizers from GGUF headers, against those that the headers were made of, and against what transformers makes."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from quire.errors import ModelFileError, UnsupportedModelError
from quire.text.gguf_tokenizer import PRE, gguf_tokenizer
from quire.text.tokenizer import Tokenizer
from tests.text.gguf_headers import header_of
from tests.tiny.gguf_files import add, close

TEXTS = [
    "Hello world", "  leading spaces", "tabs\tand\n\nnewlines\r\n end ", "1234567890 12 3.14 １２３ ⅷ", "",
    "def f(x):\n    return x**2  # sq\n", "naïve café Å", "分頁注意力 是什麼？ 日本語テキスト", "한국어 텍스트입니다",
    "👍🏽 family 👨‍👩‍👧", "عربي مرحبا", "हिन्दी में नमस्ते", "it's we'll I'VE they'Re don't", "a" * 200, "     ",
    "\n\n\n", "x", "<s></s> <|im_start|>user<|im_end|> <think> x </think>", "HTTPServer camelCase snake_case",
    "price: $12.50 (50%) — “quoted” ‘single’", "\u200b\u00a0\u2003zero", "std::vector<int>{1,2,3};/n", "ﬁ ½ ²",
    "▁▁ underscores ▁a", "<0x0A> literal byte", "\x00\x01 control \x7f", "end with space ", "1,000,000 and 10000000",
]  # fmt: skip
_POOL = [chr(code) for code in range(32, 127)] * 2 + list("éüñçß分頁日本語한국어👍🏽ابجد\u200d\u00a0\n\t\r   ")
_RANDOM = random.Random(0)
TEXTS += ["".join(_RANDOM.choices(_POOL, k=_RANDOM.randrange(1, 60))) for _ in range(200)]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>"]


def trained(backend: Backend, alphabet: list[str]) -> Backend:
    """A vocabulary with merges of words, digits and spaces, in which any byte can be said."""
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return backend


@pytest.fixture(scope="module")
def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def sentencepiece() -> Backend:
    """As Llama 2's tokenizer.json is."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    words = sorted({word for text in TEXTS for word in text.split()})
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *bytes_], max_token_length=12, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    return Backend.from_str(json.dumps(state))


def state(backend: Backend) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def made(header: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    return Tokenizer(gguf_tokenizer("x.gguf", header, architecture))


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str] = TEXTS) -> None:
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        ids = getattr(ids, "ids", ids)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("pre", ["gpt-2", "olmo", "mpt"])
def test_text_is_cut_as_gpt2_does(pre: str, byte_level: Backend) -> None:
    assert_same(made(header_of(state(byte_level), pre)), byte_level)


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact"])
def test_digits_stand_alone_where_the_rule_says_so(pre: str, byte_level: Backend) -> None:
    theirs = Backend.from_str(byte_level.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ours = made(header_of(state(byte_level), pre))
    assert_same(ours, theirs)
    assert any(ours.encode(text) != byte_level.encode(text).ids for text in TEXTS)


def written(path: Path, header: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in header.items():
        add(writer, key, value)
    add(writer, f"{architecture}.block_count", 1)
    return close(writer)


@pytest.mark.parametrize("pre", ["llama-bpe", "smaug-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o"])
def test_text_is_cut_as_transformers_cuts_it(pre: str, byte_level: Backend, tmp_path: Path) -> None:
    """On its own reading of the same file. Its tokens are those of a model without `ignore_merges`, and uncomposed."""
    header = header_of(state(byte_level), pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=written(tmp_path / "x.gguf", header).name)
    backend = theirs.backend_tokenizer
    backend.model.ignore_merges = PRE[pre].ignores_merges
    assert_same(made(header), backend)


def test_qwen2_composes_characters(byte_level: Backend) -> None:
    ours = made(header_of(state(byte_level), "qwen2"))
    assert ours.encode("cafe\u0301") == ours.encode("café") != ours.encode("cafe")


def test_sentencepiece_merges_come_from_the_scores(sentencepiece: Backend) -> None:
    ours = made(header_of(state(sentencepiece), unknown_token_id=0))
    assert_same(ours, sentencepiece)
    worse = header_of(state(sentencepiece), unknown_token_id=0)
    worse["tokenizer.ggml.scores"] = [-score for score in worse["tokenizer.ggml.scores"]]
    assert any(made(worse).encode(text) != ours.encode(text) for text in TEXTS)


def test_sentencepiece_is_as_transformers_reads_it(sentencepiece: Backend, tmp_path: Path) -> None:
    """Of the architecture for which it puts the space before the text as SentencePiece does."""
    header = header_of(state(sentencepiece), unknown_token_id=0, bos_token_id=1, eos_token_id=2)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=written(tmp_path / "x.gguf", header, "phi3").name)
    assert_same(made(header), theirs.backend_tokenizer)


def test_gemma_takes_the_order_of_its_tokens_and_no_space_before(sentencepiece: Backend, tmp_path: Path) -> None:
    header = header_of(state(sentencepiece), unknown_token_id=0, add_space_prefix=False)
    theirs = Backend.from_str(sentencepiece.to_str())
    theirs.normalizer = normalizers.Replace(" ", "▁")
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ours = made(header | {"tokenizer.ggml.scores": [0.0] * len(header["tokenizer.ggml.tokens"])}, "gemma2")
    texts = [text for text in TEXTS if ours.encode(text) == theirs.encode(text).ids]
    assert len(texts) > 0.9 * len(TEXTS)  # the trainer's vocabulary is nearly in the order of its merges
    assert_same(ours, theirs, texts)


@pytest.mark.parametrize(
    ("pre", "more", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        (None, {}, True, False),
        (None, {"add_bos_token": False}, False, False),
    ],
)
def test_a_prompt_begins_and_ends_as_the_header_says(
    pre: str | None, more: dict[str, Any], begins: bool, ends: bool, byte_level: Backend, sentencepiece: Backend
) -> None:
    source = sentencepiece if pre is None else byte_level
    bos, eos = source.token_to_id("<s>"), source.token_to_id("</s>")
    ours = made(header_of(state(source), pre, bos_token_id=bos, eos_token_id=eos, unknown_token_id=0, **more))
    inner = ours.encode("Hello", add_special_tokens=False)
    assert ours.encode("Hello") == [*[bos] * begins, *inner, *[eos] * ends]
    assert (ours.bos_token_id, ours.eos_token_id) == (bos, eos)
    assert bos in ours.special_token_ids


def test_templates_and_special_tokens_serve_conversations(byte_level: Backend) -> None:
    header = header_of(state(byte_level), "gpt-2", eos_token_id=byte_level.token_to_id("<|im_end|>"))
    header["tokenizer.chat_template"] = "{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}"
    header["tokenizer.chat_template.short"] = "{{ messages[0].content }}"
    ours = made(header)
    start, end = (byte_level.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    hi = [{"role": "user", "content": "hi<|im_end|>"}]
    ids = ours.apply_chat_template(hi)
    assert ids[0] == start and ids[-1] == end and ids.count(end) == 1  # what a message spells is text
    assert ours.apply_chat_template(hi, tokenize=False, chat_template="short") == "hi<|im_end|>"


def test_empty_tokens_and_those_without_a_kind_are_kept() -> None:
    """A vocabulary without kinds has no special tokens; an empty entry gets a name, as llama.cpp gives it."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "", "ab"]
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": letters, "merges": ["a b"]}
    ours = made({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert ours.encode("abc") == [257, letters.index("c")] and ours.special_token_ids == frozenset()
    assert ours.token_text(256) == "[EMPTY_256]"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pre": "kimi-k2"}, UnsupportedModelError, r"x\.gguf: tokenizer\.ggml\.pre = kimi-k2 .*: known are llama-bpe"),
        ({"pre": None}, UnsupportedModelError, r"tokenizer\.ggml\.pre = None"),
        ({"model": "t5"}, UnsupportedModelError, r"tokenizer\.ggml\.model = t5 .*known are gpt2 and llama"),
        ({"add_space_prefix": True}, UnsupportedModelError, "add_space_prefix = True"),
        ({"remove_extra_whitespaces": True}, UnsupportedModelError, "remove_extra_whitespaces = True"),
        ({"suppress_tokens": [1]}, UnsupportedModelError, "suppress_tokens"),
        ({"tokens": None}, ModelFileError, "tokens must be a list of strings"),
        ({"tokens": ["a", "a"]}, ModelFileError, "tokens has 'a' twice"),
        ({"token_type": [1]}, ModelFileError, r"token_type must be a list of \d+ numbers"),
        ({"merges": ["ab"]}, ModelFileError, r"merges item 0 \('ab'\) is not two tokens"),
        ({"merges": ["a nothing"]}, ModelFileError, "merges cannot be read: .*nothing"),
        ({"eos_token_id": 10**6}, ModelFileError, r"eos_token_id must be one of .* tokens, got 1000000"),
        ({"add_bos_token": True}, ModelFileError, "add_bos_token is true, and there is no bos_token_id"),
        ({"add_bos_token": 1}, ModelFileError, "add_bos_token must be true or false, got 1"),
        ({"model": "llama", "scores": None}, ModelFileError, "scores must be a list"),
        ({"model": "llama", "scores": [0.0]}, ModelFileError, "scores must be a list of .* numbers"),
    ],
)
def test_what_is_wrong_or_not_held_is_named(
    change: dict[str, Any], error: type[Exception], match: str, byte_level: Backend
) -> None:
    header = header_of(state(byte_level), "gpt-2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(error, match=match):
        made(header)


def test_patterns_are_ones_that_the_library_takes() -> None:
    for pre in PRE.values():
        for pattern in pre.patterns:
            Regex(pattern)
