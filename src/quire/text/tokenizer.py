"""The tokenizer of a model: text to tokens, conversations to tokens, tokens to text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError
from quire.text.chat.calls import CallForm, form_of, with_calls
from quire.text.chat.messages import ContinuationMarker, plain_data, read_messages
from quire.text.chat.special import SpecialText, turn_markers
from quire.text.detokenizer import IncrementalDetokenizer, TextOffsets, prompt_offsets
from quire.text.token_bytes import TokenBytes
from quire.text.tokenizer_files import TokenizerFiles, is_panic, read_tokenizer_files

if TYPE_CHECKING:
    from quire.text.chat.template import ChatTemplates

FAST_CHARACTERS = 2048
"""Longer texts are worth the hand-over to the library's own threads."""


class Tokenizer:
    """A model's tokenizer, read from its directory. Its methods may be called from several threads.

    Whether BOS or EOS is added to a prompt is decided by the post-processor in tokenizer.json, and not
    by `add_bos_token` in tokenizer_config.json: as in transformers 5.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._backend = files.backend
        self._added = files.backend.get_added_tokens_decoder()
        self._special_text = SpecialText(files.backend, turn_markers(self._added.values(), files.templates.values()))
        self._special_text_of = lru_cache(maxsize=8)(self._special_text_of_request)
        self._call_form_of = lru_cache(maxsize=8)(self._find_call_form)
        self.token_table = TokenBytes(files.backend)
        self.special_token_ids = frozenset(number for number, token in self._added.items() if token.special)
        self.special_tokens = {self._added[number].content: number for number in sorted(self.special_token_ids)}

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and the files beside it.

        Raises `ModelFileError`, which names the file, when one is missing, damaged or not supported.
        """
        return cls(read_tokenizer_files(Path(path)))

    @cached_property
    def _templates(self) -> "ChatTemplates":
        from quire.text.chat.template import ChatTemplates  # jinja2 is slow to import, and raw prompts do without

        return ChatTemplates()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        largest_added = max(self._added, default=-1)
        return max(int(self._backend.get_vocab_size(with_added_tokens=True)), largest_added + 1)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, where the tokenizer names one; the model's configuration may name more."""
        return self._named_token_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, where the tokenizer names one."""
        return self._named_token_id("bos_token")

    def token_id(self, content: str) -> int | None:
        """The token with this content; None where there is none."""
        return self._backend.token_to_id(content)

    def _named_token_id(self, name: str) -> int | None:
        content = self._files.named_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._files.templates)

    @property
    def tools_template(self) -> str | None:
        """The chat template that a conversation with tools is written by; None without one."""
        return self._files.templates.get("tool_use", self._files.templates.get("default"))

    @property
    def max_token_bytes(self) -> int | None:
        """A text of `b` bytes has at least `b / max_token_bytes` tokens; None where no bound holds.

        Use it to refuse a text for its size before tokenising it.
        """
        return self.token_table.longest

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a raw prompt.

        Special tokens spelled in the text become those tokens, as in vLLM's completions: the caller of a raw
        prompt writes the template itself. `add_special_tokens` lets the post-processor add BOS and the like.
        """
        with _refusing(text):
            if isinstance(text, str) and len(text) > FAST_CHARACTERS:  # without the offsets: half the time
                encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            return ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of a whole sequence; unknown ids add nothing. See `IncrementalDetokenizer`."""
        detokenizer = IncrementalDetokenizer(
            self,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )
        return detokenizer.push(token_ids) + detokenizer.flush()

    def text_offsets(self, start: int, **options: Any) -> TextOffsets:
        """Finds where in an answer's text each token begins; see there."""
        return TextOffsets(self, start, **options)

    def prompt_offsets(self, text: str, token_ids: Sequence[int]) -> list[int]:
        """Where in a prompt's text each of its tokens begins, in characters."""
        return prompt_offsets(self, text, token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; b"" for an unknown id."""
        return self.token_table.following(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, with U+FFFD where it holds parts of characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """A conversation as the model's chat template writes it, as tokens or as text.

        `chat_template` is the name of one of the model's templates, or a template. In tokens, special
        tokens spelled anywhere in messages, tools, documents or `template_kwargs` are ordinary text, and so
        are other added tokens that the template writes, save in the assistant's messages: no message can
        forge a turn; the text form cannot tell them apart. A caller that passes on
        `template_kwargs` from outside refuses those of `RESERVED_NAMES` first.
        `add_special_tokens` adds what the tokenizer adds to a raw prompt (most templates write it).

        Raises `InvalidRequestError` for messages that the template refuses, for documents that it does not
        read, and for templates that fail or exceed their bounds.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
            )
        source = self._choose_template(chat_template, has_tools=bool(tools))
        if documents and not self._templates.reads(source, "documents"):
            raise InvalidRequestError("the chat template reads no documents: say them in a message", param="documents")
        inputs = {
            "messages": self._read_messages(messages, source),
            "tools": plain_data(tools),
            "documents": plain_data(documents),
            **plain_data(template_kwargs),
        }
        escape = None
        special_text = self._special_text if source in self._files.templates.values() else self._special_text_of(source)
        with _refusing(""):
            occurs = tokenize and special_text.occurs_in(inputs)
        if occurs:
            escape = special_text.choose_escape(inputs.values(), source)
            inputs = special_text.escaped(inputs, escape)
        continuation = ContinuationMarker(inputs["messages"]) if continue_final_message else None
        variables = {**self._files.named_tokens, "add_generation_prompt": add_generation_prompt, **inputs}
        rendered = self._templates.render(source, variables)
        if continuation is not None:
            rendered = continuation.cut(rendered)
        if not tokenize:
            return rendered
        if escape is None:
            return self.encode(rendered, add_special_tokens=add_special_tokens)
        with _refusing(rendered):
            return special_text.encode(rendered, escape, add_special_tokens=add_special_tokens)

    def _read_messages(self, messages: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
        """Messages as a template takes them, calls of earlier turns too."""
        read = read_messages(messages, keeps_parts=self._templates.iterates_content(source))
        if not any("tool_calls" in message or "tool_call_id" in message for message in read):
            return read
        form = self._call_form_of(source)
        return read if form is None else with_calls(read, form)

    def shows_calls(self, chat_template: str | None = None) -> bool:
        """Whether the template writes an assistant's calls, and what they gave."""
        return self._call_form_of(self._choose_template(chat_template, has_tools=True)) is not None

    def _find_call_form(self, source: str) -> CallForm | None:
        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
            given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
            return self._templates.render(source, {**self._files.named_tokens, **given})

        return form_of(render)

    def _special_text_of_request(self, source: str) -> SpecialText:
        """For a template that is not the model's."""
        markers = self._special_text.markers | turn_markers(self._added.values(), [source])
        return self._special_text if markers == self._special_text.markers else SpecialText(self._backend, markers)

    def _choose_template(self, chat_template: str | None, *, has_tools: bool) -> str:
        templates = self._files.templates
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        if has_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        if templates:
            names = ", ".join(sorted(templates))
            raise InvalidRequestError(f"choose a chat template by name: {names}", param="chat_template")
        raise InvalidRequestError("this model has no chat template: send a prompt", param="messages")


@contextmanager
def _refusing(text: Any) -> Iterator[None]:
    """Make what the library raises over `text` a refusal of it: bare `Exception`, or a panic, which is none."""
    try:
        yield
    except InvalidRequestError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        raise _cannot_encode(text, error) from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise InvalidRequestError("the tokenizer fails on this text", param="prompt") from None


def _cannot_encode(text: Any, error: Exception) -> InvalidRequestError:
    if not isinstance(text, str):
        return InvalidRequestError(f"a prompt must be text, not {type(text).__name__}", param="prompt")
    try:
        text.encode()
    except UnicodeEncodeError:
        return InvalidRequestError("the text holds half of a surrogate pair", param="prompt")
    return InvalidRequestError(f"the tokenizer refuses this text: {str(error)[:200]}", param="prompt")
