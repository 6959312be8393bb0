"""`quire grammar check`: whether a shape can be held, and which texts it lets through."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quire.cli import shape
from quire.cli.arguments import Parser
from quire.errors import InvalidRequestError, ShapeError
from quire.structured_params import StructuredOutputsParams

if TYPE_CHECKING:
    from quire.core.request import GrammarSpec
    from quire.structured.compiler import GrammarCompiler
    from quire.structured.matcher import Matcher
    from quire.text.tokenizer import Tokenizer

EXAMPLES = """examples:
  quire grammar check --json-schema person.json '{"name": "Ann"}' @answer.json
  quire grammar check --regex '[0-9]{3}-[0-9]{4}' 555-0100
  quire grammar check --grammar arithmetic.gbnf --tokenizer DIR '1+(2*3)'
  quire grammar check --yaml-schema person.json $'name: Ann\nage: 36' @answer.yaml
  quire grammar check --choice yes no --json maybe

Instances are fed, token by token, to the matcher and the masks that serving uses. Exit codes: 0 all accepted, 1 some
rejected, 2 the shape is refused."""
MAX_SHOWN = 12
"""Tokens named where others were allowed."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    checks = parser.add_subparsers(dest="action", metavar="check", required=True, parser_class=Parser)
    check = checks.add_parser("check", help="compile a shape and try instances", allow_abbrev=False)
    shape.add(check, required=True)
    check.add_argument("--tokenizer", metavar="MODEL", help="whose tokens to use (default: the embedded model's)")
    check.add_argument("--json", action="store_true", help="one JSON object a line for each instance")
    check.add_argument(
        "instances", nargs="*", metavar="INSTANCE", help="a text; @FILE is a file's text, - a text each line"
    )


def run(options: argparse.Namespace) -> int:
    """Compile, then try every instance."""
    try:
        params = shape.read(options)
        assert params is not None, "argparse asks for one"
        grammars, tokenizer, grammar = _compiled(options, params)
        shortest = grammars.shortest(grammar.source)
    except (InvalidRequestError, ShapeError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    if not options.json:
        print(*_description(params, tokenizer, shortest), sep="\n")
    is_all_right = True
    for instance in _instances(options.instances):
        reason = rejection(grammars, tokenizer, grammars.matcher("check", grammar), instance)
        is_all_right &= reason is None
        if options.json:
            found = {"instance": instance, "accepted": reason is None, "reason": reason}
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            print(
                f"{'accepted' if reason is None else 'rejected'}  {instance}"
                + (f"\n          {reason}" if reason else "")
            )
    return 0 if is_all_right else 1


def rejection(grammars: "GrammarCompiler", tokenizer: "Tokenizer", matcher: "Matcher", text: str) -> str | None:
    """Why `text` is no answer, or None."""
    import numpy as np

    masks = np.zeros((1, -(-grammars.vocab_size // 32)), np.uint32)
    before = 0
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        grammars.fill_masks([matcher], masks)
        if not masks[0, token_id // 32] >> np.uint32(token_id % 32) & 1:
            allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
            shown = [tokenizer.token_text(int(one)) for one in allowed[:MAX_SHOWN]]
            more = f" and {len(allowed) - MAX_SHOWN:,} more" if len(allowed) > MAX_SHOWN else ""
            return (
                f"at byte {before} the token {tokenizer.token_text(token_id)!r} is not allowed; "
                f"allowed there: {', '.join(map(repr, shown)) or 'nothing'}{more}"
            )
        matcher.consume(token_id)
        before += len(tokenizer.token_bytes(token_id))
    return None if matcher.is_complete else f"it ends at byte {before}, where the answer is not complete"


def _compiled(
    options: argparse.Namespace, params: StructuredOutputsParams
) -> "tuple[GrammarCompiler, Tokenizer, GrammarSpec]":
    from quire.compose.served import find_model
    from quire.compose.structured import grammar_compiler, shape_checker
    from quire.compose.text import compose_text
    from quire.config import EngineArgs
    from quire.core.request import GrammarSpec

    args = EngineArgs(model=options.tokenizer)
    path = find_model(args)
    tokenizer = compose_text(args, path).tokenizer
    checker, grammars = (
        shape_checker(),
        None if tokenizer is None else grammar_compiler(args, path, tokenizer.vocab_size),
    )
    if checker is None or grammars is None or tokenizer is None:
        raise InvalidRequestError("quire.structured, or a tokenizer, is missing")
    try:
        with shape.named():
            return grammars, tokenizer, GrammarSpec(checker.source(params), 2**31 - 1)
    finally:
        checker.close()


def _description(
    params: StructuredOutputsParams, tokenizer: "Tokenizer", shortest: Sequence[int] | None
) -> Iterator[str]:
    given = next(name for name, kind in shape.KINDS.items() if kind == params.kind)
    if params.grammar is not None:
        from quire.structured.source import is_gbnf

        given = f"grammar in {'GBNF' if is_gbnf(params.grammar) else 'Lark'}"
    yield f"held: {given.replace('_', ' ')}"
    if shortest is None:
        yield "shortest answer: none was found; answers may be cut off by max_tokens"
    else:
        text = b"".join(map(tokenizer.token_bytes, shortest)).decode("utf-8", "replace")
        yield f"shortest answer: {text} ({len(shortest) + 1} tokens with its end)"


def _instances(given: list[str]) -> Iterator[str]:
    for item in given:
        if item == "-":
            yield from (line.rstrip("\n") for line in sys.stdin)
        else:
            yield shape.text_of(item[1:]).rstrip("\n") if item.startswith("@") else item
