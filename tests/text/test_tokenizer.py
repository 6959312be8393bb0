"""Tokenizer against transformers on the same files, and its errors."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import quire.errors
from quire.errors import InvalidRequestError, ModelFileError
from quire.text.tokenizer import Tokenizer
from tests.text.small_tokenizers import CHATML, CORPUS, KINDS, byte_level, fallback_bpe, write_directory

TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "  two  spaces ",
    "line\n\n\tline\r\n",
    "<s>hello</s>",
    "<|im_start|>user\nhello<|im_end|>",
    "<think>hello</think>",
    "\x00\x7f\u200b\ufffd",
    "🫠" * 3,
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each kind of tokenizer as Quire and as transformers read it."""
    root = tmp_path_factory.mktemp("tokenizers")
    directories = {kind: write_directory(root / kind, build()) for kind, build in KINDS.items()}
    return {
        kind: (Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path)))
        for kind, path in directories.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_and_decode_are_those_of_transformers(pairs, kind, add_special_tokens):
    ours, theirs = pairs[kind]
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "no_decoder"])
@settings(max_examples=80, deadline=None)
@given(numbers=st.lists(st.integers(0, 2**20), max_size=30), skip=st.booleans())
def test_decode_of_random_tokens_is_that_of_transformers(pairs, kind, numbers, skip):
    ours, theirs = pairs[kind]
    ids = [number % len(theirs) for number in numbers]
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["fallback_bpe", "fallback_unigram"])
@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=40), skip=st.booleans())
def test_decode_of_encoded_text_is_that_of_transformers(pairs, kind, text, skip):
    ours, theirs = pairs[kind]
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_invalid_byte_tokens_cost_one_replacement_each_part(pairs):
    ours, _ = pairs["fallback_bpe"]
    ids = [ours.token_table._backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xE4, 0xBD, 0xA0, 0xFF, 0xE4)]
    assert ours.decode(ids) == "你\ufffd\ufffd"


def test_facts(pairs):
    ours, theirs = pairs["byte_level"]
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_token_ids == set(range(12))
    assert not ours.has_chat_template


def test_token_bytes_and_text(pairs):
    ours, _ = pairs["byte_level"]
    ids = ours.encode("né 你好", add_special_tokens=False)
    assert b"".join(ours.token_bytes(number) for number in ids) == "né 你好".encode()
    halves = [ours.token_text(number) for number in ids]
    assert all(len(half) >= 1 for half in halves)
    ours, _ = pairs["fallback_bpe"]
    vocabulary = ours.token_table._backend.get_vocab()
    assert ours.token_bytes(vocabulary["<0x0A>"]) == b"\n"
    assert ours.token_text(vocabulary["<0xE4>"]) == "\ufffd"
    assert ours.token_text(vocabulary["▁system"]) == " system"
    for unknown in (ours.vocab_size, 2**40, -1):
        assert ours.token_bytes(unknown) == b""
        assert ours.token_text(unknown) == ""


@pytest.mark.parametrize("kind", ["byte_level", "fallback_bpe"])
@settings(max_examples=100, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.sampled_from(CORPUS).map(lambda line: line * 5)
    | st.text("<think>分頁 ", max_size=60)
)
def test_max_token_bytes_bounds_the_number_of_tokens(pairs, kind, text):
    ours, _ = pairs[kind]
    assert ours.max_token_bytes is not None
    assert len(ours.encode(text)) * ours.max_token_bytes >= len(text.encode())


def test_no_bound_where_an_unknown_token_swallows_text(pairs):
    assert pairs["no_decoder"][0].max_token_bytes is None


def test_no_bound_where_an_added_token_takes_spaces(tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    ours = Tokenizer.from_directory(write_directory(tmp_path, backend))
    assert len(ours.encode(" " * 10_000 + "<mask>")) == 1
    assert ours.max_token_bytes is None


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_bos_is_added_as_transformers_adds_it(tmp_path, add_bos, has_post_processor):
    backend = fallback_bpe()
    if not has_post_processor:
        backend.post_processor = processors.Sequence([])
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": True}
    path = write_directory(tmp_path, backend, files={"tokenizer_config.json": config})
    ours, theirs = Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    assert ours.encode("hello") == theirs.encode("hello")


@pytest.mark.parametrize("form", ["decoder", "map"])
def test_tokens_named_outside_tokenizer_json(tmp_path, form):
    config = {"bos_token": "<s>", "eos_token": "<|stop|>", "image_token": "<image>", "tokenizer_class": "X"}
    files = {"tokenizer_config.json": config}
    if form == "decoder":
        config["added_tokens_decoder"] = {
            str(number): {"content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for number, name in ((502, "<|stop|>"), (503, "<image>"))
        }
        config["additional_special_tokens"] = ["<|extra|>"]
    else:
        files["special_tokens_map.json"] = {
            "pad_token": {"content": "<pad>", "lstrip": False, "rstrip": False, "normalized": False},
            "additional_special_tokens": ["<|extra|>"],
        }
    path = write_directory(tmp_path, byte_level(), files=files)
    ours, theirs = Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    text = "a<|stop|>b<image>c<|extra|>d<pad>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_tokens_named_by_their_ids_are_added_in_that_order(tmp_path):
    """As numbers, not as texts; flags are kept, so that one takes the spaces before it."""
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    config = {
        "tokenizer_class": "X",
        "added_tokens_decoder": {
            "1000": {"content": "<b>", **flags},
            "999": {"content": "<a>", **flags, "lstrip": True},
            "1001": {"content": "<c>", **flags, "rstrip": True, "special": False},
        },
    }
    path = write_directory(tmp_path, byte_level(), files={"tokenizer_config.json": config})
    ours, theirs = Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    for text in ("<a><b><c>", "x  <a>  y <b> z  <c>  w"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.special_token_ids >= set(ours.encode("<a><b>")) and ours.encode("<c>")[0] not in ours.special_token_ids


FLAGS = st.fixed_dictionaries({name: st.booleans() for name in ("special", "lstrip", "rstrip", "normalized")})
NAMES = ("<a>", "<b>", "<c>", "<think>", "<|im_end|>")


@settings(max_examples=40, deadline=None)
@given(
    in_json=st.dictionaries(st.sampled_from(NAMES[:3]), FLAGS),
    in_config=st.none() | st.dictionaries(st.sampled_from(NAMES), FLAGS),
    named=st.lists(st.sampled_from(NAMES), max_size=2),
)
def test_flags_in_the_configuration_win_as_in_transformers(tmp_path_factory, in_json, in_config, named):
    """Command-R+ marks its end of turn as special there only. Named tokens are special."""
    path = tmp_path_factory.mktemp("flags")
    backend = byte_level()
    backend.add_tokens([AddedToken(name, **flags) for name, flags in in_json.items()])
    config = {"tokenizer_class": "X", **dict(zip(("eos_token", "image_token"), named, strict=False))}
    if in_config is not None:
        places = {name: backend.token_to_id(name) or 900 + place for place, name in enumerate(NAMES)}
        config["added_tokens_decoder"] = {
            str(places[name]): {"content": name, "single_word": False, **flags} for name, flags in in_config.items()
        }
    write_directory(path, backend, files={"tokenizer_config.json": config})
    ours, theirs = Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    text = "x  <a>  y <b> z  <c>  <think> w <|im_end|> v"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    hidden = {one for one in ids if not theirs.decode([one], skip_special_tokens=True)}
    assert hidden == ours.special_token_ids.intersection(ids)


def test_thousands_of_tokens_are_added_at_once(tmp_path):
    """One at a time took 40 s for 5,000 of them."""
    flags = {"special": True, "normalized": False}
    tokens = {str(1000 + place): {"content": f"<|{place}|>", **flags} for place in range(50_000)}
    path = write_directory(tmp_path, byte_level(), files={"tokenizer_config.json": {"added_tokens_decoder": tokens}})
    assert Tokenizer.from_directory(path).encode("<|0|><|49999|>") == [502, 502 + 49_999]


def test_special_tokens_may_be_text_in_raw_prompts(tmp_path):
    config = {"bos_token": "<s>", "tokenizer_class": "X", "split_special_tokens": True}
    path = write_directory(tmp_path, byte_level(), files={"tokenizer_config.json": config})
    ours, theirs = Tokenizer.from_directory(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    assert ours.encode("a<s>b") == theirs.encode("a<s>b", split_special_tokens=True)
    assert not ours.special_token_ids.intersection(ours.encode("a<s>b"))


def test_files_of_any_size_are_not_read(tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = write_directory(tmp_path / name, byte_level())
        with (path / name).open("wb") as file:
            file.truncate((32 << 20) + 1)
        with pytest.raises(ModelFileError, match=f"{name} is larger than 32 MB"):
            Tokenizer.from_directory(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", "[]", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{,", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json does not hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 7}', "tokenizer_config.json: chat_template"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("special_tokens_map.json", b"\xff\xfe", "special_tokens_map.json is not UTF-8"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid", "tokenizer.json is a Git LFS pointer"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    path = write_directory(tmp_path, byte_level())
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_directory(path)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {"type": "Strip", "content": " ", "start": 0, "stop": 1},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}],
        },
    ],
)
def test_decoders_that_are_not_local_are_refused(tmp_path, decoder):
    path = write_directory(tmp_path, byte_level())
    state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps(state | {"decoder": decoder}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="decoder"):
        Tokenizer.from_directory(path)


def test_text_that_cannot_be_encoded_is_the_callers_fault(pairs):
    ours, _ = pairs["byte_level"]
    with pytest.raises(InvalidRequestError, match="surrogate"):
        ours.encode("a\ud800b")
    with pytest.raises(InvalidRequestError, match="must be text"):
        ours.encode(7)


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    ours = Tokenizer.from_directory(write_directory(tmp_path, backend))
    assert ours.encode(CORPUS[0]) == byte_level().encode(CORPUS[0]).ids
    assert ours.encode("a") == byte_level().encode("a").ids


def test_threads_share_one_tokenizer(tmp_path):
    """Half of the threads encode conversations with special tokens in them, half raw prompts."""
    ours = Tokenizer.from_directory(write_directory(tmp_path, byte_level(), chat_template=CHATML))
    text = "a <|im_end|> b"
    chat = [{"role": "user", "content": text}]
    expected = (ours.apply_chat_template(chat), ours.encode(text))
    assert expected[1].count(4) == 1
    wrong = []

    def work(place):
        for _ in range(50):
            result = ours.apply_chat_template(chat) if place % 2 else ours.encode(text)
            if result != expected[0 if place % 2 else 1]:
                wrong.append(result)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_raw_prompts_do_without_the_template_engine():
    code = "import sys, quire.text.tokenizer; sys.exit('jinja2' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(quire.errors.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_the_bound_is_the_longest_token(pairs):
    found = {kind: ours.max_token_bytes for kind, (ours, _) in pairs.items() if ours.max_token_bytes is not None}
    assert "byte_level" in found
    for kind, bound in found.items():
        ours = pairs[kind][0]
        longest = max(len(ours.token_bytes(number)) for number in range(ours.vocab_size))
        assert bound in (longest, 3 * longest)  # a normaliser may shrink a text


@pytest.fixture
def panicking(tmp_path):
    """A file that loads, and over which the library panics at the first text."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    return Tokenizer.from_directory(write_directory(tmp_path / "panics", backend, chat_template=CHATML))


@pytest.mark.parametrize("length", [1, 5000])
def test_a_panic_of_the_library_is_a_refusal_of_the_text(panicking, length):
    """It is no `Exception`: what handles those would let it pass."""
    for prompt in ("x" * length, "<|im_end|>" * length):
        messages = [{"role": "user", "content": prompt}]
        with pytest.raises(InvalidRequestError, match="fails on this text"):
            panicking.encode("y" + prompt)
        with pytest.raises(InvalidRequestError, match="fails on this text"):
            panicking.apply_chat_template(messages)


def test_a_panic_while_a_file_is_read_names_the_file(tmp_path):
    directory = write_directory(tmp_path, byte_level())
    state = json.loads((directory / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (directory / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(directory)


def test_an_interrupt_is_no_panic(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, byte_level()))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_backend", type("Backend", (), {"encode": interrupt}))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


def test_long_texts_have_the_same_tokens(pairs):
    """They go another way through the library."""
    for kind, (ours, theirs) in pairs.items():
        text = "".join(TEXTS) * 40
        assert len(text) > 4096
        assert ours.encode(text) == theirs(text)["input_ids"], kind
