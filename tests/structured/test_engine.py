"""Shapes beside other requests."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncLLM, RequestOutput, SamplingParams
from quire.structured.checker import ShapeChecker
from quire.structured.compiler import GrammarCompiler
from quire.structured_params import StructuredOutputsParams


async def last(llm: AsyncLLM, prompt: str, params: SamplingParams) -> RequestOutput:
    return [output async for output in llm.generate(prompt, params)][-1]


async def test_compiling_a_shape_keeps_no_other_request_waiting(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even long texts, and other shapes that are known."""
    llm = AsyncLLM(str(tiny_model), max_num_seqs=4)
    known = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="known[a-z]*"))
    assert (await last(llm, "x", known)).outputs[0].text.startswith("known")
    monkeypatch.setattr("quire.engine.async_engine.INLINE_CHARACTERS", 16)
    begun, may_end, plain = threading.Event(), threading.Event(), ShapeChecker._ask

    def ask(self: ShapeChecker, question: bytes, params: StructuredOutputsParams) -> Any:
        begun.set()
        may_end.wait()
        return plain(self, question, params)

    monkeypatch.setattr(ShapeChecker, "_ask", ask)
    slow = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="slow[a-z]*"))
    waiting = asyncio.create_task(last(llm, "x", slow))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    others = [last(llm, "long " * 90, SamplingParams(max_tokens=2)), last(llm, "x", known)]
    assert all(output.finished for output in await asyncio.gather(*others))
    assert not waiting.done()
    may_end.set()
    assert (await waiting).outputs[0].text.startswith("slow")
    await llm.shutdown()


async def test_a_request_that_waits_for_its_grammar_is_counted_and_explained(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, plain = threading.Event(), threading.Event(), GrammarCompiler._compile

    def compile(self: GrammarCompiler, source: str) -> Any:
        begun.set()
        may_end.wait()
        return plain(self, source)

    def waiting(llm: AsyncLLM) -> dict[str, float]:
        found = [item for item in llm.get_metrics() if item.name == "quire:num_requests_waiting_by_reason"]
        return {dict(item.labels)["reason"]: item.value for item in found}

    llm = AsyncLLM(str(tiny_model), max_num_seqs=4)
    monkeypatch.setattr(GrammarCompiler, "_compile", compile)
    held = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    task = asyncio.create_task(last(llm, "x", held))
    try:
        async with asyncio.timeout(30):
            while not begun.is_set() or waiting(llm)["grammar"] == 0:
                await asyncio.sleep(0.01)
        assert waiting(llm) == {"capacity": 0.0, "grammar": 1.0, "deferred": 0.0}
        await asyncio.sleep(0.3)
    finally:
        may_end.set()
    request_id = (await task).request_id
    assert sum(waiting(llm).values()) == 0
    (found,) = llm.explain(request_id)
    assert found.largest == "queued" and "since its grammar was being compiled" in found.sentence
    assert 0.3 <= found.queued_because["grammar"] <= found.parts["queued"] + 1e-3
    await llm.shutdown()


def test_one_shape_for_many_prompts_is_asked_for_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire import LLM

    asked: list[bytes] = []
    plain = ShapeChecker._ask
    monkeypatch.setattr(
        ShapeChecker, "_ask", lambda self, question, params: asked.append(question) or plain(self, question, params)
    )
    with LLM(str(tiny_model)) as llm:
        params = SamplingParams(max_tokens=6, n=2, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
        outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert {item.text for output in outputs for item in output.outputs} <= {"yes", "no"} and len(asked) == 1
