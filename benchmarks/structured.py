"""What answers held to a schema cost: compiling, the masks of each token, and forced tokens, by vocabulary.

    python benchmarks/structured.py SCHEMAS TOKENIZER...

SCHEMAS is a folder of files as MaskBench has them (`schema`, `tests: [{valid, data}]`); each TOKENIZER a folder with a
tokenizer.json. Every valid instance is followed token by token, as serving would. Times are of one thread.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quire.core.request import GrammarSpec
from quire.errors import InvalidRequestError, ShapeError
from quire.structured.compiler import GrammarCompiler, Vocabulary
from quire.structured.source import source_of, validate
from quire.structured_params import StructuredOutputsParams
from quire.text.tokenizer import Tokenizer

MAX_TOKENS = 2**20


def main() -> None:
    """Print one block of figures for each tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("schemas", type=Path)
    parser.add_argument("tokenizers", type=Path, nargs="+")
    parser.add_argument("--most", type=int, help="of the schemas (default: all)")
    options = parser.parse_args()
    files = sorted(options.schemas.glob("*.json"))[: options.most]
    cases = [json.loads(file.read_text()) for file in files]
    for path in options.tokenizers:
        measure(path, cases)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """All tokens, as a grammar sees them."""
    size, eos = tokenizer.vocab_size, tokenizer.eos_token_id
    return Vocabulary(
        tokens=[tokenizer.token_bytes(token_id) for token_id in range(size)],
        special_token_ids=sorted(tokenizer.special_token_ids),
        eos_token_ids=(size - 1 if eos is None else eos,),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )


class Run:
    """All cases over one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        begun = time.perf_counter()
        vocabulary = vocabulary_of(tokenizer)
        self.grammars = GrammarCompiler(lambda: vocabulary)
        self.grammars.matcher("0", GrammarSpec(source_of(StructuredOutputsParams(regex="a")), MAX_TOKENS))
        self.read_s = time.perf_counter() - begun
        self.bits = np.zeros((1, -(-tokenizer.vocab_size // 32)), np.uint32)
        self.seconds: dict[str, list[float]] = {"check": [], "compile": [], "mask": [], "follow": []}
        self.counts = Counter[str]()

    def try_case(self, case: dict[str, Any]) -> None:
        """One schema and its instances."""
        params = StructuredOutputsParams(json=json.dumps(case["schema"]))
        begun = time.perf_counter()
        try:
            source = source_of(params)
            validate(source, params)
            checked = time.perf_counter()
            spec = GrammarSpec(source, MAX_TOKENS)
            self.grammars.matcher("0", spec)
        except (InvalidRequestError, ShapeError):
            self.counts["refused"] += 1
            return
        self.seconds["check"].append(checked - begun)
        self.seconds["compile"].append(time.perf_counter() - checked)
        for test in case["tests"]:
            is_answer = self.follow(spec, json.dumps(test["data"], ensure_ascii=False))
            self.counts["wrong accepts"] += is_answer and not test["valid"]
            self.counts["wrong rejects"] += test["valid"] and not is_answer

    def follow(self, spec: GrammarSpec, text: str) -> bool:
        """Whether the text is an answer."""
        matcher = self.grammars.matcher("0", spec)
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            self.counts["tokens"] += 1
            self.counts["forced"] += bool(matcher.forced)
            before = time.perf_counter()
            self.grammars.fill_masks([matcher], self.bits)
            after = time.perf_counter()
            self.seconds["mask"].append(after - before)
            if not self.bits[0, token_id // 32] >> np.uint32(token_id % 32) & 1:
                return False
            if not matcher.forced:
                matcher.decide(token_id)
            matcher.consume(token_id)
            self.seconds["follow"].append(time.perf_counter() - after)
        return matcher.is_complete


def measure(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Print one block."""
    run = Run(Tokenizer.from_directory(path))
    for case in cases:
        run.try_case(case)
    counts = ", ".join(f"{count:,} {name}" for name, count in run.counts.items())
    print(f"{path}: {run.tokenizer.vocab_size:,} tokens, read in {run.read_s:.2f} s; {len(cases)} schemas: {counts}")
    for name, values in run.seconds.items():
        print(f"  {name:8} {summary(values)}")


def summary(values: Iterable[float]) -> str:
    """Microseconds."""
    found = np.sort(np.fromiter(values, np.float64)) * 1e6
    places = {"p50": 0.5, "p99": 0.99}
    texts = [f"{name} {found[int(place * (len(found) - 1))]:9,.0f}" for name, place in places.items()]
    return "   ".join([*texts, f"max {found[-1]:9,.0f}", f"mean {found.mean():9,.1f} us", f"of {len(found):,}"])


if __name__ == "__main__":
    main()
