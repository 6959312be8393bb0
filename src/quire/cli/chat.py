"""`quire chat`: a conversation at the terminal, or down a pipe."""

import argparse
import sys
from collections.abc import Callable
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

from quire.cli import engines, remote, shape
from quire.cli.arguments import add_engine, add_sampling
from quire.cli.history import History
from quire.errors import InvalidRequestError, OverloadedError, RequestFailedError
from quire.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from quire.cli.remote_server import Server
    from quire.llm import AsyncLLM

EXAMPLES = """examples:
  quire chat
  quire chat DIR --system-prompt "Answer in one sentence." --temperature 0.7
  quire chat --url http://127.0.0.1:8000
  quire chat --json-schema answer.json
  printf 'What is TTFT?\\nAnd TPOT?\\n' | quire chat --quiet

/help says what can be typed; Ctrl-C stops an answer, Ctrl-D or /exit leaves."""
COMMANDS = """/reset  forget the conversation
/exit   leave (so does Ctrl-D)
/help   this
A paste of several lines is one message; the arrow keys bring back what was typed.
Ctrl-C  stop the answer"""

Message = dict[str, str]
Say = Callable[[str], None]
Answer = Callable[[list[Message], Say], None]
"""Answers a conversation, saying each piece as it comes."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--system-prompt", metavar="TEXT", help="said to the model before the conversation")
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at a terminal: keep what is typed for later chats, in $XDG_STATE_HOME/quire/chat_history",
    )
    engines.add_quiet(parser)
    remote.add(parser)
    shape.add(parser.add_argument_group("what each answer is held to"))
    add_sampling(parser, without=["n"])
    add_engine(parser, positional_model=True)


def run(options: argparse.Namespace) -> int:
    """Read, answer, and so on."""
    shape.take(options)
    server = remote.server_of(options)
    if server is not None:
        fields = remote.sampling_fields(options)
        _converse(
            lambda history, say: _answer_remotely(server, fields, history, say),
            options.system_prompt,
            saves=options.history,
        )
        return 0
    engine, args, values = engines.start(options, num_seqs=1)
    import asyncio

    try:
        if not engines.has_chat_template(engine):
            raise InvalidRequestError(f"{engines.model_name(args)} has no chat template; quire generate continues text")
        params = SamplingParams(**values, output_kind=RequestOutputKind.DELTA)
        with asyncio.Runner() as runner:
            _converse(
                lambda history, say: runner.run(_answer(engine, params, history, say)),
                options.system_prompt,
                saves=options.history,
            )
    finally:
        engine.close()
    return 0


def _converse(answer: Answer, system_prompt: str | None, *, saves: bool = False) -> None:
    start: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    history = list(start)
    typed: History | None = None
    if sys.stdin.isatty():
        typed = History(saves=saves)
        print("/help says what can be typed.", file=sys.stderr)
    while (line := _read(at_terminal=typed is not None)) is not None:
        said = line.strip()
        if said and typed is not None:
            typed.save(said)
        if said == "/exit":
            return
        if said == "/help":
            print(COMMANDS, file=sys.stderr)
        elif said == "/reset":
            history = list(start)
        elif said.startswith("/") and said[1:].isalpha():
            print(f"{said} is not known; /help lists what is", file=sys.stderr)
        elif said:
            _turn(answer, history, said)


def _read(*, at_terminal: bool) -> str | None:
    """The next line, or None at the end."""
    while True:
        try:
            return input("> " if at_terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)


def _turn(answer: Answer, history: list[Message], said: str) -> None:
    """One question and its answer. A refusal leaves the history as it was; a stopped answer stays in it."""
    history.append({"role": "user", "content": said})
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        print(text, end="", flush=True)

    try:
        answer(history, say)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    except (InvalidRequestError, OverloadedError, RequestFailedError) as error:
        history.pop()
        print(f"quire: {error} (/reset begins anew)", file=sys.stderr)
        return
    print(flush=True)
    history.append({"role": "assistant", "content": "".join(heard)})


async def _answer(engine: "AsyncLLM", params: SamplingParams, history: list[Message], say: Say) -> None:
    token_ids = await engine.encode_chat(history)
    stream = engine.generate({"prompt_token_ids": token_ids}, params)
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise RequestFailedError(output.error)
            say(output.outputs[0].text)


def _answer_remotely(server: "Server", fields: dict[str, object], history: list[Message], say: Say) -> None:
    with closing(server.stream("/v1/chat/completions", {**fields, "messages": history})) as events:
        for event in events:
            for choice in event.get("choices") or ():
                say(choice["delta"].get("content") or "")
