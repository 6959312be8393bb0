"""Flags of `quire build` that say more of the weights than one format for all: calibration, a budget, what is kept."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import FOUR_BITS, EngineArgs
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.build.calibrate.treat import Treatment

PACKAGED = ""
"""`--calibrate` without a file."""
MAX_BITS = 16.0


def add(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    text = "quantise by GPTQ on the inputs that a text gives each matrix: FILE, UTF-8, or the packaged text without one"
    parser.add_argument("--calibrate", nargs="?", const=PACKAGED, metavar="FILE", help=text)
    text = "with --calibrate and int4 or int4_min: average bits of a weight in linear layers, shared by measured loss"
    parser.add_argument("--bits", type=float, metavar="B", help=text)
    text = "tensors or modules that stay in --dtype: names in which * stands for anything ('*.o_proj', lm_head)"
    parser.add_argument("--keep", nargs="+", default=[], metavar="PATTERN", help=text)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be before anything is read.

    Raises:
        ConfigurationError: it names the flag.
    """
    for name in ("calibrate", "bits", "keep"):
        if getattr(options, name) not in (None, []) and options.quantization is None:
            raise ConfigurationError(f"{name} is for weights that are quantised: say --quantization too", field=name)
    if options.calibrate is not None and options.quantization == "fp8":
        raise ConfigurationError(
            "calibrate is for int8, int8_w8a8, int4 and int4_min; fp8 is rounded as it is", field="calibrate"
        )
    bits = options.bits
    if bits is None:
        return
    if not 0 < bits <= MAX_BITS:
        raise ConfigurationError(f"bits must be above 0 and at most {MAX_BITS:g}, got {bits:g}", field="bits")
    if options.calibrate is None or options.quantization not in FOUR_BITS:
        raise ConfigurationError(
            "bits are shared by measured loss: say --quantization int4 or int4_min, and --calibrate, too", field="bits"
        )


def treatment(options: argparse.Namespace, args: EngineArgs, path: Path) -> "Treatment | None":
    """What is asked for of the model at `path`; None where nothing is.

    Raises:
        ConfigurationError: the text cannot be used, or the model has no tokenizer.
    """
    if options.calibrate is None and not options.keep:
        return None
    from quire.build.calibrate.text import PACKAGED as FILE
    from quire.build.calibrate.text import read_contexts
    from quire.build.calibrate.treat import Treatment

    contexts = None
    if options.calibrate is not None:
        from quire.compose.text import compose_text
        from quire.weights.load import read_model_config

        longest = read_model_config(path).spec.max_position_embeddings
        tokenizer = compose_text(args, path).tokenizer
        if tokenizer is None:
            raise ConfigurationError("calibrate: the model has no tokenizer to read a text with", field="calibrate")
        file = FILE if options.calibrate == PACKAGED else Path(options.calibrate)
        contexts = read_contexts(file, tokenizer.encode, longest)
    return Treatment(contexts, options.bits, options.keep, options.quantization_group_size, options.quiet)
