"""`quire chat`: a conversation at the terminal, or down a pipe."""

import argparse
from collections.abc import Mapping
from contextlib import aclosing, closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quire.cli import engines, remote, shape
from quire.cli.arguments import add_engine, add_sampling
from quire.cli.chat_file import Message
from quire.cli.chat_session import Answer, Conversation, Say
from quire.cli.chat_terminal import choose
from quire.errors import InvalidRequestError, RequestFailedError
from quire.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from quire.cli.remote_server import Server
    from quire.llm import AsyncLLM

EXAMPLES = """examples:
  quire chat
  quire chat DIR --system-prompt "Answer in one sentence." --temperature 0.7 --stats
  quire chat --url http://127.0.0.1:8000
  quire chat --json-schema answer.json
  printf 'What is TTFT?\\nAnd TPOT?\\n' | quire chat --quiet

/help says what can be typed; Ctrl-C stops an answer, Ctrl-D or /exit leaves.
pip install 'quire[chat]' brings an editor and renders Markdown."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--system-prompt", metavar="TEXT", help="said to the model before the conversation")
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at a terminal: keep what is typed for later chats, in $XDG_STATE_HOME/quire/chat_history",
    )
    parser.add_argument("--stats", action="store_true", help="tokens a second after each answer (/set stats on)")
    text = "at a terminal: no Markdown and no editor, as where quire[chat] is not installed"
    parser.add_argument("--plain", action="store_true", help=text)
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
        _converse(
            options,
            lambda history, values, say, counts: _answer_remotely(server, values, history, say, counts=counts),
            remote.sampling_fields(options),
            None,
        )
        return 0
    engine, args, values = engines.start(options, num_seqs=1)
    import asyncio

    try:
        if not engines.has_chat_template(engine):
            raise InvalidRequestError(f"{engines.model_name(args)} has no chat template; quire generate continues text")
        with asyncio.Runner() as runner:
            defaults = asdict(SamplingParams(max_tokens=None))
            _converse(
                options,
                lambda history, given, say, _: runner.run(_answer(engine, given, history, say)),
                values,
                defaults,
            )
    finally:
        engine.close()
    return 0


def _converse(
    options: argparse.Namespace, answer: Answer, values: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> None:
    terminal = choose(saves=options.history, plain=options.plain)
    Conversation(
        shape.named()(answer), terminal, options.system_prompt, values, defaults=defaults, stats=options.stats
    ).run()


async def _answer(engine: "AsyncLLM", values: Mapping[str, Any], history: list[Message], say: Say) -> None:
    params = SamplingParams(**values, output_kind=RequestOutputKind.DELTA)
    token_ids = await engine.encode_chat(history)
    stream = engine.generate({"prompt_token_ids": token_ids}, params)
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise RequestFailedError(output.error)
            say(output.outputs[0].text, len(output.outputs[0].token_ids))


def _answer_remotely(
    server: "Server", values: Mapping[str, Any], history: list[Message], say: Say, *, counts: bool
) -> None:
    # Not every server of OpenAI's kind knows the field.
    body = {**values, "messages": history, **({"stream_options": {"include_usage": True}} if counts else {})}
    with closing(server.stream("/v1/chat/completions", body)) as events:
        for event in events:
            for choice in event.get("choices") or ():
                say(choice["delta"].get("content") or "", 0)
            if counts:
                say("", (event.get("usage") or {}).get("completion_tokens", 0))
