"""Memory of cache blocks that goes back to the system: it is gone, and the blocks can be written again."""

from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says what is resident")
def test_released_blocks_have_no_memory_and_serve_again(tiny_model: Path) -> None:
    prompts = [[number % 200, *range(1, 200)] for number in range(64)]
    with LLM(model=str(tiny_model), kv_cache_memory_bytes="64MiB", max_model_len=256) as llm:

        def answers() -> list[Any]:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS, use_tqdm=False)
            return [item.outputs[0].token_ids for item in outputs]

        expected = answers()
        core: Any = llm._engine.channel._core  # type: ignore[attr-defined]
        runner, num_touched = core._executor._runner, core.scheduler._pool.num_touched
        ops, cache, size = runner._ops, runner._cache, runner._model.cache_shape(1, 16).bytes_per_block
        middle = num_touched // 2
        assert any(ops.block_bytes(cache, middle, 0))
        before = resident_bytes()
        core.give_back(keeps_cached=True)
        assert any(ops.block_bytes(cache, middle, 0)), "it is cached, and the size of the cache was given"
        core.give_back(keeps_cached=False)
        assert before - resident_bytes() > num_touched * size // 2 > 2**20
        assert not any(ops.block_bytes(cache, middle, 0))
        assert answers() == expected
        with pytest.raises(ValueError, match="outside the cache"):
            ops.release_blocks(cache, 1, 2**40)
