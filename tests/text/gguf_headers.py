"""The `tokenizer.*` of a GGUF header, as llama.cpp's converter makes it of a tokenizer.json."""

from collections.abc import Mapping
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def header_of(state: Mapping[str, Any], pre: str | None = None, **more: Any) -> dict[str, Any]:
    """
    Args:
        state: a parsed tokenizer.json, of a BPE.
        pre: the rule by which text is cut; None is a SentencePiece vocabulary, with scores.
        more: keys without `tokenizer.ggml.`.
    """
    model, added = state["model"], state["added_tokens"]
    size = 1 + max(*model["vocab"].values(), *(token["id"] for token in added))
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in model["vocab"].items():
        is_byte = pre is None and len(token) == 6 and token.startswith("<0x")
        tokens[number], kinds[number] = token, BYTE if is_byte else NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    found: dict[str, Any] = {"model": "llama" if pre is None else "gpt2", "tokens": tokens, "token_type": kinds}
    if pre is not None:
        found |= {"pre": pre, "merges": [" ".join(merge) for merge in merges]}
    else:
        scores: dict[str, float] = {}
        for rank, pair in enumerate(merges):
            scores.setdefault("".join(pair), float(-rank))
        found["scores"] = [scores.get(token, 0.0) for token in tokens]
    return {f"tokenizer.ggml.{key}": value for key, value in (found | more).items() if value is not None}
