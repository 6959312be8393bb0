"""From flags to a running engine: shared by the verbs that answer."""

import argparse
from contextlib import suppress
from pathlib import PurePath
from typing import TYPE_CHECKING

from quire.cli import banner
from quire.cli.arguments import engine_values, sampling_values
from quire.config import EngineArgs
from quire.sampling_params import FROM_MODEL, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from quire.llm import AsyncLLM

EMBEDDED_NAME = "quire-demo"


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, for every verb that shows the banner."""
    parser.add_argument("--quiet", action="store_true", help="no banner")


def model_name(args: EngineArgs) -> str:
    """What the model is called when nothing else was asked: the last part of its directory or hub id."""
    if args.model is None:
        return EMBEDDED_NAME
    return PurePath(args.model.rstrip("/")).name or args.model


def start(options: argparse.Namespace, *, num_seqs: int) -> "tuple[AsyncLLM, EngineArgs]":
    """An engine as the flags describe it, with its banner.

    Args:
        num_seqs: sequences that the verb computes at a time; unless a flag says otherwise, the cache is sized for them.

    Raises:
        ConfigurationError: naming the flag or the file at fault.
    """
    args = EngineArgs.from_mapping({"max_num_seqs": num_seqs, **engine_values(options)})
    from quire.llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(args)
    banner.show(model_name(args), engine.decisions, quiet=options.quiet)
    return engine, args


def make_params(options: argparse.Namespace, defaults: SamplingParams, *, kind: RequestOutputKind) -> SamplingParams:
    """The model's own settings, what was given over them; no bound on the answer but the context's.

    Raises:
        InvalidRequestError: a value out of range.
    """
    values = {name: getattr(defaults, name) for name in FROM_MODEL}
    return SamplingParams.from_mapping({**values, "max_tokens": None, **sampling_values(options), "output_kind": kind})


def has_chat_template(engine: "AsyncLLM") -> bool:
    """True when the model says how a conversation is written."""
    with suppress(ValueError):
        return engine.get_tokenizer().has_chat_template
    return False
