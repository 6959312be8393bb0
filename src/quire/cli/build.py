"""`quire build`: from a model to an engine directory, which starts at once."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import quire
from quire.cli import banner, engines, model_path
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import DTYPES, GROUP_SIZES, QUANTIZATIONS, EngineArgs
from quire.errors import ConfigurationError, InvalidRequestError
from quire.outputs import Decision

if TYPE_CHECKING:
    from quire.build.builder import Target
    from quire.llm import LLM
    from quire.weights.formats.engine_dir import Golden

EXAMPLES = """examples:
  quire build DIR -o ENGINE --quantization int4
  quire build HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-int8 --quantization int8
  quire serve ENGINE

An engine directory holds the weights as this machine's instruction set reads them: they are mapped, not loaded, and two
processes share them. Limits (--max-num-seqs, --max-model-len, the cache) stay arguments of the verbs that run it."""
GOLDEN_TEXTS = ("The capital of France is", "def fibonacci(n):", "1 + 1 =", "引擎")
GOLDEN_TOKENS = 16
FALLBACK_PROMPT = 8
"""Token ids of the one golden prompt of a model without a tokenizer."""
PREFIX = "cpu-"


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"a directory of safetensors, a hub id, or {EMBEDDED_NAME}")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="where the engine will be")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="left out: the weights are not quantised")
    text = f"weights that share a scale with int4 (64) or int8 (a row): {', '.join(map(str, GROUP_SIZES))}"
    parser.add_argument("--quantization-group-size", type=int, choices=GROUP_SIZES, metavar="N", help=text)
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of weights that are not quantised, and the cache"
    )
    text = "auto (this machine's best), or cpu- and an instruction set that it runs: cpu-avx512, cpu-baseline ..."
    parser.add_argument("--target", default="auto", metavar="NAME", help=text)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    engines.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Build; say what was built and how long it took."""
    from quire.build.builder import Recipe, build_engine
    from quire.compose.served import find_model
    from quire.quant.select import check_scheme, select_scheme
    from quire.weights.loading_bar import LoadingBar

    begun_s = time.perf_counter()
    name = model_argument(options.model)
    model_path.check(name)
    args = EngineArgs(model=name, quantization=options.quantization, revision=options.revision, dtype=options.dtype)
    with _forced(options.target):
        target = _target(options.target)
        scheme = select_scheme(args.quantization, options.quantization_group_size)
        check_scheme(scheme, target.ops)
        recipe = Recipe(
            model=options.model,
            directory=find_model(args),
            output=options.output,
            version=quire.__version__,
            dtype=args.dtype,
            quantization=args.quantization,
            scheme=scheme,
        )
        with LoadingBar("Packing weights") as bar:
            manifest = build_engine(recipe, target, golden_answers, bar.show)
    if not options.quiet:
        size = sum(record.size for record in manifest.files.values()) / 2**20
        made = Decision("engine", f"{size:,.1f} MiB", f"in {time.perf_counter() - begun_s:.1f} s")
        checked = Decision("golden", f"{len(manifest.golden)} prompts", "quire verify asks them again")
        banner.show(options.output.name, [made, *target.decisions, checked], quiet=False)
    return 0


@contextmanager
def _forced(target: str) -> Iterator[None]:
    """The instruction set that a target names is the one that everything here takes."""
    before = os.environ.get("QUIRE_ISA")
    if target.startswith(PREFIX):
        os.environ["QUIRE_ISA"] = target.removeprefix(PREFIX)
    try:
        yield
    finally:
        os.environ.pop("QUIRE_ISA", None)
        if before is not None:
            os.environ["QUIRE_ISA"] = before


def _target(name: str) -> "Target":
    from quire.build.builder import Target
    from quire.ops.select import instruction_sets, select_ops

    known = [PREFIX + one for one in instruction_sets()]
    if name not in ("auto", *known):
        text = f"target must be auto or one that this machine runs ({', '.join(known)}), got {name[:40]!r}"
        raise ConfigurationError(text, field="target")
    ops, decisions = select_ops("cpu", None)
    return Target(ops, instruction_set_of(decisions), decisions)


def instruction_set_of(decisions: "Sequence[Decision]") -> str:
    """The one that was chosen."""
    return next(one.value for one in decisions if one.name == "instruction_set")


def golden_answers(directory: Path) -> "list[Golden]":
    """What the engine in `directory` answers, greedily, to a few prompts of any model."""
    from quire.weights.formats.engine_dir import Golden

    with open_engine(directory) as llm:
        name = instruction_set_of(llm.decisions)
        return [Golden(name, prompt, answer(llm, prompt, GOLDEN_TOKENS)) for prompt in _golden_prompts(llm)]


def open_engine(directory: Path) -> "LLM":
    """For one prompt at a time."""
    from quire.llm import LLM

    return LLM(model=str(directory), device="cpu", max_num_seqs=1, enable_prefix_caching=False)


def answer(llm: "LLM", prompt: list[int], num_tokens: int) -> list[int]:
    """The most likely tokens after a prompt."""
    from quire.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _golden_prompts(llm: "LLM") -> list[list[int]]:
    longest = max(1, llm.max_model_len - GOLDEN_TOKENS)
    with suppress(InvalidRequestError):
        tokenizer = llm.get_tokenizer()
        return [tokenizer.encode(text)[:longest] for text in GOLDEN_TEXTS]
    return [[number % llm.vocab_size for number in range(1, FALLBACK_PROMPT + 1)][:longest]]
