"""A prompt's tokens against the model's length: cut where the client said so, refused with the numbers otherwise."""

from collections.abc import Sequence

from quire.errors import PromptTooLongError
from quire.server.protocol.sampling import ResponseOptions


def truncate_prompt(token_ids: Sequence[int], options: ResponseOptions, max_model_len: int) -> Sequence[int]:
    """The tokens to go on from.

    Without `max_tokens` the answer is as long as fits. One that was asked for fits whole or is refused, as by vLLM's
    server: it is never cut short in silence. (A prompt that is too long by itself is the engine's to refuse.)

    Raises:
        PromptTooLongError: prompt and `max_tokens` together exceed `max_model_len`.
    """
    asked, kept = options.asked_max_tokens, token_ids
    if options.truncation is not None:
        most = options.truncation.num_tokens
        if most is None:
            most = max(1, max_model_len - (asked or 1))
        kept = token_ids[-most:] if options.truncation.keeps_end else token_ids[:most]
    if asked is not None and len(kept) < max_model_len < len(kept) + asked:
        raise PromptTooLongError(
            f"max_tokens is {asked} and the prompt has {len(kept)} tokens, {len(kept) + asked} together; at most "
            f"{max_model_len} fit (max_model_len), so max_tokens may be at most {max_model_len - len(kept)}",
            param="max_tokens",
        )
    return kept
