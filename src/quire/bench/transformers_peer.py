"""Plain `transformers`, started as a process by `offline.TransformersPeer`: a list of requests a line in, times out.

Static batches in the order of the requests, padded on the left; each runs until its longest output is done. That is
what `generate` offers without further work. bf16 weights, sdpa attention, greedy.
"""

import json
import os
import sys
import time
from typing import Any


class _FirstToken:
    """A streamer that keeps the time of the first token."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._is_prompt = True

    def put(self, _: object) -> None:
        """Called with the prompt first, then with each token."""
        if self._is_prompt:
            self._is_prompt = False
        elif self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""


def _load(path: str, threads: int) -> tuple[Any, dict[str, str]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    return model, {"torch": torch.__version__, "transformers": transformers.__version__}


def _generate(model: Any, items: list[dict[str, Any]], streamer: _FirstToken | None) -> None:
    import torch

    num_input = max(len(item["prompt_token_ids"]) for item in items)
    num_output = max(item["num_output"] for item in items)
    padding = [num_input - len(item["prompt_token_ids"]) for item in items]
    ids = [[0] * pad + item["prompt_token_ids"] for pad, item in zip(padding, items, strict=True)]
    mask = [[0] * pad + [1] * (num_input - pad) for pad in padding]
    model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=num_output,
        min_new_tokens=num_output,
        pad_token_id=0,
        streamer=streamer,
    )


def _run(model: Any, items: list[dict[str, Any]], batch_size: int) -> dict[str, float | None]:
    streamer = _FirstToken() if len(items) == 1 else None
    begun = time.perf_counter()
    for start in range(0, len(items), batch_size):
        _generate(model, items[start : start + batch_size], streamer)
    elapsed_s = time.perf_counter() - begun
    first = streamer.at if streamer is not None else None
    return {"elapsed_s": elapsed_s, "first_token_s": None if first is None else first - begun}


def main() -> None:
    """Answer until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        model, versions = _load(sys.argv[1], int(sys.argv[2]))
        print(json.dumps({"versions": versions}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_run(model, json.loads(line), int(sys.argv[3]))), file=answers, flush=True)
    except Exception as error:  # noqa: BLE001 -- sent to the parent, which raises it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
