"""Special tokens in what users write are text.

A rendered conversation is one string in which the template's `<|im_end|>` and a user's look alike. So
the user's are escaped before rendering, by a character that occurs nowhere in the conversation or the
template, put after their first character. What is still whole in the rendered text was written by
the template. The text is then encoded by a second tokenizer, equal to the first but for the *names*
of its special tokens: they are random there. The template's tokens are given their random names, the
escapes are taken out, and no text can spell a special token any more: neither through the search for
added tokens (however it normalises) nor through the vocabulary of the model itself (a Unigram model
holds `</s>` as a piece like any other).

Only tokens marked `special` are kept apart. Other added tokens (`<think>`, `<tool_call>`) are parsed
wherever they stand, because templates look for them in messages and assistants write them.
"""

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from quire.errors import InvalidRequestError
from quire.text.chat.messages import strings_in

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True, slots=True)
class SpecialTokenEscape:
    """How the special tokens of one conversation are escaped."""

    mark: str

    def spelled(self) -> tuple[str, str]:
        """The mark as it may appear in the rendered text: as it is, or escaped by `tojson`."""
        return self.mark, f"\\u{ord(self.mark):04x}"


class SpecialText:
    """Finds, escapes and unescapes special tokens in messages, for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._names = {token.content: number for number, token in added.items() if token.special}
        longest_first = sorted(filter(None, self._names), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
        # The look-ahead finds tokens that overlap.
        self._starts = re.compile(f"(?=(?:{alternatives}))", re.DOTALL)
        self._alternatives = alternatives
        is_normalized = any(token.special and token.normalized for token in added.values())
        self._normalizer = backend.normalizer if is_normalized else None
        self._lock = threading.Lock()
        self._renamed: dict[Any, _Renamed] = {}
        """By what made it."""

    def occurs_in(self, values: Iterable[Any]) -> bool:
        """Whether any string of this plain data holds a special token."""
        return any(self._occurs_in_text(text) for value in values for text in strings_in(value))

    def _occurs_in_text(self, text: str) -> bool:
        if self._starts.search(text):
            return True
        return self._normalizer is not None and bool(self._starts.search(self._normalizer.normalize_str(text)))

    def choose_escape(self, values: Iterable[Any], template: str) -> SpecialTokenEscape:
        """A mark that occurs in none of the strings, so that none can have written it."""
        texts = [template, *(text for value in values for text in strings_in(value))]
        for code in _PRIVATE_USE:
            escape = SpecialTokenEscape(chr(code))
            if not any(spelling in text for text in texts for spelling in escape.spelled()):
                return escape
        raise InvalidRequestError("the messages use every private character", param="messages")

    def escaped(self, value: Any, escape: SpecialTokenEscape) -> Any:
        """Plain data with a mark inside every special token of its strings, keys included."""
        if isinstance(value, str):
            return self._escaped_text(value, escape.mark)
        if isinstance(value, dict):
            return {self.escaped(key, escape): self.escaped(item, escape) for key, item in value.items()}
        if isinstance(value, list):
            return [self.escaped(item, escape) for item in value]
        return value

    def _escaped_text(self, text: str, mark: str) -> str:
        pieces, end = [], 0
        for match in self._starts.finditer(text):
            pieces += [text[end : match.start() + 1], mark]
            end = match.start() + 1
        return "".join([*pieces, text[end:]])

    def unescaped(self, rendered: str, escape: SpecialTokenEscape) -> str:
        """The rendered text without the marks."""
        for spelling in escape.spelled():
            rendered = rendered.replace(spelling, "")
        return rendered

    def encode(self, rendered: str, escape: SpecialTokenEscape, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text rendered from escaped messages. Raises what `tokenizers` raises."""
        # A token of one character cannot be split inside: there the mark stands behind it.
        whole = re.compile(f"(?:{self._alternatives})(?!{escape.mark})", re.DOTALL)
        for rename in (_beside, _apart):
            renamed = self._renamed_by(rename)
            text = whole.sub(lambda match, names=renamed.names: names[match[0]], rendered)  # type: ignore[misc]
            encoding = renamed.backend.encode(self.unescaped(text, escape), add_special_tokens=False)
            if not renamed.special_ids.isdisjoint(encoding.ids):
                continue  # the model itself spells a special token
            if add_special_tokens:  # the other has no post-processor
                encoding = self._backend.post_process(encoding, None, True)
            pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            return [number if is_added else renamed.ids.get(number, number) for number, is_added in pairs]
        raise AssertionError("a tokenizer without the names of special tokens made one")

    def _renamed_by(self, rename: "Callable[[tokenizers.Tokenizer, Mapping[str, int]], _Renamed]") -> "_Renamed":
        with self._lock:
            if rename not in self._renamed:
                self._renamed[rename] = rename(self._backend, self._names)
            return self._renamed[rename]


@dataclass(frozen=True, slots=True)
class _Renamed:
    backend: tokenizers.Tokenizer
    names: Mapping[str, str]
    ids: Mapping[int, int]
    """The tokenizer's own ids of added tokens, where the backend's are others."""
    special_ids: frozenset[int]
    """Ids that the backend may give to no text."""


def _random_names(special: Iterable[str]) -> dict[str, str]:
    return {name: f"<{secrets.token_hex(12)}>" for name in special}


def _beside(backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> _Renamed:
    """A tokenizer of the same parts, which are shared and not copied: only its added tokens are its own. So it is there
    in a moment, however large the vocabulary is. The model under it still holds special tokens as pieces."""
    names = _random_names(special)
    shared = tokenizers.Tokenizer(backend.model)
    shared.normalizer, shared.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    tokens = {
        number: tokenizers.AddedToken(
            names.get(token.content, token.content), single_word=token.single_word, lstrip=token.lstrip,
            rstrip=token.rstrip, normalized=token.normalized, special=token.special,
        )
        for number, token in added.items()
    }  # fmt: skip
    shared.add_tokens(list(tokens.values()))
    ids = {shared.token_to_id(token.content) or 0: number for number, token in tokens.items()}
    return _Renamed(shared, names, ids, frozenset(special.values()) - ids.keys())


def _apart(backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> _Renamed:
    """A copy of the tokenizer in which special tokens have random names, also in the model: seconds for a large
    vocabulary, in which nothing else runs. It is made for the first text in which the model would spell one."""
    names = _random_names(special)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        if token["special"]:
            token["content"] = names[token["content"]]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    state["post_processor"] = None
    renamed = tokenizers.Tokenizer.from_str(json.dumps(state))
    renamed.encode_special_tokens = False
    for name, number in special.items():
        if renamed.token_to_id(names[name]) != number:
            raise InvalidRequestError(
                f"this tokenizer cannot keep the special token {name!r} apart from text", param="messages"
            )
    return _Renamed(renamed, names, {}, frozenset())
