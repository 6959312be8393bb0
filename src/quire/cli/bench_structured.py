"""`quire bench structured`: what answers held to a shape cost: compiling, masks by vocabulary, time per token with and
without a shape, and what forced text saves."""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import banner, engines, model_path
from quire.cli.arguments import add_engine, engine_values
from quire.config import EngineArgs
from quire.errors import ConfigurationError, InvalidRequestError, ShapeError

if TYPE_CHECKING:
    from quire.core.request import GrammarSpec
    from quire.llm import LLM
    from quire.text.tokenizer import Tokenizer

MAX_TOKENS = 2**20
TOKENS = 96
PROMPT_TOKENS = 31
KEYS = [f"a description of part number {number}" for number in range(6)]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
OBJECT = {"type": "object", "properties": dict.fromkeys(KEYS, DIGIT), "required": KEYS, "additionalProperties": False}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "free": ({"ignore_eos": True, "max_tokens": TOKENS}, None),
    "letters": ({"min_tokens": TOKENS, "max_tokens": TOKENS + 1}, {"regex": "[a-z ]*"}),
    "keys": ({"max_tokens": 400}, {"json": OBJECT, "disable_any_whitespace": True}),
    "keys, one by one": ({"max_tokens": 400, "logprobs": 0}, {"json": OBJECT, "disable_any_whitespace": True}),
}
"""Name -> sampling parameters, and the shape. With log-probabilities each token of a text that is forced is sampled."""
HOW = """masks: every instance is followed token by token, as serving would; microseconds, of one thread
speed: greedy, all rows at once, modes in turns; medians, with the least and the most
  free               nothing is asked of the answer
  letters            letters and spaces: a mask for every token, nothing forced
  keys               a JSON object with long keys, whose text is forced: no step for each of its tokens
  keys, one by one   the same with log-probabilities, for which each token is sampled"""


def add(kinds: Any) -> None:
    """The flags."""
    kind = kinds.add_parser("structured", help="answers held to a shape: masks, compiling, speed", allow_abbrev=False)
    text = "schemas with instances, one file each, as MaskBench has them; left out: no masks are timed"
    kind.add_argument("--schemas", type=Path, metavar="FOLDER", help=text)
    kind.add_argument("--most", type=int, metavar="N", help="of the schemas (default: all)")
    text = "folders with a tokenizer.json, whose vocabularies masks are timed for beside the model's own"
    kind.add_argument("--vocabularies", nargs="+", type=Path, default=[], metavar="DIR", help=text)
    text = "requests at once (default: 1 8 32); without a number, speed is not measured"
    kind.add_argument("--rows", nargs="*", type=int, default=[1, 8, 32], metavar="N", help=text)
    kind.add_argument("--reps", type=int, default=3, metavar="N", help="runs of each mode (default: 3)")
    kind.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures there")
    engines.add_quiet(kind)
    add_engine(kind)


def run(options: argparse.Namespace) -> int:
    """Print both tables."""
    from importlib.metadata import version

    from quire.bench import machine
    from quire.compose.served import find_model

    if options.reps < 1 or min(options.rows, default=1) < 1:
        raise ConfigurationError("reps and rows must be at least 1", field="reps")
    args = EngineArgs.from_mapping(engine_values(options))
    model_path.check(args.model)
    cases = [] if options.schemas is None else read_cases(options.schemas, options.most)
    facts = machine.describe() | {"llguidance": version("llguidance"), "model": engines.model_name(args)}
    found: dict[str, Any] = {"masks": [], "speed": []}
    print(*(f"{name}: {value}" for name, value in facts.items()), _load(), HOW, sep="\n")
    for directory in [find_model(args), *options.vocabularies] if cases else []:
        found["masks"].append(one := MaskRun.over(directory, cases))
        print(*mask_lines(one), sep="\n", flush=True)
    if options.rows:
        found["speed"] = measure_speed(engine_values(options), options)
    print(_load())
    if options.output_json is not None:
        options.output_json.write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")
    return 0


def _load() -> str:
    import os

    return f"load of this machine: {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors"


def read_cases(folder: Path, most: int | None) -> list[dict[str, Any]]:
    """`{schema, tests: [{valid, data}]}` each.

    Raises:
        ConfigurationError: there are none, or a file is none.
    """
    try:
        cases = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))[:most]]
        if cases and all("schema" in case and "tests" in case for case in cases):
            return cases
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"--schemas: {type(error).__name__} in {folder}", field="schemas") from error
    raise ConfigurationError(f"--schemas: {folder} holds no files with `schema` and `tests`", field="schemas")


class MaskRun:
    """All cases over one vocabulary."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        import numpy as np

        from quire.structured.compiler import GrammarCompiler, Vocabulary

        size, eos = tokenizer.vocab_size, tokenizer.eos_token_id
        vocabulary = Vocabulary(
            tokens=[tokenizer.token_bytes(token_id) for token_id in range(size)],
            special_token_ids=sorted(tokenizer.special_token_ids),
            eos_token_ids=(size - 1 if eos is None else eos,),
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        )
        self._tokenizer = tokenizer
        self._grammars = GrammarCompiler(lambda: vocabulary)
        self._bits = np.zeros((1, -(-size // 32)), np.uint32)
        self.seconds: dict[str, list[float]] = {"check": [], "compile": [], "mask": [], "follow": []}
        self.counts: Counter[str] = Counter(
            right_accepts=0, right_rejects=0, wrong_accepts=0, wrong_rejects=0, refused=0
        )

    @classmethod
    def over(cls, directory: Path, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures of one vocabulary."""
        from quire.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_directory(directory)
        self = cls(tokenizer)
        for case in cases:
            self._try(case)
        times = {name: spread(values) for name, values in self.seconds.items() if values}
        head = {"vocabulary": str(directory), "tokens": tokenizer.vocab_size, "schemas": len(cases)}
        return {**head, "counts": dict(self.counts), "us": times}

    def _try(self, case: dict[str, Any]) -> None:
        from quire.core.request import GrammarSpec
        from quire.structured.source import source_of, validate
        from quire.structured_params import StructuredOutputsParams

        begun = time.perf_counter()
        try:
            params = StructuredOutputsParams(json=json.dumps(case["schema"]))
            source = source_of(params)
            validate(source, params)
            checked = time.perf_counter()
            spec = GrammarSpec(source, MAX_TOKENS)
            self._grammars.matcher("0", spec)
        except (InvalidRequestError, ShapeError):
            self.counts["refused"] += 1
            return
        self.seconds["check"].append(checked - begun)
        self.seconds["compile"].append(time.perf_counter() - checked)
        for test in case["tests"]:
            is_answer = self._follow(spec, json.dumps(test["data"], ensure_ascii=False))
            right = "right" if is_answer == test["valid"] else "wrong"
            self.counts[f"{right}_{'accepts' if is_answer else 'rejects'}"] += 1

    def _follow(self, spec: "GrammarSpec", text: str) -> bool:
        matcher = self._grammars.matcher("0", spec)
        for token_id in self._tokenizer.encode(text, add_special_tokens=False):
            self.counts["forced"] += bool(matcher.forced)
            before = time.perf_counter()
            self._grammars.fill_masks([matcher], self._bits)
            after = time.perf_counter()
            self.seconds["mask"].append(after - before)
            if not int(self._bits[0, token_id // 32]) >> token_id % 32 & 1:
                return False
            if not matcher.forced:
                matcher.decide(token_id)
            matcher.consume(token_id)
            self.seconds["follow"].append(time.perf_counter() - after)
        return matcher.is_complete


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of times, in microseconds."""
    import numpy as np

    found = np.sort(np.asarray(seconds)) * 1e6
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    figures = {name: round(float(found[int(place * (len(found) - 1))]), 1) for name, place in places.items()}
    return {**figures, "mean": round(float(found.mean()), 1), "n": len(found)}


def mask_lines(found: dict[str, Any]) -> Iterator[str]:
    """One block of text."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in found["counts"].items())
    yield f"\n{found['vocabulary']}: {found['tokens']:,} tokens; {found['schemas']} schemas; {counts}"
    for name, figures in found["us"].items():
        yield f"  {name:8} " + "   ".join(f"{key} {value:>9,}" for key, value in figures.items())


def measure_speed(values: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a token of a row, and steps a token, printed as they come."""
    from quire.llm import LLM

    found = []
    with LLM(**{"max_num_seqs": max(options.rows), **values}) as llm:
        banner.show(engines.model_name(EngineArgs.from_mapping(values)), llm.decisions, quiet=options.quiet)
        print(f"\n{'rows':>4}  {'mode':18} {'ms/token':>9} {'least':>8} {'most':>8} {'of free':>8} {'steps/token':>11}")
        for mode in MODES:
            one_run(llm, mode, 1)  # compiles, and touches the memory
        for rows in options.rows:
            runs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
            for _ in range(options.reps):
                for mode, pairs in runs.items():
                    pairs.append(one_run(llm, mode, rows))
            free = statistics.median(seconds for seconds, _ in runs["free"])
            for mode, pairs in runs.items():
                times, steps = zip(*pairs, strict=True)
                figures = [1000 * one for one in (statistics.median(times), min(times), max(times))]
                of_free, of_steps = statistics.median(times) / free, statistics.median(steps)
                shown = " ".join(f"{one:8.2f}" for one in figures)
                print(f"{rows:4}  {mode:18}  {shown} {of_free:8.2f} {of_steps:11.2f}", flush=True)
                found.append({"rows": rows, "mode": mode, "ms": [1000 * one for one in times], "steps": of_steps})
    return found


def one_run(llm: "LLM", mode: str, rows: int) -> tuple[float, float]:
    """Seconds by tokens of the longest row, and steps by them."""
    from quire.sampling_params import SamplingParams
    from quire.structured_params import StructuredOutputsParams

    limits, shape = MODES[mode]
    held = None if shape is None else StructuredOutputsParams(**shape)
    params = SamplingParams(temperature=0.0, structured_outputs=held, **limits)
    ids = [[(100 + row) % llm.vocab_size, *range(200, 199 + PROMPT_TOKENS)] for row in range(rows)]
    before, begun = _num_steps(llm), time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    longest = max(len(output.outputs[0].token_ids) for output in outputs)
    return seconds / longest, (_num_steps(llm) - before) / longest


def _num_steps(llm: "LLM") -> float:
    """Of the core so far."""
    return next(item.value for item in llm.get_metrics() if item.name == "quire:iteration_tokens_total")
