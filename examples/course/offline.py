"""A batch, a seed, and a question asked again in other company: the same answer."""

from quire import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "Tell me a tiny story."}]
OTHERS = [[{"role": "user", "content": f"What is {term}?"}] for term in ("TTFT", "the KV cache", "a block table")]

with LLM(max_num_seqs=32) as llm:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=60, seed=1)
    alone = llm.chat(QUESTION, params, use_tqdm=False)[0].outputs[0]
    batch = llm.chat([*OTHERS, QUESTION], params, use_tqdm=False)
    print(alone.text)
    print("alone and among others the same:", alone.token_ids == batch[-1].outputs[0].token_ids)

    greedy = SamplingParams(temperature=0, max_tokens=60)
    for output in llm.chat(OTHERS, greedy, use_tqdm=False):
        answer = output.outputs[0]
        print(f"{len(output.prompt_token_ids)} in, {len(answer.token_ids)} out, {answer.finish_reason}: {answer.text}")
