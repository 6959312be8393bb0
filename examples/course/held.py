"""What the requests of a running server hold of its cache, and what contiguous memory would hold for the same."""

import json
import sys
import urllib.request

LONGEST = 2048
"""Positions of the embedded model: what an engine sets aside that knows nothing of a request."""


def power_of_two(number: int) -> int:
    """The next one, from `number` on."""
    return 1 << max(0, number - 1).bit_length()


with urllib.request.urlopen(f"{sys.argv[1]}/ui/frame") as answer:
    frame = json.load(answer)
requests = frame["requests"]
used = sum(request["num_computed"] for request in requests)
blocks = {block for request in requests for block in request["blocks"]}
held = {
    "in blocks of 16": len(blocks) * frame["block_size"],
    "prompt and max_tokens": sum(request["num_prompt"] + request["max_tokens"] for request in requests),
    "a power of two": sum(request["num_prompt"] + power_of_two(request["num_output"]) for request in requests),
    "the longest sequence": LONGEST * len(requests),
}
print(f"{len(requests)} requests have {used} tokens in the cache; they hold, or would hold")
for name, tokens in held.items():
    print(f"  {name:22}{tokens:>6} tokens  {used / max(tokens, 1):7.1%} used")
