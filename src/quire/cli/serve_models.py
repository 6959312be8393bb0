"""`quire serve A B ...`, and `models:` in its file: several models in one server, each with a core of its own.

What stands for all (flags, the environment, the file's own keys) holds for each model that does not say otherwise in
its entry. Of memory and threads it is the whole, which the models share: `quire.compose.machine_split`.
"""

import argparse
import gc
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quire.cli import banner, model_path, sampling
from quire.cli.arguments import engine_values
from quire.cli.engines import model_name
from quire.cli.settings import model_entries
from quire.config import EngineArgs
from quire.errors import ConfigurationError, QuireError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from quire.engine.front import ServedEngine
    from quire.server.http.models import ServedModel, ServedModels

OF_ONE = ("tokenizer", "revision", "record")
"""What no two models can have in common."""
GUIDE = "docs/guide/several.md"


class PlannedModel(NamedTuple):
    """One of them, before anything is loaded."""

    args: EngineArgs
    names: tuple[str, ...]
    """For clients."""
    accepted: frozenset[str]
    """Those, and the model's own."""
    memory_share: float | None
    """That its entry states."""


class Plan(NamedTuple):
    """All of them."""

    models: list[PlannedModel]
    memory_share: float
    threads: int | None

    @property
    def shown_names(self) -> str:
        """For people."""
        return ", ".join(one.names[0] for one in self.models)


def plan_of(options: argparse.Namespace) -> Plan | None:
    """What is asked for; None: one model.

    Raises:
        ConfigurationError: naming the flag or the key at fault.
    """
    entries = [] if options.config is None else model_entries(options.config)
    words = options.positional_model
    if len(words) < 2 and not entries:
        return None
    if entries and (words or hasattr(options, "model")):
        raise _bad("models", f"stand in {options.config}, and `model` or a word of the command line names another")
    if hasattr(options, "model"):
        raise _bad("model", "and several words that name models exclude each other")
    names, shared = options.served_model_name or [], engine_values(options)
    of_one = [name for name in OF_ONE if name in shared] + (["served_model_name"] if names and entries else [])
    if of_one:
        raise _bad(of_one[0], f"is of one model: it stands in an entry of `models` ({GUIDE})")
    if names and len(names) != len(words):
        raise _bad("served_model_name", f"must be one name for each of {len(words)} models, got {len(names)}")
    if not entries:
        entries = [argparse.Namespace(model=word, served_model_name=[]) for word in words]
        for entry, name in zip(entries, names, strict=False):
            entry.served_model_name = [name]
    whole = EngineArgs.from_mapping(shared)
    for name in ("gpu_memory_utilization", "threads"):
        shared.pop(name, None)
    models = [_planned(number, entry, shared) for number, entry in enumerate(entries, 1)]
    _check(models)
    return Plan(models, whole.gpu_memory_utilization, whole.threads)


def _planned(number: int, entry: argparse.Namespace, shared: dict[str, Any]) -> PlannedModel:
    own = engine_values(entry)
    try:
        args = EngineArgs.from_mapping({"core_process": True, **shared, **own})
    except ConfigurationError as error:
        raise ConfigurationError(f"model {number} ({entry.model}): {error.message}", field=error.field) from error
    if not args.core_process:
        raise _bad("core_process", "must be true: each of several models computes in a process of its own")
    name = model_name(args)
    names = tuple(entry.served_model_name) or (name,)
    others = () if entry.served_model_name else (name, *(() if args.model is None else (args.model,)))
    return PlannedModel(args, names, frozenset((*names, *others)), own.get("gpu_memory_utilization"))


def _check(models: Sequence[PlannedModel]) -> None:
    """Refuse what two of them have in common."""
    seen: dict[str, int] = {}
    for number, one in enumerate(models, 1):
        for name in sorted(one.accepted) if all(one.names) else [""]:
            if not name or seen.setdefault(name, number) != number:
                where = f"models {seen[name]} and {number}" if name else f"model {number}"
                raise _bad("served_model_name", f"{name!r} would be that of {where}: give each a name of its own")
        if one.args.record is not None and seen.setdefault(f"record {one.args.record}", number) != number:
            raise _bad("record", "names one file for two models")


def _bad(name: str, text: str) -> ConfigurationError:
    return ConfigurationError(f"{name} {text}", field=name)


def begin_all(plan: Plan) -> "list[Callable[[], ServedEngine]]":
    """Start all cores. What is returned is the second half of each start.

    Raises:
        ConfigurationError: a model is not there, or its share of the machine does not suffice; nothing has begun.
    """
    from quire.compose.machine_split import shares_of
    from quire.compose.served import ModelPlace, begin, find_model

    for one in plan.models:
        model_path.check(one.args.model)
    paths = [find_model(one.args) for one in plan.models]
    asked = [(one.args, path) for one, path in zip(plan.models, paths, strict=True)]
    shares = shares_of(asked, [one.memory_share for one in plan.models], plan.memory_share, plan.threads)
    return [
        begin(one.args, ModelPlace(one.names[0], path, share))
        for one, path, share in zip(plan.models, paths, shares, strict=True)
    ]


class Loading:
    """Models that come one by one while the server listens.

    Args:
        halves: what `begin_all` gave.
        settled: called once, when each is there or has failed: whether any is there.
    """

    def __init__(
        self,
        models: "ServedModels",
        halves: "Sequence[Callable[[], ServedEngine]]",
        *,
        quiet: bool,
        say: Callable[[str], None],
        settled: Callable[[bool], None],
    ) -> None:
        self._models, self._halves, self._quiet = models, halves, quiet
        self._say, self._settled, self._lock = say, settled, threading.Lock()
        self._num_left = len(halves)

    def begin(self, app: "Starlette") -> None:
        """Wait for each in a thread of its own."""
        for model, half in zip(self._models, self._halves, strict=True):
            threading.Thread(target=self._load, args=(app, model, half), name="quire-load", daemon=True).start()

    def _load(self, app: "Starlette", model: "ServedModel", half: "Callable[[], ServedEngine]") -> None:
        from quire.engine.async_engine import AsyncEngine

        try:
            engine = AsyncEngine(half())
            decisions = [*engine.decisions, *sampling.resolve({}, engine.stated_sampling)[1]]
            with self._lock:
                banner.show(model.name, decisions, quiet=self._quiet)
            app.state.welcome(model, engine)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the others go on
            text = str(error) if isinstance(error, QuireError) else f"{type(error).__name__}: {error}"
            model.failure = text
            self._say(f"quire: model {model.name!r} could not be loaded: {' '.join(text.split())}")
        with self._lock:
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            gc.freeze()
            self._settled(bool(self._models.engines))
