"""A whole engine from its arguments: text side and core, in one process."""

import time
from pathlib import Path

from quire.compose.core import compose_core
from quire.compose.text import compose_text
from quire.config import EngineArgs
from quire.demo import model_path
from quire.engine.async_engine import ServedEngine
from quire.engine.channel import LocalChannel
from quire.engine.engine import Engine
from quire.weights.source import resolve_source


def compose(args: EngineArgs) -> ServedEngine:
    """Build an engine: the one place that knows every floor.

    Raises:
        ConfigurationError: naming the argument or the file at fault.
    """
    directory = Path(model_path()) if args.model is None else resolve_source(args.model, args.revision)
    parts, text = compose_core(args, directory), compose_text(args, directory)
    channel = LocalChannel(parts.core())
    facts = text.facts(args, parts.facts)
    return ServedEngine(
        engine=Engine(channel, text.tokenizer, clock=time.monotonic),
        inputs=text.inputs(facts),
        tokenizer=text.tokenizer,
        facts=facts,
        decisions=list(parts.facts.decisions),
        default_params=text.default_params,
        close=channel.close,
    )
