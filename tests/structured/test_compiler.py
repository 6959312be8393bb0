"""Grammars beside the step loop: what waits, what is kept, what is refused."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quire.core.request import GrammarSpec
from quire.errors import ShapeError
from quire.structured import compiler as module
from quire.structured.compiler import GrammarCompiler, Vocabulary
from quire.structured.source import source_of
from quire.structured_params import StructuredOutputsParams

TOKENS = [bytes((byte,)) for byte in range(256)] + [b"", b"yes", b"<end>", b"<no>"]
"""One token means nothing, one ends, one is special."""


def vocabulary() -> Vocabulary:
    return Vocabulary(
        TOKENS, special_token_ids=(258, 259), eos_token_ids=(258,), encode=lambda text: list(text.encode())
    )


def regex(pattern: str) -> str:
    return source_of(StructuredOutputsParams(regex=pattern))


def asking(source: str, max_tokens: int = 100) -> Any:
    grammar = GrammarSpec(source, max_tokens)
    return SimpleNamespace(new=SimpleNamespace(request_id=source, sampling=SimpleNamespace(grammar=grammar)))


def wait(grammars: GrammarCompiler, request: Any) -> None:
    while (reason := grammars.ready(request)) is not None:
        assert reason == "grammar"
        threading.Event().wait(0.01)


def test_a_request_waits_while_its_grammar_is_compiled() -> None:
    may_read = threading.Event()

    def read() -> Vocabulary:
        may_read.wait()
        return vocabulary()

    grammars = GrammarCompiler(read)
    assert grammars.ready(asking(regex("a"))) == "grammar"
    assert grammars.ready(SimpleNamespace(new=SimpleNamespace(sampling=SimpleNamespace(grammar=None)))) is None
    may_read.set()
    wait(grammars, asking(regex("a")))


def test_masks_have_a_bit_a_token() -> None:
    grammars = GrammarCompiler(vocabulary)
    matchers = [grammars.matcher("0", GrammarSpec(regex(pattern), 100)) for pattern in ("(yes|no)", "[0-9]", "x?")]
    masks = np.zeros((3, 9), np.uint32)
    grammars.fill_masks(matchers, masks)
    allowed = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() for row in masks]
    assert allowed == [sorted([ord("y"), ord("n"), 257]), list(range(ord("0"), ord("9") + 1)), [ord("x"), 258]]


def test_what_does_not_compile_and_what_does_not_fit_is_the_requests_own_fault() -> None:
    grammars = GrammarCompiler(vocabulary)
    with pytest.raises(ShapeError, match="structured_outputs cannot be compiled"):
        wait(grammars, asking("{}"))
    with pytest.raises(
        ShapeError, match="needs 6 tokens for its shortest answer with its end; 5 are allowed: raise max_tokens"
    ):
        wait(grammars, asking(regex("[ab]{5}"), 5))
    wait(grammars, asking(regex("[ab]{5}"), 6))


def test_what_is_kept_is_bounded_and_nothing_that_is_awaited_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_GRAMMARS", 3)
    grammars = GrammarCompiler(vocabulary)
    requests = [asking(regex(f"a{number}")) for number in range(12)]
    for request in requests:  # all are asked for before the first is there
        grammars.ready(request)
    for request in requests:
        wait(grammars, request)
    grammars.ready(asking(regex("b")))
    assert len(grammars._kept) <= 4 and len(grammars._started) == 12
    assert grammars._kept_bytes == sum(len(source) + 200 for source in grammars._kept)
