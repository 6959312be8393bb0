"""From bodies to checked calls: what needs two fields, or a count that no type states."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire.engine.inputs import MAX_SALT_BYTES
from quire.engine.tools import Asked
from quire.errors import InvalidRequestError, PromptTooLongError, context_length_message
from quire.sampling_params import FROM_MODEL, BeamSearchParams, RequestOutputKind, SamplingParams
from quire.server.doors.openai.beams import beams_of
from quire.server.doors.openai.bodies import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    TOKENIZE_CHAT,
    TOKENIZE_TEXT,
    CompletionBody,
    DetokenizeBody,
    ResponseOptions,
    TokenizeChatBody,
    TokenizeTextBody,
)
from quire.server.doors.openai.conversation import ARGUMENT_NAME, Conversation, Message, TextPart
from quire.server.doors.openai.shapes import deprecated_in, place_of_shape, take_shape
from quire.server.doors.openai.tools import asked_of, check_tools
from quire.server.http.limits import Limits
from quire.server.http.schema import check_length

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One parsed request."""

    params: SamplingParams
    options: ResponseOptions
    asked_max_tokens: int | None
    """What the client itself asked for: it must fit, where a default may be cut short."""
    wants_prompt_logprobs: bool
    num_prompts: int = 1
    logprobs_field: str = "logprobs"
    """What the client calls the count of them."""
    prompt_only: bool = False
    """`max_tokens: 0` with `echo`: the prompt is scored and nothing is shown of the token after it."""
    deprecated: tuple[str, ...] = ()
    """Fields that were sent under names of the past."""
    shape_place: str = ""
    """What the client calls `structured_outputs`, where it has another name."""

    @property
    def named_of_answer(self) -> int:
        """Tokens whose log-probabilities stand at each place of an answer."""
        count, others = self.params.logprobs, self.params.logprob_token_ids or ()
        return 0 if count is None else 1 + max(count, len(others))

    @property
    def named_of_prompt(self) -> int:
        """The same of a prompt."""
        return 0 if self.params.prompt_logprobs is None else 1 + self.params.prompt_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall(Call):
    """Every prompt is sampled from with the same parameters."""

    prompts: list[Prompt]
    suffix: str
    beams: BeamSearchParams | None
    """The search that takes the place of sampling."""
    num_shown: int
    """Sequences of each prompt that are given, the most probable of those that are sampled."""
    logprobs: int | None
    echo: bool
    add_special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall(Call):
    """An answer to a conversation."""

    conversation: Conversation
    top_logprobs: int | None
    """None: no logprobs; 0: the chosen tokens' only."""
    wants_prompt_text: bool
    asked: Asked
    """Tools and reasoning."""
    shows_reasoning: bool
    echoed: str
    """Stands before the answer: with `echo`, a last message of the assistant."""


def parse_completion(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> CompletionCall:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    body = COMPLETION.read(raw, limits)
    values, prompts = _with_what_fits(body.sampling), _prompts(body.prompt, limits)
    asked, logprobs = values.get("max_tokens"), values.get("logprobs")
    overrides: dict[str, Any] = {}
    prompt_only = body.echo and asked == 0 and type(asked) is int
    if prompt_only:
        overrides["max_tokens"] = 1
    beams = beams_of(body, values)
    num_shown = _take_best_of(values, body.options)
    if num_shown is not None and logprobs is None:
        overrides["logprobs"] = 0
    if body.echo and type(logprobs) is int:
        of_prompt = values.get("prompt_logprobs", 0)
        overrides["prompt_logprobs"] = max(logprobs, of_prompt) if type(of_prompt) is int else of_prompt
    params = _make_params(values, defaults, body.options, overrides)
    if len(prompts) * params.n > limits.sequences.value:
        raise limits.sequences.error(f"{len(prompts)} x {params.n}")
    _check_words(params, len(prompts), limits)
    return CompletionCall(
        params=params,
        options=body.options,
        asked_max_tokens=asked,
        wants_prompt_logprobs="prompt_logprobs" in values,
        prompts=prompts,
        suffix=_checked_suffix(body, prompts),
        beams=beams,
        num_shown=num_shown or params.n,
        num_prompts=len(prompts),
        logprobs=logprobs,
        echo=body.echo,
        add_special_tokens=body.add_special_tokens,
        prompt_only=prompt_only,
        deprecated=deprecated_in(values),
        shape_place=place_of_shape(values),
    )


def parse_chat(raw: Mapping[str, Any], defaults: SamplingParams, limits: Limits) -> ChatCall:
    """Check everything that can be checked without the model.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    body = CHAT.read(raw, limits)
    values, conversation = _with_what_fits(body.sampling), _checked(body.conversation, limits)
    count = values.pop("top_logprobs", None)
    if count is not None and not body.logprobs and (count != 0 or type(count) is not int):
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    top_logprobs = (0 if count is None else count) if body.logprobs else None
    overrides = {"logprobs": top_logprobs, "max_tokens": values.get("max_tokens")}
    try:
        params = _make_params(values, defaults, body.options, overrides)
    except InvalidRequestError as error:
        if error.param == "logprobs":  # here the count has another name
            raise InvalidRequestError("top_" + error.message, param="top_logprobs") from error
        raise
    if params.n > limits.sequences.value:
        raise limits.sequences.error(str(params.n))
    _check_words(params, 1, limits)
    return ChatCall(
        params=params,
        options=body.options,
        asked_max_tokens=params.max_tokens,
        wants_prompt_logprobs=params.prompt_logprobs is not None,
        conversation=conversation,
        top_logprobs=top_logprobs,
        logprobs_field="top_logprobs",
        deprecated=deprecated_in(values),
        shape_place=place_of_shape(values),
        wants_prompt_text=body.return_prompt_text,
        asked=asked_of(body),
        shows_reasoning=body.include_reasoning,
        echoed=text_of(conversation.messages[-1].content) if body.echo and conversation.ends_with_assistant else "",
    )


def parse_tokenize(raw: Mapping[str, Any], limits: Limits) -> TokenizeTextBody | TokenizeChatBody:
    """Check a body: with `messages` it is a conversation, else it has a `prompt`.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: a count past its limit.
    """
    if raw.get("messages") is None:
        return TOKENIZE_TEXT.read(raw, limits)
    body = TOKENIZE_CHAT.read(raw, limits)
    _checked(body.conversation, limits)
    return body


def parse_detokenize(raw: Mapping[str, Any], limits: Limits) -> DetokenizeBody:
    """Check a body, but for the ids in it.

    Raises:
        InvalidRequestError: naming the field.
        ApiError: too many tokens.
    """
    return DETOKENIZE.read(raw, limits)


def check_token_ids(body: DetokenizeBody, vocab_size: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        InvalidRequestError: not all are below `vocab_size`.
    """
    if not all(0 <= item < vocab_size for item in body.tokens):
        raise InvalidRequestError(f"tokens must hold token ids from 0 to {vocab_size - 1}", param="tokens")


def text_of(content: str | list[str | TextPart] | None) -> str:
    """A message's content; parts are joined by line ends as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part if isinstance(part, str) else part.text for part in content)


def truncate_prompt(token_ids: Sequence[int], call: Call, max_model_len: int) -> Sequence[int]:
    """The tokens to go on from: cut where the client said so, refused with the numbers otherwise.

    Without `max_tokens` the answer is as long as fits. One that was asked for fits whole or is refused, as by vLLM's
    server: it is never cut short in silence. (A prompt that is too long by itself is the engine's to refuse.)

    Raises:
        PromptTooLongError: prompt and `max_tokens` together exceed `max_model_len`.
    """
    asked, most, kept = call.asked_max_tokens, call.options.truncate_prompt_tokens, token_ids
    if most is not None:
        if most == -1:
            most = max(1, max_model_len - (asked or 1))
        kept = token_ids[:most] if call.options.truncation_side == "right" else token_ids[-most:]
    if asked is not None and len(kept) < max_model_len < len(kept) + asked:
        hint = f"max_tokens may be at most {max_model_len - len(kept)} after this prompt (max_model_len)."
        raise PromptTooLongError(context_length_message(max_model_len, len(kept), asked, hint), param="max_tokens")
    return kept


def bound_logprobs(call: Call, lengths: Sequence[int], max_model_len: int, limits: Limits) -> SamplingParams:
    """The parameters of a call whose prompts have these lengths. Where the client named no `max_tokens`, the answer
    ends where its log-probabilities reach their limit.

    Raises:
        ApiError: a prompt, or the answer that was asked for, has more of them.
    """
    params, limit = call.params, limits.logprobs
    sequences = params.n * len(lengths)
    prompts = params.n * sum(lengths) * call.named_of_prompt
    if call.named_of_answer and params.max_tokens is None:
        fitting = max(1, params.min_tokens, (limit.value - prompts) // (sequences * call.named_of_answer))
        params = replace(params, max_tokens=min(fitting, max_model_len))
    most = params.max_tokens or 0
    answers = params.n * sum(min(most, max_model_len - length) for length in lengths) * call.named_of_answer
    if prompts + answers > limit.value:
        is_prompts = prompts > limit.value and call.wants_prompt_logprobs
        raise limit.error(f"{prompts + answers:,}", "prompt_logprobs" if is_prompts else call.logprobs_field)
    return params


def _make_params(
    taken: Mapping[str, Any], defaults: SamplingParams, options: ResponseOptions, overrides: Mapping[str, Any]
) -> SamplingParams:
    """The one constructor's input from what a body held, and what the route decided itself over it."""
    _check_options(options)
    values = {name: getattr(defaults, name) for name in FROM_MODEL} | dict(taken)
    take_shape(values)
    best_of = values.pop("best_of", 1)
    if "logit_bias" in values:
        values["logit_bias"] = _int_keys(values["logit_bias"])
    if options.stream and values.get("prompt_logprobs") is not None:
        raise InvalidRequestError("prompt_logprobs needs stream: false", param="prompt_logprobs")
    kind = RequestOutputKind.DELTA if options.stream else RequestOutputKind.FINAL_ONLY
    params = SamplingParams.from_mapping({**values, **overrides, "output_kind": kind})
    if type(best_of) is not int or best_of not in (1, params.n):
        text = f"best_of must be n ({params.n}) or 1, got {best_of!r:.32}: choose among the n answers yourself"
        raise InvalidRequestError(text, param="best_of")
    return params


def _take_best_of(values: dict[str, Any], options: ResponseOptions) -> int | None:
    """Make `n` what is sampled where `best_of` asks for more of it; how many of them are given, else None.

    Raises:
        InvalidRequestError: in a stream, whose tokens come before it is known which sequence is best.
    """
    best_of, shown = values.get("best_of", 1), values.get("n", 1)
    if type(best_of) is not int or type(shown) is not int or not 1 <= shown < best_of:
        return None
    if options.stream:
        raise InvalidRequestError("best_of above n needs stream: false", param="best_of")
    values["n"] = best_of
    return shown


def _checked_suffix(body: CompletionBody, prompts: Sequence[Prompt]) -> str:
    if body.suffix and body.echo:
        raise InvalidRequestError(
            "suffix excludes echo: the prompt is not what stands before the answer", param="suffix"
        )
    if body.suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequestError("suffix needs prompts of text", param="suffix")
    return body.suffix


def _with_what_fits(values: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's way to say so is a `max_tokens` of -1."""
    asked = values.get("max_tokens")
    return {**values, "max_tokens": None} if asked == -1 and type(asked) is int else values


def _check_words(params: SamplingParams, num_prompts: int, limits: Limits) -> None:
    """Every sequence looks for its stop strings and its bad words."""
    stops, words = (sum(map(len, item or ())) for item in (params.stop, params.bad_words))
    if stops > limits.stop_characters.value:
        raise limits.stop_characters.error(f"{stops:,}")
    sequences = num_prompts * params.n
    if words * sequences > limits.bad_word_characters.value:
        raise limits.bad_word_characters.error(f"{words:,} x {sequences}")


def _check_options(options: ResponseOptions) -> None:
    if len(options.cache_salt.encode()) > MAX_SALT_BYTES:
        raise COMPLETION.refusal("cache_salt")
    if options.stream_options is not None:
        if not options.stream:
            raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
        if options.stream_options.include_obfuscation:
            text = "stream_options.include_obfuscation is not supported: nothing is obfuscated here"
            raise InvalidRequestError(text, param="stream_options")
    if options.truncation_side is not None and options.truncate_prompt_tokens is None:
        raise InvalidRequestError("truncation_side needs truncate_prompt_tokens", param="truncation_side")
    if options.truncate_prompt_tokens == 0:
        raise COMPLETION.refusal("truncate_prompt_tokens")


def _int_keys(bias: Any) -> Any:
    """JSON has only string keys; `SamplingParams` wants token ids."""
    if not isinstance(bias, dict):
        return bias
    converted: dict[int, Any] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError(
                "logit_bias must map token ids (whole numbers in quotes) to numbers", param="logit_bias"
            )
        if int(key) in converted:
            raise InvalidRequestError(f"logit_bias names token {int(key)} twice", param="logit_bias")
        converted[int(key)] = value
    return converted


def _prompts(value: str | list[Any], limits: Limits) -> list[Prompt]:
    """A string, a list of strings, token ids, or a list of token-id lists."""
    if isinstance(value, str):
        return [value]
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if int in kinds or not value or [] in value:
        raise COMPLETION.refusal("prompt")
    check_length(limits.prompts, value, "prompt")
    return value


def _checked(conversation: Conversation, limits: Limits) -> Conversation:
    for place, message in enumerate(conversation.messages):
        if isinstance(message.content, list):
            check_length(limits.content_parts, message.content, "messages")
        _check_calls(message, f"messages[{place}]")
        if message.reasoning is not None and message.reasoning_content not in (None, message.reasoning):
            named = f"messages[{place}].reasoning"
            raise InvalidRequestError(f"{named} and reasoning_content are one field and differ", param=named)
    check_tools(conversation, limits)
    for name, value in conversation.own_arguments.items():
        if conversation.chat_template_kwargs.get(name, value) != value:
            raise InvalidRequestError(f"{name} and chat_template_kwargs.{name} are one field and differ", param=name)
    for name in conversation.chat_template_kwargs:
        if not re.fullmatch(ARGUMENT_NAME, name):
            raise InvalidRequestError(f"chat_template_kwargs may not set {name[:64]!r}", param="chat_template_kwargs")
    if _depth_exceeds(conversation.chat_template_kwargs, limits.template_argument_depth.value):
        raise limits.template_argument_depth.error()
    if conversation.continue_final_message and not conversation.ends_with_assistant:
        raise InvalidRequestError(
            "continue_final_message needs a last message of the assistant", param="continue_final_message"
        )
    return conversation


def _check_calls(message: Message, place: str) -> None:
    """What a role may hold, and content where there are no calls."""
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(f"{place}.tool_calls belongs to the assistant", param=f"{place}.tool_calls")
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidRequestError(f"{place}.tool_call_id belongs to the role tool", param=f"{place}.tool_call_id")
    if message.content is None and not message.tool_calls:
        text = f"{place}.content is required and must be a string or a list of text parts"
        raise InvalidRequestError(text, param=f"{place}.content")


def _depth_exceeds(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_depth_exceeds(item, levels - 1) for item in inner)
