"""`quire chat`: a conversation at the terminal, or down a pipe."""

import argparse
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

from quire.cli import engines
from quire.cli.arguments import add_engine, add_sampling
from quire.errors import InvalidRequestError, RequestFailedError
from quire.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    import asyncio

    from quire.llm import AsyncLLM

EXAMPLES = """examples:
  quire chat
  quire chat --model DIR --system-prompt "Answer in one sentence." --temperature 0.7
  printf 'What is TTFT?\\nAnd TPOT?\\n' | quire chat --quiet

/help says what can be typed; Ctrl-C stops an answer, Ctrl-D or /exit leaves."""
COMMANDS = """/reset  forget the conversation
/exit   leave (so does Ctrl-D)
/help   this
Ctrl-C  stop the answer"""

Message = dict[str, str]


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--system-prompt", metavar="TEXT", help="said to the model before the conversation")
    engines.add_quiet(parser)
    add_sampling(parser, without=["n"])
    add_engine(parser, positional_model=True)


def run(options: argparse.Namespace) -> int:
    """Read, answer, and so on."""
    engine, args = engines.start(options)
    import asyncio

    try:
        if not engines.has_chat_template(engine):
            raise InvalidRequestError(f"{engines.model_name(args)} has no chat template; quire generate continues text")
        defaults = engine.get_default_sampling_params()
        params = engines.make_params(options, defaults, kind=RequestOutputKind.DELTA)
        with asyncio.Runner() as runner:
            _converse(engine, params, runner, options)
    finally:
        engine.close()
    return 0


def _converse(
    engine: "AsyncLLM", params: SamplingParams, runner: "asyncio.Runner", options: argparse.Namespace
) -> None:
    start: list[Message] = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    history, at_terminal = list(start), sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 -- line editing, by being imported

        print("/help says what can be typed.", file=sys.stderr)
    while (line := _read(at_terminal)) is not None:
        said = line.strip()
        if said == "/exit":
            return
        if said == "/help":
            print(COMMANDS, file=sys.stderr)
        elif said == "/reset":
            history = list(start)
        elif said.startswith("/") and said[1:].isalpha():
            print(f"{said} is not known; /help lists what is", file=sys.stderr)
        elif said:
            _turn(engine, params, runner, history, said)


def _read(at_terminal: bool) -> str | None:
    """The next line, or None at the end."""
    while True:
        try:
            return input("> " if at_terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)


def _turn(
    engine: "AsyncLLM", params: SamplingParams, runner: "asyncio.Runner", history: list[Message], said: str
) -> None:
    """One question and its answer. A refusal leaves the history as it was; a stopped answer stays in it."""
    history.append({"role": "user", "content": said})
    heard: list[str] = []
    try:
        runner.run(_answer(engine, params, history, heard))
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    except (InvalidRequestError, RequestFailedError) as error:
        history.pop()
        print(f"quire: {error} (/reset begins anew)", file=sys.stderr)
        return
    print(flush=True)
    history.append({"role": "assistant", "content": "".join(heard)})


async def _answer(engine: "AsyncLLM", params: SamplingParams, history: list[Message], heard: list[str]) -> None:
    token_ids = await engine.encode_chat(history)
    stream = engine.generate({"prompt_token_ids": token_ids}, params)
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise RequestFailedError(output.error)
            heard.append(output.outputs[0].text)
            print(heard[-1], end="", flush=True)
