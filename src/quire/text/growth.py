"""By what factor the parts of a tokenizer may lengthen a text: steps that double it, one after another, have no end.

Read from the file before the library builds anything from it: it normalises added tokens at once.
"""

import base64
import binascii
from collections.abc import Mapping
from math import prod
from typing import Any

import msgspec

from quire.errors import ModelFileError

MAX_GROWTH = 1024
"""Of each part. The largest of published tokenizers is some 700 (ALBERT's normaliser, in the worst case)."""
MAX_STEPS = 256

_INNER = ("normalizers", "pretokenizers", "decoders", "processors")
_FIXED = {
    "NFKC": 11, "NFKD": 11, "NFC": 3, "NFD": 3, "Lowercase": 3, "BertNormalizer": 9, "ByteLevel": 2, "Metaspace": 6,
}  # fmt: skip
"""In bytes of UTF-8, from the tables of Unicode 15; Metaspace may write its mark before and within a piece."""


class _Parts(msgspec.Struct):
    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None
    post_processor: Any = None


def check_growth(tokenizer_json: str) -> None:
    """Raises ModelFileError, which names the part, where it may lengthen a text more than 1,024 times."""
    try:
        parts = msgspec.json.decode(tokenizer_json, type=_Parts)
        for name in _Parts.__struct_fields__:
            growth, steps = _growth(getattr(parts, name))
            if growth > MAX_GROWTH or steps > MAX_STEPS:
                raise ModelFileError(
                    f"tokenizer.json: {name} has {steps} steps that may lengthen a text {growth:,} times; "
                    f"at most {MAX_STEPS} steps and {MAX_GROWTH:,} times are accepted"
                )
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        raise ModelFileError("tokenizer.json cannot be read: it is not valid JSON, or nests too deeply") from None


def _growth(step: Any) -> tuple[int, int]:
    """A bound of the factor, and the number of steps. What is malformed is the library's to refuse."""
    if not isinstance(step, Mapping):
        return 1, 0
    inner = next((step[name] for name in _INNER if isinstance(step.get(name), list)), None)
    if inner is not None:
        found = [_growth(one) for one in inner]
        # Neither more steps nor a larger product than tell that it is too much.
        product = prod(growth for growth, _ in found[: MAX_STEPS + 1])
        return min(product, MAX_GROWTH**2), 1 + sum(steps for _, steps in found)
    match step.get("type"):
        case "Replace":
            pattern = step.get("pattern")
            text = pattern.get("String") if isinstance(pattern, Mapping) else None
            size = _size(step.get("content"))
            # A regular expression, or nothing, may match between any two bytes.
            return (max(1, -(-size // _size(text))) if isinstance(text, str) and text else 1 + size), 1
        case "Prepend":
            return 1 + _size(step.get("prepend")), 1
        case "Precompiled":
            return _longest_replacement(step.get("precompiled_charsmap")), 1
        case "TemplateProcessing":
            single = step.get("single")
            pieces = single if isinstance(single, list) else []
            return max(1, sum(isinstance(piece, Mapping) and "Sequence" in piece for piece in pieces)), 1
    kind = step.get("type")
    return (_FIXED.get(kind, 1) if isinstance(kind, str) else 1), 1


def _size(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def _longest_replacement(charsmap: Any) -> int:
    """A trie of characters, its size before it, then what stands for each, with a zero after it (SentencePiece)."""
    try:
        blob = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return 1
    texts = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))
