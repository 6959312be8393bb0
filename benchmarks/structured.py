"""What answers held to a schema cost: compiling, the masks of each token, and forced tokens, by vocabulary.

    python benchmarks/structured.py SCHEMAS TOKENIZER...

SCHEMAS is a folder of files as MaskBench has them (`schema`, `tests: [{valid, data}]`); each TOKENIZER a folder with a
tokenizer.json. Every valid instance is followed token by token, as serving would. Times are of one thread.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

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


def measure(path: Path, cases: list[dict[str, object]]) -> None:
    """All cases over one vocabulary."""
    tokenizer = Tokenizer.from_directory(path)
    size = tokenizer.vocab_size
    eos = tokenizer.eos_token_id
    vocabulary = Vocabulary(
        tokens=[tokenizer.token_bytes(token_id) for token_id in range(size)],
        special_token_ids=sorted(tokenizer.special_token_ids),
        eos_token_ids=(size - 1 if eos is None else eos,),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
    grammars = GrammarCompiler(lambda: vocabulary)
    begun = time.perf_counter()
    grammars.matcher(GrammarSpec(source_of(StructuredOutputsParams(regex="a")), MAX_TOKENS))
    read_s = time.perf_counter() - begun
    checks, compiles, masks, follows = [], [], [], []
    refused = wrong_accepts = wrong_rejects = num_forced = num_tokens = 0
    bits = np.zeros((1, -(-size // 32)), np.uint32)
    for case in cases:
        params = StructuredOutputsParams(json=json.dumps(case["schema"]))
        begun = time.perf_counter()
        try:
            source = source_of(params)
            validate(source, params)
            checked = time.perf_counter()
            spec = GrammarSpec(source, MAX_TOKENS)
            grammars.matcher(spec)
        except (InvalidRequestError, ShapeError):
            refused += 1
            continue
        checks.append(checked - begun)
        compiles.append(time.perf_counter() - checked)
        for test in case["tests"]:  # type: ignore[attr-defined]
            matcher, is_answer = grammars.matcher(spec), True
            for token_id in tokenizer.encode(json.dumps(test["data"], ensure_ascii=False), add_special_tokens=False):
                num_tokens += 1
                num_forced += bool(matcher.forced)
                before = time.perf_counter()
                grammars.fill_masks([matcher], bits)
                after = time.perf_counter()
                masks.append(after - before)
                if not bits[0, token_id // 32] >> np.uint32(token_id % 32) & 1:
                    is_answer = False
                    break
                if not matcher.forced:
                    matcher.decide(token_id)
                matcher.consume(token_id)
                follows.append(time.perf_counter() - after)
            is_answer = is_answer and matcher.is_complete
            wrong_accepts += is_answer and not test["valid"]
            wrong_rejects += test["valid"] and not is_answer
    print(f"{path.name}: {size:,} tokens, read in {read_s:.2f} s; {len(cases)} schemas, {refused} refused, "
          f"{wrong_accepts} wrong accepts, {wrong_rejects} wrong rejects, {num_forced:,} of {num_tokens:,} tokens forced")  # fmt: skip
    for name, values in (("check", checks), ("compile", compiles), ("mask", masks), ("follow", follows)):
        print(f"  {name:8} {summary(values)}")


def summary(values: Iterable[float]) -> str:
    """Microseconds."""
    found = np.sort(np.fromiter(values, np.float64)) * 1e6
    places = {"p50": 0.5, "p99": 0.99}
    texts = [f"{name} {found[int(place * (len(found) - 1))]:9,.0f}" for name, place in places.items()]
    return "   ".join([*texts, f"max {found[-1]:9,.0f}", f"mean {found.mean():9,.1f} us", f"of {len(found):,}"])


if __name__ == "__main__":
    main()
