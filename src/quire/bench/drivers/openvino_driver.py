"""OpenVINO GenAI's continuous batching, of a model that `optimum-cli export openvino` wrote (the setting `files`)."""

import time
from typing import Any

GIB = 2**30


class Pipeline:
    """`ContinuousBatchingPipeline`, stepped by hand."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        if not settings.get("files"):
            raise ValueError("it reads a model that was exported for it: --files openvino=DIR")
        self._openvino: Any = openvino
        self._genai: Any = openvino_genai
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = settings["kv_bytes"] // GIB  # whole ones: `quire compare` leaves it out otherwise
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.enable_prefix_caching = True
        hint = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[settings["dtype"]]
        properties = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": settings["threads"]}
        properties["KV_CACHE_PRECISION"] = hint
        self._pipeline = self._genai.ContinuousBatchingPipeline(settings["files"], scheduler, "CPU", properties)
        self._count = 0
        self.facts = {
            "versions": {"openvino-genai": self._genai.__version__},
            "settings": properties | {"max_num_seqs": scheduler.max_num_seqs, "enable_prefix_caching": True},
            "kv_bytes": scheduler.cache_size * GIB,
        }

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """All at once."""
        import numpy as np

        begun = time.perf_counter()
        handles = []
        for item in items:
            config = self._genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = item["num_output"], True, False
            self._count += 1
            prompt = self._openvino.Tensor(np.array([item["prompt_token_ids"]], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._count, prompt, config))
        ttfts_s, token_ids = [0.0] * len(items), [list[int]() for _ in items]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now_s = time.perf_counter() - begun
            for place, handle in enumerate(handles):
                while handle.can_read():
                    ttfts_s[place] = ttfts_s[place] or now_s
                    for output in handle.read().values():
                        token_ids[place] += output.generated_ids
        return {
            "elapsed_s": time.perf_counter() - begun,
            "ttfts_s": ttfts_s,
            "token_ids": token_ids,
            "output_lens": [len(ids) for ids in token_ids],
        }

    def close(self) -> None:
        """Nothing to end."""


def start(settings: dict[str, Any]) -> Pipeline:
    """A pipeline with the settings."""
    return Pipeline(settings)
