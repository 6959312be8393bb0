"""`quire completion bash|zsh|fish`: what the shell's TAB completes, made from the flags of all verbs."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

EXAMPLES = """examples:
  source <(quire completion bash)
  source <(quire completion zsh)
  quire completion fish > ~/.config/fish/completions/quire.fish"""
SHELLS = ("bash", "zsh", "fish")

_BASH = """_quire() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" path="" item
    for item in "${{COMP_WORDS[@]:1:$((COMP_CWORD-1))}}"; do
        case "$path $item" in {places}) path="$path $item" ;; esac
    done
    COMPREPLY=()
    case "$path:$before" in
{values}
    esac
    if [[ "$word" == -* ]]; then
        case "$path" in
{flags}
        esac
    else
        case "$path" in
{words}
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
        esac
    fi
}}
complete -o filenames -F _quire quire
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True, slots=True)
class _Place:
    """A parser: what may follow a chain of verbs."""

    path: tuple[str, ...]
    parser: argparse.ArgumentParser

    @property
    def verbs(self) -> dict[str, argparse.ArgumentParser]:
        """The parsers of the next verbs."""
        found: dict[str, argparse.ArgumentParser] = {}
        for action in self.parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= action.choices
        return found

    @property
    def flags(self) -> list[argparse.Action]:
        """Its own flags."""
        return [one for one in self.parser._actions if one.option_strings and one.help != argparse.SUPPRESS]

    @property
    def words(self) -> list[str]:
        """What may stand without a flag."""
        positional = [one for one in self.parser._actions if not one.option_strings and one.choices]
        return [str(word) for one in positional for word in one.choices or ()]


def add(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from quire.cli.main import VERBS, make_parser

    places = list(_places(_Place((), make_parser(list(VERBS)))))
    print(_fish(places) if options.shell == "fish" else _bash(places, options.shell), end="")
    return 0


def _places(place: _Place) -> Iterator[_Place]:
    yield place
    for name, parser in place.verbs.items():
        yield from _places(_Place((*place.path, name), parser))


def _bash(places: list[_Place], shell: str) -> str:
    def case(pattern: str, found: list[str]) -> str:
        return f'    {pattern}) COMPREPLY=($(compgen -W {_quoted(" ".join(found))} -- "$word")); return ;;'

    def at(place: _Place) -> str:
        return _quoted("".join(f" {item}" for item in place.path))

    values = [
        case("|".join(f"{at(place)}:{flag}" for flag in one.option_strings), list(map(str, one.choices)))
        for place in places
        for one in place.flags
        if one.choices
    ]
    text = _BASH.format(
        places="|".join(_quoted("".join(f" {item}" for item in place.path)) for place in places if place.path),
        values="\n".join(values),
        flags="\n".join(case(at(one), [flag for item in one.flags for flag in item.option_strings]) for one in places),
        words="\n".join(case(at(one), one.words) for one in places if one.words),
    )
    return text if shell == "bash" else _ZSH + text


def _fish(places: list[_Place]) -> str:
    lines = ["complete -c quire -e"]
    for place in places:
        seen = [f"__fish_seen_subcommand_from {item}" for item in place.path]
        below = [f"not __fish_seen_subcommand_from {' '.join(place.verbs)}"] if place.verbs else []
        start = f"complete -c quire -n {_quoted('; and '.join([*seen, *below]))}"
        for word in place.words:
            lines.append(f"{start} -f -a {_quoted(word)}")
        for one in place.flags:
            names = " ".join(
                ("-l " if flag.startswith("--") else "-s ") + flag.lstrip("-") for flag in one.option_strings
            )
            text = _quoted((one.help or "").replace("%%", "%"))
            takes = f" -x -a {_quoted(' '.join(map(str, one.choices)))}" if one.choices else " -r" * (one.nargs != 0)
            lines.append(f"{start} {names} -d {text}{takes}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For a shell, in single quotes."""
    return "'" + text.replace("'", "'\\''") + "'"
