"""One run of a workload through an `LLM`."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from quire.bench.workloads import Item
from quire.errors import RequestFailedError
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams


class Generates(Protocol):
    """What is measured: an `LLM`."""

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Outputs in the order of the prompts."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run, under the names of vLLM's throughput benchmark, and two more."""

    engine: str
    workload: str
    repetition: int
    elapsed_time: float
    num_requests: int
    total_num_tokens: int
    requests_per_second: float
    tokens_per_second: float
    """Prompt and output tokens together."""
    output_tokens_per_second: float
    time_to_first_token_s: float | None
    """The median over the requests, all of which arrive at once; None where it was not seen."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    engine: str, workload: str, repetition: int, items: Sequence[Item], elapsed_s: float, first_token_s: float | None
) -> Measurement:
    """The rates of one run. Only tokens that were asked for count, not what a padded batch computed besides."""
    num_output = sum(item.num_output for item in items)
    num_tokens = num_output + sum(len(item.prompt_token_ids) for item in items)
    return Measurement(
        engine=engine,
        workload=workload,
        repetition=repetition,
        elapsed_time=elapsed_s,
        num_requests=len(items),
        total_num_tokens=num_tokens,
        requests_per_second=len(items) / elapsed_s,
        tokens_per_second=num_tokens / elapsed_s,
        output_tokens_per_second=num_output / elapsed_s,
        time_to_first_token_s=first_token_s,
    )


def run_quire(llm: Generates, items: Sequence[Item]) -> tuple[float, float | None]:
    """Seconds for the whole workload, and the median time to a first token. Token ids in, token ids out.

    Raises:
        RequestFailedError: an output has not the length that was asked for.
    """
    params = [
        SamplingParams(temperature=0.0, max_tokens=item.num_output, ignore_eos=True, detokenize=False) for item in items
    ]
    begun = time.monotonic()  # the clock of the metrics
    outputs = llm.generate([{"prompt_token_ids": item.prompt_token_ids} for item in items], params, use_tqdm=False)
    elapsed_s = time.monotonic() - begun
    for item, output in zip(items, outputs, strict=True):
        if len(output.outputs[0].token_ids) != item.num_output:
            raise RequestFailedError(output.error or "an output has another length than was asked for")
    waits = [
        one.metrics.first_token_s - begun
        for one in outputs
        if one.metrics is not None and one.metrics.first_token_s is not None
    ]
    return elapsed_s, statistics.median(waits) if len(waits) == len(outputs) else None
