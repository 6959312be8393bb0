"""Beam search of a completion: each beam's next token is a request, and the answer is one output with all sequences."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quire.engine.beam import BeamSearch
from quire.errors import DeadlineExceededError, InvalidRequestError
from quire.sampling_params import BeamSearchParams, SamplingParams
from quire.server.answers.finish import check_finish
from quire.server.doors.openai.bodies import CompletionBody
from quire.server.http.streams import Outputs, last_outputs

if TYPE_CHECKING:
    from quire.engine.async_engine import AsyncEngine

_HONOURED = frozenset({"n", "max_tokens", "ignore_eos", "temperature"})
MOST_TOKENS = 2**31 - 1
Start = Callable[[Sequence[int], SamplingParams, str, float | None], Outputs]
"""Begins a request: its prompt, its parameters, its name, and the seconds it has."""


def beams_of(body: CompletionBody, values: dict[str, Any]) -> BeamSearchParams | None:
    """The search that a body asks for; None: it samples.

    Args:
        values: its sampling parameters; the temperature becomes 0.

    Raises:
        InvalidRequestError: what no search can honour, by its name.
    """
    if not body.use_beam_search:
        if body.length_penalty != 1.0:
            raise InvalidRequestError("length_penalty needs use_beam_search", param="length_penalty")
        return None
    if body.options.stream:
        raise InvalidRequestError("use_beam_search needs stream: false", param="stream")
    defaults: dict[str, Any] = {name: one.default for name, one in SamplingParams.__dataclass_fields__.items()}
    for name, value in values.items():
        if name not in _HONOURED and value not in (None, [], {}, (defaults | {"best_of": 1}).get(name)):
            raise InvalidRequestError(f"{name} is not supported with use_beam_search", param=name)
    most = values.get("max_tokens", 16)
    try:
        return BeamSearchParams(
            beam_width=values.get("n", 1),
            max_tokens=MOST_TOKENS if most is None else most,
            ignore_eos=values.get("ignore_eos", False),
            temperature=values.setdefault("temperature", 0.0),
            length_penalty=body.length_penalty,
        )
    except InvalidRequestError as error:
        if error.param != "beam_width":
            raise
        raise InvalidRequestError(error.message.replace("beam_width", "n", 1), param="n") from error


async def search_beams(
    engine: "AsyncEngine",
    params: BeamSearchParams,
    token_ids: Sequence[int],
    request_id: str,
    timeout_s: float | None,
    start: Start,
) -> Outputs:
    """One output, when the search has ended.

    Raises:
        DeadlineExceededError: `timeout_s` passed before.
    """
    clock = asyncio.get_running_loop().time
    end_s = None if timeout_s is None else clock() + timeout_s
    search = BeamSearch(params, engine.max_model_len - len(token_ids), engine.eos_token_ids)
    while search.open:
        left_s = None if end_s is None else end_s - clock()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceededError(f"the request did not end within its timeout of {timeout_s:g} s")
        step = search.step
        outputs = await last_outputs(
            [
                start([*token_ids, *beam.token_ids], step, f"{request_id}/{number}", left_s)
                for number, beam in enumerate(search.open)
            ]
        )
        for output in outputs:
            check_finish(output, output.outputs[0])
        search.advance([(output.outputs[0].logprobs or [{}])[0] for output in outputs])
    yield search.output(request_id, token_ids, engine.get_tokenizer())
