"""Special tokens and turn markers in what users write are text.

A rendered conversation is one string in which the template's `<|im_end|>` and a user's look alike. So
the user's are escaped before rendering, by a character that occurs nowhere in the conversation or the
template, put after their first character. What is still whole in the rendered text was written by
the template. The text is then encoded by a second tokenizer, equal to the first but for the *names*
of its special tokens: they are random there. The template's tokens are given their random names, the
escapes are taken out, and no text can spell a special token any more: neither through the search for
added tokens (however it normalises) nor through the vocabulary of the model itself (a Unigram model
holds `</s>` as a piece like any other).

Some models mark turns with added tokens that are not `special` (DeepSeek's `<｜User｜>`). Those that a
template writes are kept apart like special ones, but for the assistant's messages: assistants write
`<think>` and `<tool_call>` themselves, and templates look for them there.
"""

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from quire.errors import InvalidRequestError
from quire.text.chat.messages import strings_in

_PRIVATE_USE = range(0xE000, 0xF900)
_ROLES = ("system", "user", "assistant", "tool")
_NAME_AMONG_SIGNS = re.compile(r"(?=.*[^\W_])(?=.*[^\w\s])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SpecialTokenEscape:
    """How the special tokens of one conversation are escaped."""

    mark: str

    def spelled(self) -> tuple[str, str]:
        """The mark as it may appear in the rendered text: as it is, or escaped by `tojson`."""
        return self.mark, f"\\u{ord(self.mark):04x}"


def turn_markers(tokens: Iterable[tokenizers.AddedToken], templates: Iterable[str]) -> frozenset[str]:
    """Added tokens that are not special and that a template writes, or may put together from the name of a role.

    Plain words and white space, which some tokenizers add too, mark nothing.
    """
    written = "\n".join(templates)
    return frozenset(
        name
        for name in (token.content for token in tokens if not token.special)
        if _NAME_AMONG_SIGNS.match(name) and (name in written or any(role in name for role in _ROLES))
    )


def _starts_of(names: Iterable[str]) -> tuple[str, re.Pattern[str]]:
    """The alternatives of a pattern for whole names, and a pattern for where one starts."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
    # The look-ahead finds tokens that overlap.
    return alternatives, re.compile(f"(?=(?:{alternatives}))", re.DOTALL)


class SpecialText:
    """Finds, escapes and unescapes special tokens and turn markers in messages, for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, markers: frozenset[str] = frozenset()) -> None:
        self.markers = markers
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        apart = {number: token for number, token in added.items() if token.special or token.content in markers}
        self._names = {token.content: number for number, token in apart.items()}
        self._alternatives, self._starts = _starts_of(self._names)
        self._assistant_starts = _starts_of(name for name in self._names if name not in markers)[1]
        is_normalized = any(token.normalized for token in apart.values())
        self._normalizer = backend.normalizer if is_normalized else None
        self._lock = threading.Lock()
        self._renamed: dict[Any, _Renamed] = {}
        """By what made it."""

    def occurs_in(self, inputs: Mapping[str, Any]) -> bool:
        """Whether any string that the template is given holds what is kept apart."""
        return any(
            self._occurs_in_text(text, starts)
            for name, value in inputs.items()
            for part, starts in self._parts(name, value)
            for text in strings_in(part)
        )

    def _parts(self, name: str, value: Any) -> Iterator[tuple[Any, re.Pattern[str]]]:
        """A value, or messages one by one, with what is kept apart in each."""
        if name != "messages":
            yield value, self._starts
            return
        for message in value:
            yield message, self._assistant_starts if message.get("role") == "assistant" else self._starts

    def _occurs_in_text(self, text: str, starts: re.Pattern[str]) -> bool:
        if starts.search(text):
            return True
        return self._normalizer is not None and bool(starts.search(self._normalizer.normalize_str(text)))

    def choose_escape(self, values: Iterable[Any], template: str) -> SpecialTokenEscape:
        """A mark that occurs in none of the strings, so that none can have written it."""
        texts = [template, *(text for value in values for text in strings_in(value))]
        for code in _PRIVATE_USE:
            escape = SpecialTokenEscape(chr(code))
            if not any(spelling in text for text in texts for spelling in escape.spelled()):
                return escape
        raise InvalidRequestError("the messages use every private character", param="messages")

    def escaped(self, inputs: Mapping[str, Any], escape: SpecialTokenEscape) -> dict[str, Any]:
        """What the template is given, with a mark inside everything that is kept apart, in keys too."""
        escaped = {}
        for name, value in inputs.items():
            parts = [self._escaped(part, escape.mark, starts) for part, starts in self._parts(name, value)]
            escaped[name] = parts if name == "messages" else parts[0]
        return escaped

    def _escaped(self, value: Any, mark: str, starts: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self._escaped_text(value, mark, starts)
        if isinstance(value, dict):
            return {self._escaped(key, mark, starts): self._escaped(item, mark, starts) for key, item in value.items()}
        if isinstance(value, list):
            return [self._escaped(item, mark, starts) for item in value]
        return value

    def _escaped_text(self, text: str, mark: str, starts: re.Pattern[str] | None = None) -> str:
        """With a mark inside what starts there; by itself, inside all that is kept apart from any role."""
        pieces, end = [], 0
        for match in (starts or self._starts).finditer(text):
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
            text = whole.sub(lambda match, names=renamed.names: names[match[0]], rendered)  # type: ignore[misc]  # of a lambda's default
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
        token["content"] = names.get(token["content"], token["content"])
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
