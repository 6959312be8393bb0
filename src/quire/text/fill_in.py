"""Filling in the middle: what stands before and behind a gap, as models that were trained for it read it.

Each form is named by its tokens; a tokenizer that has them all has the form. Sources: Bavarian et al. (arXiv
2207.14255, PSM), and the model cards of SantaCoder, StarCoder, Qwen2.5-Coder, CodeGemma and DeepSeek-Coder.
"""

from typing import TYPE_CHECKING, NamedTuple

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from quire.text.tokenizer import Tokenizer


class Form(NamedTuple):
    """Tokens before the text in front of the gap, before the text behind it, and where the answer begins."""

    prefix: str
    suffix: str
    middle: str


FORMS = (
    Form("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    Form("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    Form("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    Form("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
"""Those of tokenizers that put no space of their own before a text: there the two texts are encoded as they stand."""


def encode_gap(tokenizer: "Tokenizer", prefix: str, suffix: str, *, add_special_tokens: bool) -> list[int]:
    """The tokens of a prompt whose answer stands between two texts.

    Args:
        add_special_tokens: begin with the tokenizer's BOS, where it begins prompts so.

    Raises:
        InvalidRequestError: the tokenizer has none of the forms.
    """
    for form in FORMS:
        ids = [tokenizer.token_id(text) for text in form]
        if None in ids:
            continue
        before, behind = (tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix))
        begun = tokenizer.encode("", add_special_tokens=True)[:1] if add_special_tokens else []
        start = begun if begun == [tokenizer.bos_token_id] else []
        marks = [item for item in ids if item is not None]
        return [*start, marks[0], *before, marks[1], *behind, marks[2]]
    text = "suffix is not supported: the tokenizer of this model has no tokens for filling in the middle"
    raise InvalidRequestError(text, param="suffix")
