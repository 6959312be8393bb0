"""The core's own look at a request that came from another process: the limits of the door, once more."""

from collections.abc import Iterable

from quire.core.request import NewRequest
from quire.engine.channel import CoreInfo
from quire.errors import InvalidRequestError
from quire.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRING_BYTES, SamplingParams

MAX_ID_BYTES = 64
MAX_SALT_BYTES = 1024


def check_new(new: NewRequest, info: CoreInfo) -> None:
    """Refuse what `InputProcessor` would have refused. The scheduler itself checks lengths.

    Raises:
        InvalidRequestError: naming the field.
    """
    spec, resume = new.sampling, new.resume
    SamplingParams(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repetition_penalty,
        min_tokens=spec.min_tokens,
        max_tokens=None,
        logprobs=spec.num_logprobs,
        prompt_logprobs=spec.num_prompt_logprobs,
        stop_token_ids=sorted({*spec.stop_token_ids} - {*new.eos_token_ids}),
        allowed_token_ids=spec.allowed_token_ids or None,
        logprob_token_ids=spec.logprob_token_ids or None,
        logit_bias=dict(spec.logit_bias),
    )
    _require(len(new.request_id.encode()) <= MAX_ID_BYTES, "request_id")
    _require(len(new.cache_salt.encode(errors="replace")) <= MAX_SALT_BYTES, "cache_salt")
    _require(len(new.caller.encode(errors="replace")) <= MAX_ID_BYTES, "caller")
    _require(0 <= spec.seed < 2**64, "seed")
    _require(new.needs_output_tokens or not spec.needs_output_tokens, "needs_output_tokens")
    _require(len(new.eos_token_ids) <= len(spec.stop_token_ids), "eos_token_ids")
    _require(len(spec.bad_words) <= 2 * MAX_BAD_WORDS, "bad_words")
    _require(all(0 < len(word) <= MAX_STOP_STRING_BYTES + 1 for word in spec.bad_words), "bad_words")
    _require(0 <= resume.num_prompt_logprobs < info.max_model_len, "resume")
    _require(0 <= resume.num_cached_tokens < info.max_model_len, "resume")
    lists: dict[str, Iterable[Iterable[int]]] = {
        "prompt_token_ids": (new.prompt_token_ids,),
        "resume": (resume.output_token_ids,),
        "stop_token_ids": (spec.stop_token_ids, new.eos_token_ids),
        "allowed_token_ids": (spec.allowed_token_ids,),
        "logprob_token_ids": (spec.logprob_token_ids,),
        "logit_bias": ([token_id for token_id, _ in spec.logit_bias],),
        "bad_words": spec.bad_words,
    }
    for name, values in lists.items():
        for ids in values:
            _require(min(ids, default=0) >= 0 and max(ids, default=0) < info.vocab_size, name)


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{field} is out of range", param=field)
