"""Answers held to a shape, if this installation has `quire.structured`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quire.compose.text import compose_text
from quire.config import EngineArgs
from quire.errors import ShapeError

if TYPE_CHECKING:
    from quire.structured.checker import ShapeChecker
    from quire.structured.compiler import GrammarCompiler, Vocabulary


def shape_checker() -> "ShapeChecker | None":
    """For the side that knows text."""
    if find_spec("quire.structured") is None:
        return None
    from quire.structured.checker import ShapeChecker

    return ShapeChecker()


def grammar_compiler(args: EngineArgs, path: Path, vocab_size: int) -> "GrammarCompiler | None":
    """For the side that computes. The vocabulary is read when the first grammar comes."""
    if find_spec("quire.structured") is None:
        return None
    # Not above: both bring numpy, which the side that knows text can do without.
    from quire.ops.select import core_processors
    from quire.structured.compiler import GrammarCompiler

    threads = args.threads or len(core_processors())
    return GrammarCompiler(lambda: _vocabulary(args, path, vocab_size), threads)


def _vocabulary(args: EngineArgs, path: Path, vocab_size: int) -> "Vocabulary":
    from quire.structured.compiler import Vocabulary

    text = compose_text(args, path)
    tokenizer = text.tokenizer
    if tokenizer is None or not text.eos_token_ids:
        raise ShapeError("needs a tokenizer with an end of sequence, which this model lacks")
    return Vocabulary(
        tokens=[tokenizer.token_bytes(token_id) for token_id in range(vocab_size)],
        special_token_ids=sorted(tokenizer.special_token_ids),
        eos_token_ids=text.eos_token_ids,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
