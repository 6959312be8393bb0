"""From flags to a running engine: shared by the verbs that answer."""

import argparse
from contextlib import suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from quire.cli import banner, model_path, sampling
from quire.cli.arguments import EMBEDDED_NAME, engine_values, sampling_values
from quire.config import EngineArgs

if TYPE_CHECKING:
    from quire.llm import AsyncLLM


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`, for every verb that shows the banner."""
    parser.add_argument("--quiet", action="store_true", help="no banner")


def model_name(args: EngineArgs) -> str:
    """What the model is called when nothing else was asked: the last part of its directory or hub id."""
    if args.model is None:
        return EMBEDDED_NAME
    return PurePath(args.model.rstrip("/")).name or args.model


def start(options: argparse.Namespace, *, num_seqs: int) -> "tuple[AsyncLLM, EngineArgs, dict[str, Any]]":
    """An engine as the flags describe it, with its banner, and the sampling parameters that apply: as for a person,
    with no bound on the answer but the context's.

    Args:
        num_seqs: sequences that the verb computes at a time; unless a flag says otherwise, the cache is sized for them.

    Raises:
        ConfigurationError: naming the flag or the file at fault.
        InvalidRequestError: a sampling flag out of range, before anything is loaded.
    """
    given = sampling_values(options)
    sampling.check(given)
    args = EngineArgs.from_mapping({"max_num_seqs": num_seqs, **engine_values(options)})
    model_path.check(args.model)
    from quire.llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(args)
    values, decisions = sampling.resolve(given, engine.stated_sampling, min_p=sampling.MIN_P)
    banner.show(model_name(args), [*engine.decisions, *decisions], quiet=options.quiet)
    return engine, args, {"max_tokens": None, **values}


def has_chat_template(engine: "AsyncLLM") -> bool:
    """True when the model says how a conversation is written."""
    with suppress(ValueError):
        return engine.get_tokenizer().has_chat_template
    return False
