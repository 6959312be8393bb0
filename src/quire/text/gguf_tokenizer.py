"""A tokenizer from the header of a GGUF file: byte-level BPE (`gpt2`), or SentencePiece's BPE with scores (`llama`).

A header holds the vocabulary, the merges or scores, the kind of each token, and the name of the rule by which text is
cut before merges (`tokenizer.ggml.pre`). The rules are llama.cpp's, in the spelling that the models' own files have.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quire.errors import ModelFileError, UnsupportedModelError
from quire.text.tokenizer_files import TokenizerFiles, is_panic

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"


def _cased_words(digits: str, after: str = "") -> str:
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = f"{begin}{_UPPER}*{_LOWER}+{after}|{begin}{_UPPER}+{_LOWER}*{after}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"


_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """How text is cut, one pattern after the other, before merges."""

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    """A piece that is in the vocabulary is that token, whatever the merges say."""
    adds_bos: bool = False
    """Where the header does not say."""
    composes: bool = False
    """Text is put into Unicode's form C first, as the models' own tokenizers do."""


def _alike(pre: _Pre, names: str) -> dict[str, _Pre]:
    return dict.fromkeys(names.split(), pre)


PRE: Mapping[str, _Pre] = {
    **_alike(_Pre((_words(r"\p{N}{1,3}"),), True, True), "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2"),
    **_alike(_Pre((_words(r"\p{N}{1,3}"),)), "smaug-bpe dbrx"),
    **_alike(_Pre((_words(_DIGIT),), composes=True), "qwen2"),
    **_alike(_Pre((_words(_DIGIT),)), "deepseek-r1-qwen stablelm2 megrez"),
    **_alike(_Pre((_DIGIT, _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    **_alike(_Pre((_GPT2,)), "gpt-2 phi-2 olmo mpt granite-docling exaone4 trillion"),
    **_alike(_Pre((_cased_words(_DIGIT),), True, True), "tekken"),
    **_alike(_Pre((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),)), "gpt-4o llama4 kanana2"),
    **_alike(_Pre(_DEEPSEEK), "deepseek-v3"),
}
"""By `tokenizer.ggml.pre`."""

_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "add_sep_token": (None, False),
    "remove_extra_whitespaces": (None, False),
    "precompiled_charsmap": (None, []),
    "suppress_tokens": (None, []),
}
"""Keys that change the tokens and that Quire does not have, with the values that change nothing."""


def gguf_tokenizer(name: str, values: Mapping[str, Any], architecture: str) -> TokenizerFiles:
    """What a header says of its tokenizer.

    Args:
        name: of the file, for errors.
        values: the header's `tokenizer.*`, arrays as lists.
        architecture: `general.architecture`; Gemma's vocabulary is in the order of its merges, others' scores are.

    Raises:
        UnsupportedModelError: a kind of tokenizer or of cutting text that Quire does not have, named.
        ModelFileError: a value is missing, of a wrong type or out of range.
    """
    header = _Header(name, values)
    for key, neutral in _REFUSED.items():
        if header.get(key) not in neutral:
            raise header.unsupported(key, "Quire has no such feature")
    kind = header.get("model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(header)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(header, by_position=architecture.startswith("gemma")), True
    else:
        raise header.unsupported("model", "known are gpt2 and llama")
    named = {f"{ours}_token": header.token(theirs) for ours, theirs in _NAMED.items()}
    found = {key: token for key, token in named.items() if token is not None}
    special = [token for token, kind in zip(header.tokens, header.kinds, strict=True) if kind == _CONTROL]
    others = [token for token, kind in zip(header.tokens, header.kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special if token])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in others if token])
    _add_ends(backend, header, found, adds_bos=adds_bos)
    return TokenizerFiles(backend, found, header.templates())


_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Header:
    """The header's `tokenizer.*`, checked for their types."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self._name, self._values = name, values
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(self._texts("tokens"))]
        if len(set(self.tokens)) != len(self.tokens):
            twice = Counter(self.tokens).most_common(1)[0][0]
            raise self.error("tokens", f"has {twice[:40]!r} twice")
        self.kinds: Sequence[int] = self.numbers("token_type") or [1] * len(self.tokens)

    def get(self, key: str) -> Any:
        return self._values.get(f"tokenizer.ggml.{key}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {str(value)[:60]}")
        return default if value is None else value

    def numbers(self, key: str) -> list[Any] | None:
        """One for each token."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != len(self.tokens):
            raise self.error(key, f"must be a list of {len(self.tokens):,} numbers, one for each token")
        if not all(isinstance(item, int | float) and item == item for item in value):
            raise self.error(key, "must be a list of numbers")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be a list of strings")
        return value

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces."""
        found = []
        for number, merge in enumerate(self._texts("merges")):
            left, _, right = merge.partition(" ")
            if not left or not right:
                raise self.error("merges", f"item {number} ({merge[:40]!r}) is not two tokens")
            found.append((left, right))
        return found

    def model(self, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
        """The model of this vocabulary."""
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        try:
            return models.BPE(vocabulary, merges, **settings)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise self.error("merges", f"cannot be read: {str(error)[:200]}") from None

    def token(self, key: str) -> str | None:
        """The content of the token that is named so, where one is."""
        number = self.get(f"{key}_token_id")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise self.error(f"{key}_token_id", f"must be one of {len(self.tokens):,} tokens, got {str(number)[:60]}")
        return self.tokens[number]

    def templates(self) -> dict[str, str]:
        """Chat templates by name."""
        found = {}
        for key, value in self._values.items():
            if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
                if not isinstance(value, str):
                    raise ModelFileError(f"{self._name}: {key[:100]} must be a string")
                found[key.removeprefix("tokenizer.chat_template").lstrip(".") or "default"] = value
        return found

    def error(self, key: str, text: str) -> ModelFileError:
        return ModelFileError(f"{self._name}: tokenizer.ggml.{key} {text}")

    def unsupported(self, key: str, why: str) -> UnsupportedModelError:
        text = f"{self._name}: tokenizer.ggml.{key} = {str(self.get(key))[:60]} is not supported: {why}"
        return UnsupportedModelError(f"{text} (another tokenizer can be given: tokenizer, --tokenizer)")


def _byte_level(header: _Header) -> tuple[Tokenizer, bool]:
    pre = PRE.get(str(header.get("pre")))
    if pre is None:
        raise header.unsupported("pre", f"known are {', '.join(PRE)}")
    if header.flag("add_space_prefix", False):
        raise header.unsupported("add_space_prefix", "byte-level tokenizers have none")
    backend = Tokenizer(header.model(header.merges(), ignore_merges=pre.ignores_merges))
    if pre.composes:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre.adds_bos


def _sentencepiece(header: _Header, *, by_position: bool) -> Tokenizer:
    """Merges are not in the header: every way to make a token of two others is one, the best token's first."""
    if by_position:  # runs of spaces are stored as such, and looked up as text is after spaces have become marks
        header.tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in header.tokens]
    scores = header.numbers("scores")
    if scores is None and not by_position:
        raise header.error("scores", "must be a list of numbers")
    order = [-number for number in range(len(header.tokens))] if by_position or scores is None else scores
    model = header.model(_merges(header, order), unk_token=header.token("unknown"), fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    has_prefix = header.flag("add_space_prefix", True)
    marks = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), marks]) if has_prefix else marks
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(header: _Header, order: Sequence[float]) -> list[tuple[str, str]]:
    known = set(header.tokens)
    found = []
    for number, (token, kind) in enumerate(zip(header.tokens, header.kinds, strict=True)):
        if kind in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known:
                found.append((-order[number], -at, number))
    found.sort()
    tokens = header.tokens
    return [(tokens[number][:-at], tokens[number][-at:]) for _, at, number in found]


def _add_ends(backend: Tokenizer, header: _Header, named: Mapping[str, str], *, adds_bos: bool) -> None:
    """Begin (and end) a raw prompt with the tokens that the header asks for."""
    before: list[str] = []
    after: list[str] = []
    for key, default, place in (("bos", adds_bos, before), ("eos", False, after)):
        token = named.get(f"{key}_token")
        if header.flag(f"add_{key}_token", default) and token is not None:
            place.append(token)
        elif header.flag(f"add_{key}_token", False):
            raise header.error(f"add_{key}_token", f"is true, and there is no {key}_token_id")
    if before or after:
        tokens = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=tokens
        )
