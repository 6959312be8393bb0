"""One answer of TGI's API under way: whole, or token by token."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import msgspec

from quire.errors import InvalidRequestError
from quire.outputs import CompletionOutput, PositionLogprobs, RequestMetrics, RequestOutput
from quire.sampling_params import SamplingParams
from quire.server.answers.finish import check_finish, mean_logprob
from quire.server.doors.tgi.bodies import MOST_NEW_TOKENS
from quire.server.doors.tgi.parse import GenerateCall, renamed
from quire.server.doors.tgi.tokens import AnswerTokens, Content, prefill_tokens
from quire.server.http.context import RequestContext, ServerContext, new_id
from quire.server.http.streams import Outputs, last_outputs, naming_unfit

_REASONS = {"length": "length", "repetition": "length"}


class GenerateAnswer:
    """The answer to one prompt.

    Args:
        in_list: whole, it stands in a list, as at POST /.
    """

    def __init__(self, context: ServerContext, call: GenerateCall, request: RequestContext, *, in_list: bool) -> None:
        self._context, self._engine, self._call, self._request = context, context.engine, call, request
        self._id, self._in_list = new_id("tgi"), in_list
        self._prompt = ""
        """What stands before the answer."""
        self._headers: dict[str, str] = {"x-compute-characters": str(len(call.inputs))}

    def headers(self) -> dict[str, str]:
        """TGI's, of a whole answer with its times in milliseconds."""
        return {"x-request-id": self._id, **self._headers}

    async def whole(self) -> bytes:
        """The answer in one piece, as JSON."""
        with self._context.gate.inside(self._id), naming_unfit("grammar"):
            (output,) = await last_outputs([await self._start()])
            num_tokens = len(output.prompt_token_ids) + sum(len(choice.token_ids) for choice in output.outputs)
            size = num_tokens * (1 + self._call.top_n_tokens)
            return await self._engine.beside(partial(self._written, output), size, self._request.caller, first=True)

    async def events(self) -> AsyncGenerator[Content, None]:
        """An event a token; the last one has the text and the details."""
        said, count = "", 0
        with self._context.gate.inside(self._id), naming_unfit("grammar"):
            async with aclosing(await self._start()) as outputs:
                async for output in outputs:
                    (choice,) = output.outputs
                    if not count:
                        tokens = self._tokens(output)
                    ended = check_finish(output, choice) is not None
                    said += choice.text
                    made = tokens.push(choice, ended=ended)
                    for place, (token, top) in enumerate(made, 1):
                        count += 1
                        event: Content = {"index": count, "token": token, "generated_text": None, "details": None}
                        if self._call.top_n_tokens:
                            event["top_tokens"] = top
                        if ended and place == len(made):
                            event["generated_text"] = self._prompt + said
                            event["details"] = self._stream_details(output, choice, count)
                        yield event

    async def _start(self) -> Outputs:
        engine, call, caller = self._engine, self._call, self._request.caller
        token_ids: Sequence[int] = await engine.encode(call.inputs, caller=caller)
        self._prompt = call.inputs if call.shows_prompt else ""
        if call.truncate is not None and len(token_ids) > call.truncate:
            token_ids = token_ids[-call.truncate :]
        params = self._fitting(len(token_ids))
        return _renaming(
            engine.generate(
                {"prompt_token_ids": token_ids},
                params,
                request_id=self._id,
                cache_salt=self._request.cache_salt,
                caller=caller,
                timeout_s=self._request.timeout_s,
            )
        )

    def _fitting(self, length: int) -> SamplingParams:
        """The parameters behind a prompt of this length.

        Raises:
            InvalidRequestError: what was asked for does not fit behind it.
            ApiError: more log-probabilities than the limit.
        """
        call, limits, most = self._call, self._context.limits, self._engine.max_model_len
        if length > limits.prompt_tokens.value:
            raise limits.prompt_tokens.error(f"{length:,}", "inputs")
        params = call.params
        if not call.asks_length:
            params = replace(params, max_tokens=max(1, min(MOST_NEW_TOKENS, most - length)))
        elif (params.max_tokens or 0) + length > most:
            text = f"inputs tokens + max_new_tokens must be <= {most}. Given: {length} inputs tokens and "
            raise InvalidRequestError(f"{text}{params.max_tokens} max_new_tokens", param="max_new_tokens")
        named = 0 if params.logprobs is None else 1 + call.top_n_tokens
        count = params.n * ((params.max_tokens or 0) * named + length * call.prompt_details)
        if count > limits.logprobs.value:
            raise limits.logprobs.error(f"{count:,}", "top_n_tokens")
        return params

    def _tokens(self, output: RequestOutput) -> AnswerTokens:
        return AnswerTokens(self._engine.get_tokenizer(), output.prompt_token_ids, self._call.top_n_tokens)

    def _written(self, output: RequestOutput) -> bytes:
        for choice in output.outputs:
            check_finish(output, choice)
        best, *others = sorted(output.outputs, key=mean_logprob, reverse=True)
        if output.metrics is not None:
            self._headers |= _timing(output.metrics, len(output.prompt_token_ids), len(best.token_ids))
        answer: Content = {"generated_text": self._prompt + best.text}
        if self._call.details:
            answer["details"] = self._details(output, best)
            if others:
                sequences = [
                    {"generated_text": self._prompt + one.text, **self._details(output, one)} for one in others
                ]
                answer["details"]["best_of_sequences"] = sequences
        return msgspec.json.encode([answer] if self._in_list else answer)

    def _details(self, output: RequestOutput, choice: CompletionOutput) -> Content:
        made = self._tokens(output).push(choice, ended=True)
        prompt: Sequence[PositionLogprobs | None] = output.prompt_logprobs or ()
        found: Content = {
            "finish_reason": _reason(output, choice),
            "generated_tokens": len(choice.token_ids),
            "seed": self._call.seed_of(choice.index),
            "prefill": prefill_tokens(self._engine.get_tokenizer(), output.prompt_token_ids, prompt),
            "tokens": [token for token, _ in made],
        }
        return found | ({"top_tokens": [top for _, top in made]} if self._call.top_n_tokens else {})

    def _stream_details(self, output: RequestOutput, choice: CompletionOutput, count: int) -> Content | None:
        if not self._call.details:
            return None
        return {
            "finish_reason": _reason(output, choice),
            "generated_tokens": count,
            "seed": self._call.seed_of(choice.index),
            "input_length": len(output.prompt_token_ids),
        }


def _reason(output: RequestOutput, choice: CompletionOutput) -> str:
    """TGI tells the end of sequence from a stop string."""
    reason = check_finish(output, choice) or "length"
    return _REASONS.get(reason) or ("eos_token" if choice.stop_reason is None else "stop_sequence")


def _timing(metrics: RequestMetrics, num_prompt: int, num_tokens: int) -> dict[str, str]:
    total, queued = metrics.total_s or 0.0, metrics.queued_s or 0.0
    spans = {
        "x-total-time": total,
        "x-queue-time": queued,
        "x-inference-time": total - queued,
        "x-time-per-token": (total - queued) / max(1, num_tokens),
    }
    counts = {"x-prompt-tokens": str(num_prompt), "x-generated-tokens": str(num_tokens)}
    return {name: str(round(1000 * value)) for name, value in spans.items()} | counts


async def _renaming(outputs: Outputs) -> Outputs:
    """Refusals of the engine under TGI's names."""
    async with aclosing(outputs) as source:
        try:
            async for output in source:
                yield output
        except InvalidRequestError as error:
            raise renamed(error) from error
