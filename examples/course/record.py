"""Answer twenty-four requests of mixed lengths, four at a time, and write down what the scheduler did."""

import sys

from quire import LLM, SamplingParams

TERMS = ["the KV cache", "PagedAttention", "TTFT", "quantisation", "a block table", "preemption"]
questions = [[{"role": "user", "content": f"What is {term}?"}] for term in TERMS * 4]
lengths = [120 if index % 6 == 0 else 24 for index in range(len(questions))]
params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]

with LLM(max_num_seqs=4, max_model_len=512, record=sys.argv[1]) as llm:
    answers = llm.chat(questions, params)
print(f"{len(answers)} answers, {sum(len(answer.outputs[0].token_ids) for answer in answers)} tokens")
