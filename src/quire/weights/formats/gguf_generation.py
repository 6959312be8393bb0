"""What a GGUF header says about generation: the tokens that end an answer, and sampling parameters."""

from collections.abc import Mapping
from typing import Any

from quire.errors import ModelFileError
from quire.weights.formats.gguf_file import GgufArray

_NAMED = ("eos", "eot", "eom")
ENDS_OF_TURN = frozenset(
    (
        "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|end_of_text|> "
        "<end_of_utterance> <EOT> [EOT] <｜end▁of▁sentence｜>"
    ).split()
)
"""Control tokens that end a turn, whether or not the header names them: many files have one `eos` and no `eot`."""
_CONTROL = 3

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""`general.sampling.*` -> transformers' name."""


def stop_token_ids(name: str, values: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer, each once.

    Raises:
        ModelFileError: one is no token.
    """
    tokens, kinds = (values.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    found: list[int] = []
    for key in _NAMED:
        number = values.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < 2**31):
            raise ModelFileError(f"{name}: tokenizer.ggml.{key}_token_id must be a token id, got {str(number)[:60]}")
        found += [] if number is None else [number]
    if isinstance(tokens, GgufArray) and isinstance(kinds, GgufArray):
        pairs = enumerate(zip(tokens.items, kinds.items, strict=False))
        found += [number for number, (token, kind) in pairs if kind == _CONTROL and token in ENDS_OF_TURN]
    return list(dict.fromkeys(found))


def generation_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The header's sampling parameters, under the names of `generation_config.json`."""
    stated = {theirs: values.get(f"general.sampling.{ours}") for ours, theirs in SAMPLING.items()}
    return {name: value for name, value in stated.items() if value is not None}
