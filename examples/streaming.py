"""Stream two answers at once; the second reader leaves early, and its request is aborted."""

import asyncio

from quire import AsyncLLM, RequestOutputKind, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=80, output_kind=RequestOutputKind.DELTA)


async def ask(llm: AsyncLLM, question: str, patience: int) -> None:
    """Print the first `patience` pieces of the answer."""
    prompt = await llm.encode_chat([{"role": "user", "content": question}])
    stream = llm.generate({"prompt_token_ids": prompt}, PARAMS)
    pieces = []
    async for output in stream:
        pieces.append(output.outputs[0].text)
        if len(pieces) == patience:
            break
    await stream.aclose()
    print(f"{question}\n  {''.join(pieces)}")


async def main() -> None:
    """Ask twice."""
    llm = AsyncLLM()
    await asyncio.gather(ask(llm, "What is continuous batching?", 100), ask(llm, "Tell me a tiny story.", 20))
    await llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
