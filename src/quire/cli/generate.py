"""`quire generate`: answer prompts and print the text as it comes."""

import argparse
import sys
from collections.abc import Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from quire.cli import engines, model_path, remote, shape
from quire.cli.arguments import EMBEDDED_NAME, add_engine, add_sampling, engine_values
from quire.config import EngineArgs
from quire.errors import InvalidRequestError, RequestFailedError
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams
from quire.weights.hub import PACKAGED

if TYPE_CHECKING:
    from quire.cli.remote_server import Server
    from quire.cli.startup_report import StartupReport
    from quire.llm import AsyncLLM

EXAMPLES = """examples:
  quire generate "What is the KV cache?"
  quire generate DIR --raw --max-tokens 40 --temperature 0 "Once upon a time"
  quire generate --url http://127.0.0.1:8000 --api-key SECRET "What is TPOT?"
  echo "What is TTFT?" | quire generate --quiet
  quire generate --json DIR "What is a token?" "What is a block table?"

One word is the prompt, for the embedded model. Of several, the first is the model, as in all verbs: a directory, a hub
id, or quire-demo for the embedded one. With --model or --url, all are prompts. Beside a model alone (a
directory, a GGUF file, smollm2, quire-demo) the prompt is read from standard input."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    text = "the model, if more than one word follows and neither --model nor --url names one; then prompts, read from "
    parser.add_argument("prompts", nargs="*", metavar="[MODEL] PROMPT", help=text + "standard input if there is none")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object for each prompt, when it is done")
    text = "say on standard error where the time to the first token went"
    parser.add_argument("--startup-report", action="store_true", help=text)
    engines.add_quiet(parser)
    remote.add(parser)
    shape.add(parser.add_argument_group("what the answer is held to"))
    add_sampling(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Answer every prompt, in order."""
    _take_model(options)
    shape.take(options)
    prompts = options.prompts or [sys.stdin.read().removesuffix("\n")]
    if not all(prompt.strip() for prompt in prompts):
        hint = "" if options.choice is None else ": --choice took the words after it; -- ends them"
        raise InvalidRequestError(f"the prompt is empty{hint}", param="prompt")
    report = _report(options)
    server = remote.server_of(options)
    if server is not None:
        with shape.named():
            _ask_all(server, prompts, options)
        return 0
    num_seqs = min(len(prompts) * getattr(options, "n", 1), EngineArgs().max_num_seqs)
    engine, _, values = engines.start(options, num_seqs=max(1, num_seqs))
    import asyncio

    try:
        with shape.named():
            asyncio.run(_answer_all(engine, prompts, values, options, report))
    finally:
        engine.close()
    return 0


def _take_model(options: argparse.Namespace) -> None:
    """The model out of the words, by the rule that `--help` gives."""
    words = options.prompts
    if options.url is not None or "model" in engine_values(options):
        return
    if len(words) > 1 and not model_path.may_be_model(words[0]) and words[0][:1] not in "/.~":
        text = (
            f"of several words the first is the model, and {words[0][:40]!r} is none; for the embedded one: quire-demo"
        )
        raise InvalidRequestError(text, param="model")
    if len(words) > 1 or (words and (model_path.is_model(words[0]) or words[0] in {EMBEDDED_NAME, *PACKAGED})):
        options.model = words.pop(0)


def _report(options: argparse.Namespace) -> "StartupReport | None":
    """A report of this process.

    Raises:
        InvalidRequestError: another process computes.
    """
    if not options.startup_report:
        return None
    if options.url is not None or getattr(options, "core_process", False):
        raise InvalidRequestError("startup_report is of an engine in this process", param="startup_report")
    from quire.cli.startup_report import StartupReport

    return StartupReport()


async def _answer_all(
    engine: "AsyncLLM",
    prompts: list[str],
    values: dict[str, Any],
    options: argparse.Namespace,
    report: "StartupReport | None",
) -> None:
    """All prompts run at once; their texts are printed one after the other."""
    import asyncio

    streams_text = not options.json and getattr(options, "n", 1) == 1
    kind = RequestOutputKind.DELTA if streams_text else RequestOutputKind.FINAL_ONLY
    params = SamplingParams(**values, output_kind=kind)
    queues: list[asyncio.Queue[RequestOutput | Exception]] = [asyncio.Queue() for _ in prompts]
    tasks = [
        asyncio.create_task(_pump(engine, prompt, params, queue, raw=options.raw))
        for prompt, queue in zip(prompts, queues, strict=True)
    ]
    try:
        for prompt, queue in zip(prompts, queues, strict=True):
            await _print_one(prompt, queue, options, report)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(engine: "AsyncLLM", prompt: str, params: SamplingParams, queue: Any, *, raw: bool) -> None:
    try:
        source: Any = prompt
        if not raw and engines.has_chat_template(engine):
            source = {"prompt_token_ids": await engine.encode_chat([{"role": "user", "content": prompt}])}
        stream = engine.generate(source, params)
        async with aclosing(stream) as outputs:
            async for output in outputs:
                queue.put_nowait(output)
    except Exception as error:  # noqa: BLE001 -- raised by the reader
        queue.put_nowait(error)


async def _print_one(prompt: str, queue: Any, options: argparse.Namespace, report: "StartupReport | None") -> None:
    finished = False
    while not finished:
        output = await queue.get()
        if isinstance(output, Exception):
            raise output
        if output.error is not None:
            raise RequestFailedError(output.error)
        finished = output.finished
        if report is not None:
            report.first_token()
        if options.json:
            answers = (
                (item.text, len(item.token_ids), item.finish_reason, item.stop_reason) for item in output.outputs
            )
            _print_answer(prompt, len(output.prompt_token_ids), answers)
        else:
            for choice in output.outputs:
                print(choice.text, end="" if len(output.outputs) == 1 else "\n\n", flush=True)
    if not options.json:
        print(flush=True)


def _print_answer(prompt: str, prompt_tokens: int, answers: Iterable[tuple[str, int, Any, Any]]) -> None:
    """One JSON object; of each answer its text, the number of its tokens, and why it ended."""
    import json

    names = ("text", "tokens", "finish_reason", "stop_reason")
    outputs = [dict(zip(names, answer, strict=True)) for answer in answers]
    print(
        json.dumps({"prompt": prompt, "prompt_tokens": prompt_tokens, "outputs": outputs}, ensure_ascii=False),
        flush=True,
    )


def _ask_all(server: "Server", prompts: list[str], options: argparse.Namespace) -> None:
    """A server's answers, one prompt after the other."""
    fields = remote.sampling_fields(options)
    streams_text = not options.json and fields.get("n", 1) == 1
    for prompt in prompts:
        route, body = _question(server, prompt, fields, raw=options.raw)
        if not streams_text:
            _print_whole(prompt, server.ask(route, {**body, "return_token_ids": True}), as_json=options.json)
            continue
        for event in server.stream(route, body):
            for choice in event.get("choices") or ():
                print(choice["text"] if options.raw else choice["delta"].get("content") or "", end="", flush=True)
        print(flush=True)


def _question(server: "Server", prompt: str, fields: dict[str, Any], *, raw: bool) -> tuple[str, dict[str, Any]]:
    if not raw:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **fields}
    if "max_tokens" not in fields:  # there a completion ends after 16 tokens unless the body says otherwise
        counted = server.ask("/tokenize", {"prompt": prompt})
        fields = {**fields, "max_tokens": max(1, counted["max_model_len"] - counted["count"])}
    return "/v1/completions", {"prompt": prompt, **fields}


def _print_whole(prompt: str, answer: dict[str, Any], *, as_json: bool) -> None:
    choices = answer["choices"]
    texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]
    if not as_json:
        print("".join(f"{text}\n\n" for text in texts), flush=True)
        return
    answers = (
        (text, len(choice["token_ids"]), choice["finish_reason"], choice["stop_reason"])
        for text, choice in zip(texts, choices, strict=True)
    )
    _print_answer(prompt, answer["usage"]["prompt_tokens"], answers)
