"""Which fields a request body may hold: honoured, an alias, neutral, or refused by name.

A field that Quire does not honour is let through only with a value that asks for nothing (OpenAI's own default),
because clients send those. `user`, `safety_identifier` and `session_id` are labels for an operator's records, or for
whoever routes requests to several servers: they change no answer by definition, and are checked for size and not kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from quire.errors import InvalidRequestError, unknown_name_message
from quire.sampling_params import SamplingParams
from quire.server.limits import Limits

SAMPLING = frozenset(item.name for item in fields(SamplingParams)) - {"detokenize", "output_kind", "logprobs"}
"""Fields that go to `SamplingParams` under their own name."""
COMMON = frozenset(
    "model stream stream_options stream_interval priority cache_salt timeout logprobs echo truncate_prompt_tokens "
    "truncation_side return_token_ids return_tokens_as_token_ids request_id".split()
)
LABELS = frozenset({"user", "safety_identifier", "session_id"})
ALIASES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "sampling_seed": "seed",
    "random_seed": "seed",
}

_TOOLS = "tool calling is not supported in this version"
_STRUCTURED = "structured output is not supported in this version"
_TEXT_ONLY = "this server reads and writes text only"
_NOT_STORED = "nothing is stored by this server"
_PLAIN = "it is not supported in this version"

_STRUCTURED_ALIASES = (
    "guided_json guided_regex guided_choice guided_grammar json_schema regex ebnf grammar format structural_tag"
).split()
"""Other engines' names, and vLLM's older ones, of `structured_outputs`."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A known field that is not honoured: why, and the values that ask for nothing (null always does)."""

    reason: str
    neutral: tuple[Any, ...] = ()


REFUSED_EVERYWHERE = {
    "best_of": Refused("choose among the n answers yourself", (1,)),
    "response_format": Refused(_STRUCTURED, ({"type": "text"},)),
    "structured_outputs": Refused(_STRUCTURED),
    **dict.fromkeys(_STRUCTURED_ALIASES, Refused(_STRUCTURED)),
    "store": Refused(_NOT_STORED, (False,)),
    "metadata": Refused(_NOT_STORED, ({},)),
    "service_tier": Refused("there is one tier", ("auto", "default")),
    "prompt_cache_key": Refused("prefixes are cached by their content; see cache_salt"),
    "prompt_cache_retention": Refused("prefixes are kept while there is room"),
    "use_beam_search": Refused("beam search is not supported in this version", (False,)),
    "length_penalty": Refused("it belongs to beam search, which is not supported in this version", (1.0,)),
    "return_token_offsets": Refused("they belong to vLLM's route that renders prompts; see /tokenize", (False,)),
    "return_weight_versions": Refused("the weights of a server do not change", (False,)),
    "kv_transfer_params": Refused("caches are not moved between servers in this version"),
    "vllm_xargs": Refused("they are for plug-ins of vLLM"),
    "watermarking": Refused(_PLAIN),
}
REFUSED_COMPLETIONS = {
    "suffix": Refused("filling in the middle is not supported in this version", ("",)),
    "prompt_embeds": Refused(_PLAIN),
    "return_prompt_text": Refused("echo gives the prompt", (False,)),
}
REFUSED_CHAT = {
    "tools": Refused(_TOOLS, ([],)),
    "tool_choice": Refused(_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Refused(_TOOLS, (True, False)),
    "functions": Refused(_TOOLS, ([],)),
    "function_call": Refused(_TOOLS, ("none", "auto")),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "audio": Refused(_TEXT_ONLY),
    "prediction": Refused(_PLAIN),
    "web_search_options": Refused("this server looks nothing up"),
    "verbosity": Refused(_PLAIN, ("medium",)),
    "reasoning_effort": Refused("reasoning is not told apart in this version", ("none",)),
    "thinking_token_budget": Refused("reasoning is not told apart in this version"),
    "include_reasoning": Refused("reasoning is not told apart in this version", (True,)),
    "media_io_kwargs": Refused(_TEXT_ONLY, ({},)),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, ({},)),
}


@dataclass(frozen=True, slots=True)
class RequestSchema:
    """The fields of one route."""

    honoured: frozenset[str]
    refused: Mapping[str, Refused] = field(default_factory=dict)
    labels: frozenset[str] = LABELS
    aliases: Mapping[str, str] = field(default_factory=dict)

    def known(self) -> list[str]:
        """Every name that is understood, honoured or not."""
        return sorted(self.honoured | self.labels | set(self.aliases) | set(self.refused))


_TEMPLATE_FIELDS = frozenset(
    "messages add_generation_prompt continue_final_message chat_template chat_template_kwargs documents "
    "add_special_tokens".split()
)
COMPLETIONS = RequestSchema(
    SAMPLING | COMMON | {"prompt", "add_special_tokens"}, REFUSED_EVERYWHERE | REFUSED_COMPLETIONS, aliases=ALIASES
)
CHAT = RequestSchema(
    SAMPLING | COMMON | _TEMPLATE_FIELDS | {"top_logprobs", "return_prompt_text"},
    REFUSED_EVERYWHERE | REFUSED_CHAT,
    aliases=ALIASES,
)
TOKENIZE = RequestSchema(frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"}))
TOKENIZE_CHAT = RequestSchema(
    _TEMPLATE_FIELDS | {"model", "return_token_strs"},
    {name: REFUSED_CHAT[name] for name in ("tools", "mm_processor_kwargs")},
)
DETOKENIZE = RequestSchema(frozenset({"model", "tokens"}))


def take(body: Mapping[str, Any], door: RequestSchema, limits: Limits) -> dict[str, Any]:
    """The honoured fields under their canonical names. A null is a field left out.

    Raises:
        InvalidRequestError: a name that is unknown (with the nearest known one) or refused, or an alias that
            contradicts its canonical name.
    """
    taken: dict[str, Any] = {}
    for name, value in body.items():
        canonical = door.aliases.get(name, name)
        if name in door.refused:
            _refuse_unless_neutral(name, value, door.refused[name])
        elif name in door.labels:
            _check_label(name, value, limits)
        elif canonical not in door.honoured:
            raise InvalidRequestError(unknown_name_message("field", name[:64], door.known()), param=name[:64])
        elif value is not None:
            if canonical in taken and taken[canonical] != value:
                raise InvalidRequestError(f"{name} and {canonical} are one field and differ", param=name)
            taken[canonical] = value
    return taken


def _refuse_unless_neutral(name: str, value: Any, refused: Refused) -> None:
    if value is None:
        return
    for neutral in refused.neutral:
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
            return
    raise InvalidRequestError(f"{name} is not supported: {refused.reason}", param=name)


def _check_label(name: str, value: Any, limits: Limits) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a string", param=name)
    if len(value) > limits.label_characters.value:
        raise limits.label_characters.error(f"{len(value):,} in {name}")


def flag(taken: dict[str, Any], name: str, default: bool) -> bool:
    """Take a boolean out.

    Raises:
        InvalidRequestError: it is something else.
    """
    value = taken.pop(name, default)
    if type(value) is not bool:
        raise InvalidRequestError(f"{name} must be true or false", param=name)
    return value
