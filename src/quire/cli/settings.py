"""Flags of `quire serve` from the environment (QUIRE_PORT is --port) and from a file (--config).

A flag on the command line goes before a variable of the environment, that before the file, that before the default: a
list that a flag gives is not added to one of the file.
"""

import argparse
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.cli.arguments import ALIASES, NO_EFFECT, Parser, add_engine, canonical
from quire.cli.config_file import MODELS, Value, Values, read_config, read_list
from quire.errors import ConfigurationError, unknown_name_message

PREFIX = "QUIRE_"
NOT_FLAGS = frozenset({"QUIRE_ISA"})
"""Variables with a meaning of their own."""
_SERVICE_LINK = "tcp://"


@dataclass(frozen=True, slots=True)
class _Setting:
    """A flag's value, and where it is from."""

    action: argparse.Action
    value: Value
    source: str

    def words(self) -> list[str]:
        """The same on the command line.

        Raises:
            ConfigurationError: a value that the flag cannot have, with its source.
        """
        flags = self.action.option_strings
        if isinstance(self.value, list) and not _takes_many(self.action):
            raise ConfigurationError(f"{self.source} must be one value, not a list")
        values = self.value if isinstance(self.value, list) else [self.value]
        if self.action.nargs == 0:
            if self.value not in ("true", "false"):
                raise ConfigurationError(f"{self.source} must be true or false, got {self.value!r}")
            return [flags[0]] if self.value == "true" else list(flags[1:2])
        for value in values:
            self._check(value)
        return [flags[0], *values] if self.action.nargs == "+" else [f"{flags[0]}={value}" for value in values]

    def _check(self, value: str) -> None:
        if self.action.nargs == "+" and value.startswith("-"):
            raise ConfigurationError(f"{self.source} must not begin with a hyphen, got {value!r}")
        kind: Any = self.action.type or str
        try:
            found = kind(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ConfigurationError(f"{self.source} must be a {kind.__name__}, got {value!r}") from error
        if self.action.choices is not None and found not in self.action.choices:
            raise ConfigurationError(f"{self.source} must be one of {', '.join(map(str, self.action.choices))}")


def _takes_many(action: argparse.Action) -> bool:
    return action.nargs == "+" or isinstance(action, argparse._AppendAction)


def completed(
    words: Sequence[str],
    parser: argparse.ArgumentParser,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> list[str]:
    """A command line of `serve`, under canonical names, with the settings of environment and file that it leaves out.

    Raises:
        ConfigurationError: the file or a value is at fault, with the name of its source.
    """
    actions = {one.option_strings[0]: one for one in parser._actions if one.option_strings}
    own = list(words[: words.index("--")] if "--" in words else words)
    names = {flag: one for one in parser._actions for flag in one.option_strings}
    given = {names[word].dest for item in own if (word := item.partition("=")[0]) in names}
    found = {one.action.dest: one for one in _of_environment(actions, environment, say)}
    added, typed, named = list[str](), parser.parse_args(own), found.pop("config", None)
    path: str | None = typed.config or (None if named is None else str(named.value))
    if path is not None:
        for one in _of_values(read_config(path).values, actions, path):
            found.setdefault(one.action.dest, one)
        added = [] if typed.config else [f"--config={path}"]  # for `model_entries`
    if typed.positional_model:
        given.add("model")
    added += [word for dest, one in found.items() if dest not in given for word in one.words()]
    return [*own, *added, *words[len(own) :]]


def model_entries(path: str) -> list[argparse.Namespace]:
    """The entries of `models:` in a file: each has flags of the engine, and `served_model_name`.

    Raises:
        ConfigurationError: an unknown key, a value that cannot be, or an entry without a model, with its line.
    """
    parser = Parser(prog=MODELS, allow_abbrev=False, add_help=False)
    add_engine(parser)
    parser.add_argument("--served-model-name", nargs="+", default=[])
    actions = {one.option_strings[0]: one for one in parser._actions}
    found = []
    for number, entry in enumerate(read_config(path).models, 1):
        words = [word for one in _of_values(entry, actions, path) for word in one.words()]
        found.append(parser.parse_args(words))
        if not hasattr(found[-1], "model"):
            raise ConfigurationError(f"entry {number} of {MODELS} in {path} needs `model`", field="model")
    return found


def _of_values(values: Values, actions: Mapping[str, argparse.Action], path: str) -> Iterator[_Setting]:
    for key, (value, line) in values.items():
        yield _Setting(_action(actions, key, f"line {line} of {path}"), value, f"{key} (line {line} of {path})")


def _of_environment(
    actions: Mapping[str, argparse.Action], environment: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[_Setting]:
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in NOT_FLAGS:
            continue
        flag = "--" + name.removeprefix(PREFIX).lower().replace("_", "-")
        flag = ALIASES.get(flag, flag)
        if value.startswith(_SERVICE_LINK):
            say(f"quire: not read: {name}, an address that Kubernetes sets for a service")
        elif flag in actions and not value:
            raise ConfigurationError(f"{name} is empty: give it a value, or take it out of the environment")
        elif flag in actions:
            yield _Setting(actions[flag], read_list(value) if _takes_many(actions[flag]) else value, name)
        elif nearest := difflib.get_close_matches(flag[2:], [item[2:] for item in actions], n=1, cutoff=0.75):
            meant = PREFIX + nearest[0].replace("-", "_").upper()
            say(f"quire: not read: {name}, which names no flag; did you mean {meant}?")


def _action(actions: Mapping[str, argparse.Action], key: str, place: str) -> argparse.Action:
    flag = "--" + key.replace("_", "-")
    (flag,) = canonical([flag], lambda text: None) if flag not in NO_EFFECT else (flag,)
    if flag in ("--config", "--help") or flag not in actions:
        raise ConfigurationError(f"{place}: {unknown_name_message('flag', key, [item[2:] for item in actions])}")
    return actions[flag]
