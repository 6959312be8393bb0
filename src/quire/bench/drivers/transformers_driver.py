"""Plain `transformers`: `generate` in static batches, or its continuous batching (the manager behind `generate_batch`).

Static batches are made in the order of the requests and padded on the left; each runs until its longest output is done.
That is what `generate` offers without further work. Attention is sdpa, decoding greedy, no token ends a sequence.
"""

import time
from typing import Any

PAGE = 256
"""Tokens in a page of the continuous cache: its default."""
STEP = 2048
"""Tokens in a step of it; its own choice, all that the memory would hold, takes gigabytes for a mask."""


class _FirstToken:
    """A streamer that keeps the time of the first token of a batch."""

    def __init__(self) -> None:
        self.at = 0.0
        self._is_prompt = True

    def put(self, _: object) -> None:
        """Called with the prompts first, then with a token of each."""
        if not self._is_prompt and not self.at:
            self.at = time.perf_counter()
        self._is_prompt = False

    def end(self) -> None:
        """Nothing to do."""


def _load(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    dtype = getattr(torch, settings["dtype"])
    model = load(settings["model"], dtype=dtype, attn_implementation="sdpa").to(settings["device"]).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model, {"transformers": transformers.__version__, "torch": torch.__version__}


class Static:
    """Batches of a fixed size."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._model, versions = _load(settings)
        self._batch_size: int = settings["batch_size"]
        flags = {"attention": "sdpa", "batch size": self._batch_size, "padding": "left", "prefix caching": "none"}
        self.facts = {"versions": versions, "settings": flags, "kv_bytes": None}

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch by batch; a first token waits for the batches before its own."""
        found: dict[str, Any] = {"ttfts_s": [], "token_ids": [], "kv_bytes": 0}
        begun = time.perf_counter()
        for start in range(0, len(items), self._batch_size):
            self._generate(items[start : start + self._batch_size], begun, found)
        found["elapsed_s"] = time.perf_counter() - begun
        found["output_lens"] = [len(ids) for ids in found["token_ids"]]
        return found

    def _generate(self, items: list[dict[str, Any]], begun: float, found: dict[str, Any]) -> None:
        import torch

        width = max(len(item["prompt_token_ids"]) for item in items)
        padding = [width - len(item["prompt_token_ids"]) for item in items]
        ids = [[0] * pad + item["prompt_token_ids"] for pad, item in zip(padding, items, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        streamer = _FirstToken()
        output = self._model.generate(
            torch.tensor(ids, device=self._model.device),
            attention_mask=torch.tensor(mask, device=self._model.device),
            max_new_tokens=max(item["num_output"] for item in items),
            streamer=streamer,
            return_dict_in_generate=True,
        )
        rows = output.sequences[:, width:].tolist()
        found["token_ids"] += [row[: item["num_output"]] for row, item in zip(rows, items, strict=True)]
        found["ttfts_s"] += [streamer.at - begun] * len(items)
        held = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        found["kv_bytes"] = max(found["kv_bytes"], sum(tensor.nbytes for tensor in held))

    def close(self) -> None:
        """Nothing to end."""


class Continuous:
    """Its own scheduler and paged cache."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self._model, versions = _load(settings)
        page_bytes = PAGE * settings["kv_bytes_per_token"]
        blocks = max(1, settings["kv_bytes"] // page_bytes)
        config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=STEP)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
        )
        self._manager.start()
        self._count = 0
        flags = {"attention": self._model.config._attn_implementation, "page": PAGE, "step": STEP}
        flags["prefix caching"] = "on"
        self.facts = {"versions": versions, "settings": flags, "kv_bytes": blocks * page_bytes}

    def run(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """All at once, each with its own length."""
        names, finished = [], dict[str, Any]()
        begun = time.perf_counter()
        for item in items:
            self._count += 1
            names.append(f"request-{self._count}")
            self._manager.add_request(
                item["prompt_token_ids"],
                request_id=names[-1],
                max_new_tokens=item["num_output"],
                eos_token_id=-1,
                record_timestamps=True,
            )
        while len(finished) < len(items):
            output = self._manager.get_result(timeout=1)
            if output is None and not self._manager.is_running():
                raise RuntimeError("its generation thread ended")
            if output is not None and output.error:
                raise RuntimeError(output.error)
            if output is not None and output.is_finished():
                finished[output.request_id] = output
        elapsed_s = time.perf_counter() - begun
        outputs = [finished[name] for name in names]
        return {
            "elapsed_s": elapsed_s,
            "ttfts_s": [output.timestamps[0] - begun for output in outputs],
            "token_ids": [list(output.generated_tokens) for output in outputs],
            "output_lens": [len(output.generated_tokens) for output in outputs],
        }

    def close(self) -> None:
        """End its thread."""
        self._manager.stop(block=True, timeout=10)


def start(settings: dict[str, Any]) -> Any:
    """`Static` or `Continuous`, by the setting `mode`."""
    return Continuous(settings) if settings["mode"] == "continuous" else Static(settings)
