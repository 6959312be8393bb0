"""What each token means in bytes.

A `tokenizers` decoder is a program over the whole token sequence. The decoders of language models
are *local*: a token adds the same bytes wherever it stands, but for the first one, and some strip a
leading space from the whole text. `TokenBytes` reads the decoder once and states those bytes, which
makes decoding, incremental decoding and the bytes of a logprob three views of one definition. A
decoder that is not local, or not of language models (CTC, WordPiece), is refused when the model is loaded.

Bytes that are not valid UTF-8 become one U+FFFD for each maximal invalid part. For byte-level
vocabularies this is what `tokenizers` does; for byte-fallback vocabularies `tokenizers` writes one
U+FFFD for *every* byte of a run that is invalid anywhere, so a run could never be streamed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

from quire.errors import ModelFileError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_NFC_SHRINK = 3  # canonical composition shortens UTF-8 by at most this factor (U+212A: 3 bytes to 1)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 is itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


@dataclass(slots=True)
class _Rules:
    """A local decoder as data; `_read_decoder` fills it in."""

    joiner: str = ""  # written before every token but the first
    replacements: list[tuple[str, str]] = field(default_factory=list)
    metaspace: str = ""  # this character is a space, and nothing in the first token when `trims_first`
    trims_first: bool = False
    byte_level: bool = False
    byte_fallback: bool = False
    strip: str = ""  # a character of which the text loses up to `strip_count` at its start
    strip_count: int = 0
    fused: bool = False


class TokenBytes:
    """The bytes of every token of one tokenizer, computed on demand and kept.

    Raises `ModelFileError` when the decoder is not local.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._rules = _read_decoder(_state(backend.decoder))
        self._alphabet = byte_level_alphabet() if self._rules.byte_level else {}
        self._added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        self._kept: dict[int, bytes] = {}
        self.strip = self._rules.strip.encode()
        self.strip_count = self._rules.strip_count

    def content(self, token_id: int) -> str | None:
        """The vocabulary entry, or None where no token has this id."""
        if token_id in self._added:
            return self._added[token_id]
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def is_added(self, token_id: int) -> bool:
        """Whether this is an added token (special or not) rather than one of the model's own."""
        return token_id in self._added

    def following(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text that some token has begun; b"" for an unknown id."""
        known = self._kept.get(token_id)
        if known is None:
            known = self._kept[token_id] = self._bytes(token_id, is_first=False)
        return known

    def beginning(self, token_id: int) -> bytes:
        """The bytes of the token when it is the first of a text, before the strip."""
        return self._bytes(token_id, is_first=True)

    def _bytes(self, token_id: int, *, is_first: bool) -> bytes:
        content = self.content(token_id)
        if content is None:
            return b""
        rules = self._rules
        if rules.byte_level:
            mapped = [self._alphabet.get(character) for character in content]
            whole = bytes(byte for byte in mapped if byte is not None)
            return whole if len(whole) == len(mapped) else content.encode()
        for pattern, replacement in rules.replacements:
            content = content.replace(pattern, replacement)
        if rules.byte_fallback and (match := _BYTE_TOKEN.match(content)):
            return bytes([int(match[1], 16)])
        if rules.metaspace:
            space = "" if is_first and rules.trims_first else " "
            content = content.replace(rules.metaspace, space)
        return (content if is_first else rules.joiner + content).encode()

    @cached_property
    def longest(self) -> int | None:
        """No text of `b` bytes encodes to fewer than `b / longest` tokens; None where no bound holds.

        It is the length of the longest token, times what the normaliser may shrink a text by. There is
        no bound when something may swallow text without a token: an unknown token, added tokens that
        take the spaces around them, a pre-tokeniser or normaliser that removes.
        """
        shrink = _shrink_of_normaliser(_state(self._backend.normalizer))
        if shrink is None or not _keeps_all_text(_state(self._backend.pre_tokenizer)):
            return None
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if self._rules.byte_level:
            covered = all(character in vocabulary for character in self._alphabet)
        else:
            covered = getattr(self._backend.model, "byte_fallback", False) and all(
                f"<0x{byte:02X}>" in vocabulary for byte in range(256)
            )
        added = self._backend.get_added_tokens_decoder().values()
        if not covered or any(token.lstrip or token.rstrip for token in added):
            return None
        # A token's own text may be longer than the bytes it decodes to: the metaspace stands for a space.
        if not self._rules.byte_level:
            return shrink * max(len(self.following(number)) for number in vocabulary.values())
        # What `following` says, without keeping the bytes of all of them.
        alphabet = self._alphabet.keys()
        return shrink * max(len(text if alphabet >= set(text) else text.encode()) for text in vocabulary)


def _state(part: Any) -> Mapping[str, Any] | None:
    """A pipeline part of `tokenizers` as the JSON it was read from."""
    return None if part is None else json.loads(part.__getstate__())


def _read_decoder(decoder: Mapping[str, Any] | None) -> _Rules:
    rules = _Rules()
    if decoder is None:
        rules.joiner = " "
        return rules
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        if not _read_step(rules, step):
            kind = step.get("type", "?")
            raise ModelFileError(f"tokenizer.json: a decoder with this use of {kind!r} is not supported")
    return rules


def _read_step(rules: _Rules, step: Mapping[str, Any]) -> bool:
    """Take one decoder step into `rules`; False where it would not be local."""
    match step["type"]:
        case "ByteLevel":
            # Its input must be the vocabulary entries themselves.
            rules.byte_level = not (rules.replacements or rules.byte_fallback or rules.metaspace)
            return rules.byte_level
        case "Fuse":
            rules.fused = True
            return True
        case "ByteFallback":
            rules.byte_fallback = True
            return not (rules.fused or rules.byte_level)
        case "Replace":
            pattern = step["pattern"].get("String", "")
            rules.replacements.append((pattern, step["content"]))
            # Once fused, only a single character is certain not to span two tokens.
            return bool(pattern) and not rules.byte_level and (not rules.fused or len(pattern) == 1)
        case "Metaspace":
            rules.metaspace = step["replacement"]
            rules.trims_first = step.get("prepend_scheme", "always") != "never"
            return not (rules.fused or rules.byte_level)
        case "Strip":
            rules.strip, rules.strip_count = step["content"], step["start"]
            return step["stop"] == 0 and (rules.fused or step["start"] == 0)
    return False


def _shrink_of_normaliser(normaliser: Mapping[str, Any] | None) -> int | None:
    """By what factor the normaliser may shorten a text, in bytes; None where there is no bound."""
    if normaliser is None:
        return 1
    match normaliser["type"]:
        case "Sequence":
            factor = 1
            for step in normaliser["normalizers"]:
                inner = _shrink_of_normaliser(step)
                if inner is None:
                    return None
                factor *= inner
            return factor
        case "NFC":
            return _NFC_SHRINK
        case "Prepend":
            return 1
        case "Replace":
            pattern = normaliser["pattern"].get("String")
            grows = pattern is not None and len(normaliser["content"].encode()) >= len(pattern.encode())
            return 1 if grows else None
    return None


def _keeps_all_text(pre_tokeniser: Mapping[str, Any] | None) -> bool:
    if pre_tokeniser is None:
        return True
    match pre_tokeniser["type"]:
        case "Sequence":
            return all(_keeps_all_text(step) for step in pre_tokeniser["pretokenizers"])
        case "Split" | "Punctuation":
            return bool(pre_tokeniser["behavior"] != "Removed")
        case "ByteLevel" | "Metaspace" | "Digits" | "UnicodeScripts":
            return True
    return False
