"""`quire VERB ...`: finds the verb, and turns errors into one line.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import quire
from quire.cli.arguments import Parser, canonical
from quire.errors import ConfigurationError, InvalidRequestError, QuireError

EXAMPLES = """examples:
  quire generate "What is PagedAttention?"
  quire chat
  quire serve --model DIR --port 8000
  quire compare DIR
  quire bench throughput --model DIR --workload W1 W2

`quire VERB --help` tells the rest. Without a model, the small embedded one is used."""


VERBS = {
    "generate": "answer prompts and print the text as it comes",
    "chat": "talk with the model",
    "serve": "serve the APIs of OpenAI, Anthropic, Ollama and TGI over HTTP",
    "grammar": "check a shape that answers are held to, and try texts",
    "plan": "say what a model will take and how fast it can be, before it is loaded",
    "build": "quantise and pack a model ahead of time, into an engine directory",
    "verify": "check an engine directory: every byte, then its golden prompts",
    "inspect": "say what is inside a model or an engine directory, without loading it",
    "pull": "download a model of the hub, and check every file",
    "list": "list the models of the hub on this machine",
    "show": "say what of a model of the hub is on this machine",
    "rm": "remove a model of the hub from this machine",
    "top": "show what a running server does, as it does it",
    "explain": "say where the time of a request to a running server went",
    "eval": "measure what formats of a model lose: perplexity, KL divergence, and a table with memory and speed",
    "replay": "play a recording of the scheduler again, and compare its plans",
    "simulate": "say what other settings, or other memory, would have made of a recording",
    "compare": "put throughput, time to first token and memory beside those of other engines",
    "bench": "measure speed",
    "course": "begin and check the exercises of the course",
    "doctor": "say what this machine and installation offer",
    "completion": "print what a shell completes: bash, zsh or fish",
}


ELSEWHERE = {
    "run": "did you mean quire chat?",
    "start": "did you mean quire serve?",
    "complete": "did you mean quire generate?",
    "ls": "did you mean quire list?",
    "remove": "did you mean quire rm?",
    "delete": "did you mean quire rm?",
    "download": "did you mean quire pull?",
    "ps": "did you mean quire explain, or GET /v1/models of a running server?",
}
"""Other programs' verbs."""


class Verb(Protocol):
    """A module of this folder that carries one verb."""

    EXAMPLES: str

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Give the verb its flags."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; the exit code."""


def load(name: str) -> Verb:
    """A verb's module. No other is imported."""
    return cast(Verb, import_module(f"quire.cli.{name}"))


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The command line, complete for the verbs among `words`."""
    parser = Parser(
        prog="quire",
        description="An inference engine for large language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"quire {quire.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, text in VERBS.items():
        child = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the whole trace of an error"
        )
        if name in words:
            verb = load(name)
            child.epilog = verb.EXAMPLES
            verb.add(child)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    verb = next((word for word in given if not word.startswith("-")), "")
    if hint := ELSEWHERE.get(verb) or _nearest(verb):
        say(f"quire {verb}: {hint}")
        return 2
    try:
        if verb == "serve" and "--tgi" in given:
            from quire.cli.tgi import translated

            given = translated(given, os.environ, say)
        words = canonical(given, say)
        if verb == "serve" and not {"-h", "--help"} & set(words):
            words = _with_settings(words)
        options = make_parser(given).parse_args(words)
        return load(options.verb).run(options)
    except SystemExit as leaving:  # argparse: --help, --version, usage
        return leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:
        say("quire: interrupted")
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        say(f"quire: {_one_line(error)}")
        return 2 if isinstance(error, InvalidRequestError | ConfigurationError) and _is_usage(error) else 1


def _with_settings(words: list[str]) -> list[str]:
    """Those of environment and file, behind the words of `serve`."""
    from quire.cli.settings import completed

    place = words.index("serve") + 1
    parser = Parser(prog="quire serve", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true")
    load("serve").add(parser)
    return [*words[:place], *completed(words[place:], parser, os.environ, say)]


def _nearest(verb: str) -> str:
    found = [] if verb in VERBS else difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.6)
    return f"did you mean quire {found[0]}?" if found else ""


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr)


def _is_usage(error: QuireError) -> bool:
    """True when an argument that was typed is at fault, and not a file or the machine."""
    return type(error) in (InvalidRequestError, ConfigurationError)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, QuireError):
        return text or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"the module {error.name!r} is not installed"
    return f"{type(error).__name__}: {text} (--debug shows where)"
