"""A whole engine from its arguments: text side and core, in one process or in two."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quire.compose.text import TextParts, compose_text
from quire.config import EngineArgs
from quire.demo import model_path
from quire.engine.async_engine import ServedEngine
from quire.engine.channel import CoreChannel, CoreInfo, LocalChannel
from quire.engine.engine import Engine
from quire.engine.queue_bound import QueueBound, QueueConfig
from quire.engine.step_allowance import LEAST_SECONDS
from quire.errors import ConfigurationError
from quire.weights.source import resolve_source

if TYPE_CHECKING:
    from quire.engine.supervisor import SupervisedChannel

DEFAULT_QUEUED_TOKENS = 2**20


def compose(args: EngineArgs) -> ServedEngine:
    """Build an engine: the one place that knows every floor.

    Raises:
        ConfigurationError: naming the argument or the file at fault.
    """
    return begin(args)()


def begin(args: EngineArgs) -> Callable[[], ServedEngine]:
    """The first half of `compose`; calling what is returned is the second. Who has other things to do at a start does
    them between the two: a core in its own process starts meanwhile.

    Raises:
        ConfigurationError: naming the argument or the file at fault. So does the second half.
    """
    directory = Path(model_path()) if args.model is None else resolve_source(args.model, args.revision)
    if not args.core_process:
        if args.hang_timeout is not None:
            raise ConfigurationError("hang_timeout requires core_process=True", field="hang_timeout")
        return partial(_compose_here, args, directory)
    # Not above: an engine in this process does without messages and their format.
    from quire.engine.core_process import CoreProcess
    from quire.engine.supervisor import SupervisedChannel
    from quire.engine.wire import Start

    start = Start(replace(args, core_process=False), str(directory.resolve()))
    channel = SupervisedChannel(partial(CoreProcess, start), args.hang_timeout or LEAST_SECONDS)
    return partial(_compose_apart, args, directory, channel)


def _compose_here(args: EngineArgs, directory: Path) -> ServedEngine:
    # Not above: it brings numpy and the operations, which the side that knows text can do without.
    from quire.compose.core import compose_core

    parts = compose_core(args, directory)
    return _served(args, compose_text(args, directory), LocalChannel(parts.core()), parts.info)


def _compose_apart(args: EngineArgs, directory: Path, channel: "SupervisedChannel") -> ServedEngine:
    try:
        text = compose_text(args, directory)
        return _served(args, text, channel, channel.wait_ready())
    except BaseException:
        channel.close()
        raise


def _served(args: EngineArgs, text: TextParts, channel: CoreChannel, core_info: CoreInfo) -> ServedEngine:
    limits = text.limits(args, core_info)
    return ServedEngine(
        engine=Engine(
            channel, text.tokenizer, _queue(args, limits.max_model_len), time.monotonic, core_info.cache_config
        ),
        inputs=text.inputs(limits),
        tokenizer=text.tokenizer,
        limits=limits,
        decisions=list(core_info.decisions),
        default_params=text.default_params,
        close=channel.close,
    )


def _queue(args: EngineArgs, max_model_len: int) -> QueueBound:
    max_tokens = args.max_num_queued_tokens or max(DEFAULT_QUEUED_TOKENS, 8 * max_model_len)
    return QueueBound(QueueConfig(args.max_num_queued_reqs, max_tokens, args.max_num_seqs), time.monotonic)
