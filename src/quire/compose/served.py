"""A whole engine from its arguments: text side and core, in one process or in two."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quire.compose.answers import answer_decisions, answer_format
from quire.compose.structured import shape_checker
from quire.compose.text import TextParts, compose_text
from quire.config import EngineArgs, ModelShare
from quire.engine.channel import CoreChannel, CoreInfo, LocalChannel
from quire.engine.engine import Engine
from quire.engine.front import ModelFiles, ServedEngine
from quire.engine.inputs import InputProcessor, RequestLimits
from quire.engine.observer import Observer
from quire.engine.queue import QueueBound, QueueConfig
from quire.errors import ConfigurationError
from quire.weights.formats.engine_names import is_engine
from quire.weights.formats.gguf_names import is_gguf, part_paths
from quire.weights.hub import resolve_model_path

if TYPE_CHECKING:
    from quire.isolation.supervisor import SupervisedChannel

DEFAULT_QUEUED_TOKENS = 2**20


class ModelPlace(NamedTuple):
    """Of one of several models in a server."""

    name: str
    """For the log."""
    path: Path
    """Where its files are."""
    share: ModelShare


def compose(args: EngineArgs) -> ServedEngine:
    """Build an engine.

    Raises:
        ConfigurationError: naming the argument or the file at fault.
    """
    return begin(args)()


def begin(args: EngineArgs, place: ModelPlace | None = None) -> Callable[[], ServedEngine]:
    """The first half of `compose`; calling what is returned is the second. A core in its own process starts with the
    first half, so what is done between the two costs no time.

    Args:
        place: of the model among several in one server, each in a process of its own.

    Raises:
        ConfigurationError: naming the argument or the file at fault. So does the second half.
    """
    path = find_model(args) if place is None else place.path
    if args.core_process:
        return partial(_compose_apart, args, path, _start_core(args, path, place))
    if args.hang_timeout is not None:
        raise ConfigurationError("hang_timeout requires core_process=True", field="hang_timeout")
    return partial(_compose_here, args, path)


def find_model(args: EngineArgs) -> Path:
    """Where the model's files are: a directory, or a GGUF file.

    Raises:
        ConfigurationError: there are none.
    """
    if args.model is not None:
        return resolve_model_path(args.model, args.revision)
    if find_spec("quire.demo") is None:
        raise ConfigurationError("model must be given: this installation has no quire.demo", field="model")
    from quire.demo import model_path

    return Path(model_path())


def _start_core(args: EngineArgs, path: Path, place: ModelPlace | None) -> "SupervisedChannel":
    if find_spec("quire.isolation") is None:
        text = "core_process=True needs the package quire.isolation, which this installation lacks"
        raise ConfigurationError(text, field="core_process")
    # Not above: an engine in this process does without messages and their format.
    from quire.isolation.core_process import CoreProcess
    from quire.isolation.heartbeat import LEAST_SECONDS
    from quire.isolation.supervisor import SupervisedChannel
    from quire.isolation.wire import Start

    def spawn(first: CoreInfo | None) -> CoreProcess:
        """Those after the first get its length: less may be free by then, and open requests are that long."""
        longest = args.max_model_len if first is None else first.max_model_len
        share = None if place is None else place.share
        start = Start(replace(args, core_process=False, max_model_len=longest), str(path.absolute()), share)
        return CoreProcess(start, niceness=args.core_niceness)

    label = "" if place is None else f"model {place.name!r}: "
    return SupervisedChannel(spawn, args.hang_timeout or LEAST_SECONDS, label=label)


def _compose_here(args: EngineArgs, path: Path) -> ServedEngine:
    # Not above: it brings numpy and the operations, which the side that knows text can do without.
    from quire.compose.core import compose_core
    from quire.weights.load import read_model_config

    startup = logging.getLogger("quire.startup")
    startup.debug("imports of the engine")
    config = read_model_config(path)
    startup.debug("configuration: config.json, header or manifest")
    parts = compose_core(args, path, config)
    text = compose_text(args, path, config.gguf)
    startup.debug("tokenizer, template, defaults")
    channel = LocalChannel(parts.core(), args.release_idle_memory)
    return _served(args, path, text, channel, parts.info)


def _compose_apart(args: EngineArgs, path: Path, channel: "SupervisedChannel") -> ServedEngine:
    try:
        return _served(args, path, compose_text(args, path), channel, channel.wait_ready())
    except BaseException:
        channel.close()
        raise


def _served(args: EngineArgs, path: Path, text: TextParts, channel: CoreChannel, core: CoreInfo) -> ServedEngine:
    limits, observer, shapes = _limits(args, text, core), _observer(core), shape_checker()
    answers = None if text.tokenizer is None else answer_format(args, text.tokenizer)

    def close() -> None:
        channel.close()
        observer.close()
        if shapes is not None:
            shapes.close()

    return ServedEngine(
        engine=Engine(channel, text.tokenizer, _queue(args, core.max_model_len), time.monotonic, observer),
        inputs=InputProcessor(text.tokenizer, limits, shapes),
        tokenizer=text.tokenizer,
        limits=limits,
        decisions=[*core.decisions, *(() if answers is None else answer_decisions(answers))],
        answers=answers,
        default_params=text.default_params,
        close=close,
        cache_config=core.cache_config,
        files=_files(path, core),
    )


def _files(path: Path, core: CoreInfo) -> ModelFiles:
    found = part_paths(path) if is_gguf(path) else [item for item in path.iterdir() if item.is_file()]
    stats = [item.stat() for item in found]
    kind = "gguf" if is_gguf(path) else "engine" if is_engine(path) else "safetensors"
    modified_s = max((item.st_mtime for item in stats), default=0.0)
    directory = os.path.realpath(path.parent if is_gguf(path) else path)
    num_bytes, fingerprint = sum(item.st_size for item in stats), core.model_fingerprint[:64]
    return ModelFiles(kind, num_bytes, modified_s, fingerprint, directory, core.model)


def _limits(args: EngineArgs, text: TextParts, core: CoreInfo) -> RequestLimits:
    has_priorities = args.scheduling_policy == "priority"
    return RequestLimits(core.max_model_len, core.vocab_size, text.eos_token_ids, args.seed, has_priorities)


def _queue(args: EngineArgs, max_model_len: int) -> QueueBound:
    max_tokens = args.max_num_queued_tokens or max(DEFAULT_QUEUED_TOKENS, 8 * max_model_len)
    return QueueBound(QueueConfig(args.max_num_queued_reqs, max_tokens, args.max_num_seqs), time.monotonic)


def _observer(core: CoreInfo) -> Observer:
    """What counts and explains, if this installation has it."""
    if find_spec("quire.observe") is None:
        return Observer()
    from quire.observe.observer import EngineObserver

    return EngineObserver(core.cache_config)
