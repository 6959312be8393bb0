"""`quire build`: from a model to an engine directory, which starts at once."""

import argparse
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import quire
from quire.cli import banner, calibration, engines, model_path, target
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import DTYPES, GROUP_SIZES, QUANTIZATIONS, EngineArgs
from quire.errors import ConfigurationError, InvalidRequestError
from quire.outputs import Decision

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.weights.formats.engine_dir import Golden

EXAMPLES = """examples:
  quire build DIR -o ENGINE --quantization int4
  quire build DIR -o ENGINE --quantization int4 --calibrate --bits 5
  quire build HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-int8 --quantization int8
  quire build smollm2 -o smollm2-engine
  quire build ENGINE --repack --target cpu-avx2 -o ELSEWHERE
  quire serve ENGINE

An engine directory holds the weights as this machine's instruction set reads them: they are mapped, not loaded, and two
processes share them. Limits (--max-num-seqs, --max-model-len, the cache) stay arguments of the verbs that run it."""
GOLDEN_TEXTS = ("The capital of France is", "def fibonacci(n):", "1 + 1 =", "引擎")
GOLDEN_TOKENS = 16
_MODEL = (
    f"a directory of safetensors, a GGUF file, a hub id, smollm2 or {EMBEDDED_NAME}; with --repack an engine directory"
)
FALLBACK_PROMPT = 8
"""Token ids of the one golden prompt of a model without a tokenizer."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="where the engine will be")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="left out: the weights are not quantised")
    text = f"weights that share a scale with int4, int4_min (64) or int8 (a row): {', '.join(map(str, GROUP_SIZES))}"
    parser.add_argument("--quantization-group-size", type=int, choices=GROUP_SIZES, metavar="N", help=text)
    calibration.add(parser)
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of weights that are not quantised, and the cache"
    )
    text = "refused: the cache is not built, the verbs that run an engine take it"
    parser.add_argument("--kv-cache-dtype", metavar="NAME", help=text)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="must be 1 in this version")
    parser.add_argument("--target", default="auto", metavar="NAME", help=target.HELP)
    text = "MODEL is an engine directory: its weights as they are, packed for another instruction set"
    parser.add_argument("--repack", action="store_true", help=text)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    engines.add_quiet(parser)


def run(options: argparse.Namespace) -> int:
    """Build; say what was built and how long it took."""
    from quire.build.builder import Recipe, build_engine
    from quire.compose.served import find_model
    from quire.quant.select import scheme_for, select_scheme
    from quire.weights.loading_bar import LoadingBar

    begun_s = time.perf_counter()
    name = model_argument(options.model)
    model_path.check(name)
    _check_repack(options)
    if options.kv_cache_dtype is not None:
        text = f"kv_cache_dtype is no part of an engine: quire serve {options.output} --kv-cache-dtype chooses it"
        raise ConfigurationError(text, field="kv_cache_dtype")
    calibration.check(options)
    args = EngineArgs(
        model=name,
        quantization=options.quantization,
        revision=options.revision,
        dtype=options.dtype,
        tensor_parallel_size=options.tensor_parallel_size,
    )
    with target.building_for(options.target) as built_for:
        scheme = scheme_for(select_scheme(args.quantization, options.quantization_group_size), built_for.ops)
        directory = find_model(args)
        recipe = Recipe(
            model=options.model,
            directory=directory,
            output=options.output,
            version=quire.__version__,
            dtype=args.dtype,
            quantization=args.quantization,
            scheme=scheme,
            repack=options.repack,
            treatment=calibration.treatment(options, args, directory),
        )
        with LoadingBar("Packing weights", lines=True, is_quiet=options.quiet) as bar:
            manifest = build_engine(recipe, built_for, golden_answers, bar.show)
    if not options.quiet:
        size = sum(record.size for record in manifest.files.values()) / 2**20
        made = Decision("engine", f"{size:,.1f} MiB", f"in {time.perf_counter() - begun_s:.1f} s")
        sets = (
            ", ".join(sorted({one.instruction_set for one in manifest.golden})) or "no instruction set of this machine"
        )
        checked = Decision("golden", f"{len(manifest.golden)} prompts", f"of {sets}; quire verify asks them again")
        banner.show(options.output.name, [made, *built_for.decisions, checked], quiet=False)
    return 0


def _check_repack(options: argparse.Namespace) -> None:
    """What an engine was built with stays.

    Raises:
        ConfigurationError: a flag asks for something else.
    """
    flags = ("quantization", "quantization_group_size", "revision", "calibrate", "bits", "keep")
    asked = [name for name in flags if getattr(options, name) not in (None, [])]
    asked += [] if options.dtype == "auto" else ["dtype"]
    if options.repack and asked:
        text = f"{asked[0]} goes with a checkpoint: --repack keeps the weights of an engine as they were quantised"
        raise ConfigurationError(text, field=asked[0])


def golden_answers(directory: Path) -> "list[Golden]":
    """What the engine in `directory` answers, greedily, to a few prompts of any model."""
    from quire.weights.formats.engine_dir import Golden

    with open_engine(directory) as llm:
        name = target.instruction_set_of(llm.decisions)
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
