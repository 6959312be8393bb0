"""Answer several prompts at once, then a conversation, with the embedded model."""

from quire import LLM, SamplingParams

with LLM(max_num_seqs=32) as llm:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=100)
    for output in llm.generate(["Hello, ", "Explain AI: ", "Code example:"], params):
        print(repr(output.prompt), "->", output.outputs[0].text)

    messages = [{"role": "user", "content": "What is the KV cache?"}]
    print(llm.chat(messages, SamplingParams(temperature=0, max_tokens=80))[0].outputs[0].text)
