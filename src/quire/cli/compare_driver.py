"""Quire as one of the engines that `quire compare` drives (`bench/drivers/drive.py`): an `LLM` in its own process."""

import time
from typing import Any

import quire
from quire.llm import LLM
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams

SHOWN = ("operations", "instruction_set", "threads", "dtype", "kv_cache_dtype", "max_num_batched_tokens")


class Engine:
    """An `LLM`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        arguments = {name: settings[name] for name in ("dtype", "device", "threads", "max_model_len", "max_num_seqs")}
        self._llm = LLM(settings["model"], kv_cache_memory_bytes=settings["kv_bytes"], **arguments)
        decided = {one.name: one.value for one in self._llm.decisions if one.name in SHOWN}
        self.facts = {
            "versions": {"quire": quire.__version__},
            "settings": arguments | decided | {"prefix caching": "on"},
            "kv_bytes": settings["kv_bytes"],
        }

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """All at once."""
        params = [
            SamplingParams(temperature=0.0, max_tokens=item["num_output"], ignore_eos=True, detokenize=False)
            for item in items
        ]
        prompts = [{"prompt_token_ids": item["prompt_token_ids"]} for item in items]
        begun = time.monotonic()  # the clock of the metrics
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        elapsed_s = time.monotonic() - begun
        return {
            "elapsed_s": elapsed_s,
            "ttfts_s": [_first_token_s(one) - begun for one in outputs],
            "token_ids": [list(one.outputs[0].token_ids) for one in outputs],
            "output_lens": [len(one.outputs[0].token_ids) for one in outputs],
        }

    def close(self) -> None:
        """End the engine."""
        self._llm.close()


def _first_token_s(output: RequestOutput) -> float:
    assert output.metrics is not None and output.metrics.first_token_s is not None
    return output.metrics.first_token_s


def start(settings: dict[str, Any]) -> Engine:
    """An engine with the settings."""
    return Engine(settings)
