"""What other people's clients make of `quire serve`, each unchanged: structured output and tools, over four APIs.

    python scripts/clients.py [--quire PYTHON] [--node FOLDER] [--url URL] [--only WORD] [--json FILE]

Run it with a Python that has the clients (`pip install openai instructor 'pydantic-ai-slim[openai]' langchain-openai
anthropic ollama huggingface_hub langchain-huggingface`; `text-generation` needs an older huggingface_hub, in an
environment of its own, and so do the newest of openai, pydantic-ai and langchain: together pip takes older ones);
PYTHON is one that has Quire, and FOLDER one where `npm install ai @ai-sdk/openai-compatible zod ollama
@anthropic-ai/sdk` was done. A client that is not there is left out, and said. The embedded model answers, whose words
mean little: what is checked is that each answer arrives in the form that was asked for. Exit code: 1 where one did
not. FILE (`scripts/clients.json`, from which docs/guide/compatibility.md is made) takes the outcome of each that was
run, and keeps those of others.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL, KEY, ASKED = "quire-demo", "none", "Invent a person."
CALL_S, START_S = 60, 60
"""For one call of a client, and until the server is ready."""
MOST_TOKENS = 160


def person() -> Any:
    """The class that answers are parsed into."""
    from typing import Literal

    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=12)
        mood: Literal["good", "bad"]
        ages: list[int] = Field(max_length=3)

    return Person


def _openai(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=url, api_key=KEY, max_retries=0)


def _said(text: str = ASKED) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def openai_parse(url: str) -> Any:
    """A pydantic model as `response_format`."""
    done = _openai(url).chat.completions.parse(
        model=MODEL, messages=_said(), response_format=person(), max_tokens=MOST_TOKENS
    )
    return done.choices[0].message.parsed


def openai_stream(url: str) -> Any:
    """The streaming helper, which parses at the end."""
    asked: Any = {"model": MODEL, "messages": _said(), "response_format": person(), "max_tokens": MOST_TOKENS}
    with _openai(url).chat.completions.stream(**asked) as stream:
        assert any(event.type == "content.delta" for event in stream)
        return stream.get_final_completion().choices[0].message.parsed


def openai_tools(url: str) -> Any:
    """A call, its result, and the answer after it."""
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": parameters}}
    client, messages = _openai(url), _said("What is 3 plus 4?")
    asked: Any = {"model": MODEL, "tools": [tool], "max_tokens": MOST_TOKENS}
    message = client.chat.completions.create(messages=messages, tool_choice="required", **asked).choices[0].message
    (call, *_) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + arguments["b"])}
    messages += [message.model_dump(exclude_none=True), result]
    client.chat.completions.create(messages=messages, tool_choice="none", **asked)
    return arguments


def _instructor(url: str, mode: str) -> Any:
    import instructor

    client = instructor.from_openai(_openai(url), mode=instructor.Mode[mode])
    return client.chat.completions.create(
        model=MODEL, messages=_said(), response_model=person(), max_retries=0, max_tokens=MOST_TOKENS
    )


def _pydantic_ai(url: str, kind: str) -> Any:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    output: Any = {"native": NativeOutput, "tool": ToolOutput}[kind](person())
    return Agent(model, output_type=output, model_settings={"max_tokens": MOST_TOKENS}).run_sync(ASKED).output


def _langchain(url: str) -> Any:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    return ChatOpenAI(
        model=MODEL, base_url=url, api_key=SecretStr(KEY), max_retries=0, max_completion_tokens=MOST_TOKENS
    )


def langchain_structured(url: str) -> Any:
    """`with_structured_output(method="json_schema")`."""
    return _langchain(url).with_structured_output(person(), method="json_schema").invoke(ASKED)


def langchain_tools(url: str) -> Any:
    """`bind_tools` with a class."""
    (call, *_) = _langchain(url).bind_tools([person()], tool_choice="any").invoke(ASKED).tool_calls
    return person()(**call["args"])


def _anthropic(url: str) -> Any:
    from anthropic import Anthropic

    return Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0)


def anthropic_parse(url: str) -> Any:
    """A pydantic model as `output_format`. (The client leaves lengths out of its schema, so the class has none.)"""
    asked: Any = {"model": MODEL, "messages": _said(), "max_tokens": MOST_TOKENS, "output_format": mood()}
    return _anthropic(url).messages.parse(**asked).parsed_output


def anthropic_stream(url: str) -> Any:
    """The streaming helper."""
    asked: Any = {"model": MODEL, "messages": _said(), "max_tokens": MOST_TOKENS, "output_format": mood()}
    with _anthropic(url).messages.stream(**asked) as stream:
        assert "".join(stream.text_stream)
        return stream.get_final_message().parsed_output


def anthropic_runner(url: str) -> Any:
    """Its runner of tools, for two turns."""
    from anthropic import beta_tool

    called: list[str] = []

    def look_up(place: str) -> str:
        """The weather of a place."""
        called.append(place)
        return "rain"

    tool = beta_tool(look_up)
    asked: Any = {"model": MODEL, "messages": _said(), "tools": [tool], "max_tokens": MOST_TOKENS, "max_iterations": 2}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    return len(list(_anthropic(url).beta.messages.tool_runner(tool_choice=choice, **asked))) or None


def mood() -> Any:
    """A class of choices alone."""
    from typing import Literal

    from pydantic import BaseModel

    class Mood(BaseModel):
        mood: Literal["good", "bad"]

    return Mood


def _ollama(url: str) -> Any:
    from ollama import Client

    return Client(url.removesuffix("/v1"))


def ollama_format(url: str) -> Any:
    """A schema as `format`, in a stream."""
    asked: Any = {"model": MODEL, "messages": _said(), "options": {"num_predict": MOST_TOKENS}, "stream": True}
    parts = list(_ollama(url).chat(format=person().model_json_schema(), **asked))
    return person().model_validate_json("".join(part.message.content for part in parts))


def ollama_tools(url: str) -> Any:
    """A function as a tool: the answer is whole, whatever the model makes of it."""

    def look_up(place: str) -> str:
        """The weather of a place."""
        return place

    return _ollama(url).chat(MODEL, _said(), tools=[look_up], options={"num_predict": 20}).done_reason


_OLLAMA_NODE = """
import { Ollama } from 'ollama';
const [kind, baseURL, model] = process.argv.slice(2);
const client = new Ollama({ host: baseURL.replace(/\\/v1$/, '') });
const format = { type: 'object', required: ['name', 'mood', 'ages'], properties: {
  name: { type: 'string', maxLength: 12 }, mood: { enum: ['good', 'bad'] },
  ages: { type: 'array', items: { type: 'integer' }, maxItems: 3 } } };
const messages = [{ role: 'user', content: 'Invent a person.' }];
const asked = { model, messages, format, options: { num_predict: 160 } };
if (kind === 'chat') console.log((await client.chat(asked)).message.content);
if (kind === 'stream') {
  let text = '';
  for await (const part of await client.chat({ ...asked, stream: true })) text += part.message.content;
  console.log(text);
}
"""
_ANTHROPIC_NODE = """
import Anthropic from '@anthropic-ai/sdk';
const [kind, baseURL, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL: baseURL.replace(/\\/v1$/, ''), apiKey: 'none', maxRetries: 0 });
const input_schema = { type: 'object', required: ['name', 'mood', 'ages'], properties: {
  name: { type: 'string', maxLength: 12 }, mood: { enum: ['good', 'bad'] },
  ages: { type: 'array', items: { type: 'integer' }, maxItems: 3 } } };
const asked = { model, max_tokens: 160, messages: [{ role: 'user', content: 'Invent a person.' }],
  tools: [{ name: 'make', input_schema }], tool_choice: { type: 'any', disable_parallel_tool_use: true } };
const all = client.messages;
const done = kind === 'stream' ? await all.stream(asked).finalMessage() : await all.create(asked);
console.log(JSON.stringify(done.content[0].input));
"""


def _hub(url: str) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(url.removesuffix("/v1"), token=KEY)


def hub_generates(url: str) -> Any:
    """`text_generation`, whole and as a stream, with details: both say the same."""
    asked: Any = {"max_new_tokens": 16, "details": True, "return_full_text": False}
    client = _hub(url)  # one that is forgotten closes its streams
    whole = client.text_generation("Hello", top_n_tokens=2, decoder_input_details=True, **asked)
    *_, last = client.text_generation("Hello", stream=True, **asked)
    assert last.generated_text == whole.generated_text
    return whole.generated_text


def hub_chats(url: str) -> Any:
    """`chat_completion`, whole and as a stream, without the name of a model."""
    client = _hub(url)
    assert list(client.chat_completion(_said(), max_tokens=8, stream=True))
    return client.chat_completion(_said(), max_tokens=8).choices[0].message.content


def text_generation_client(url: str) -> Any:
    """TGI's own client: `generate`, `generate_stream`, and a refusal that it knows."""
    from text_generation import Client
    from text_generation.errors import ValidationError

    client = Client(url.removesuffix("/v1"), timeout=CALL_S)
    whole = client.generate("Hello", max_new_tokens=16)
    *_, last = client.generate_stream("Hello", max_new_tokens=16)
    assert last.generated_text == whole.generated_text
    try:
        list(client.generate_stream("Hello", max_new_tokens=10**6))
    except ValidationError:
        return whole.generated_text
    raise AssertionError("a refusal was passed over")


def langchain_endpoint(url: str) -> Any:
    """`HuggingFaceEndpoint.invoke` and `stream`."""
    from langchain_huggingface import HuggingFaceEndpoint

    llm = HuggingFaceEndpoint(endpoint_url=url.removesuffix("/v1"), max_new_tokens=16, do_sample=False)
    assert "".join(llm.stream("Hello"))
    return llm.invoke("Hello")


_NODE = """
import { generateObject, streamObject, generateText, tool } from 'ai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { z } from 'zod';
const [kind, baseURL, name] = process.argv.slice(2);
const model = createOpenAICompatible({ name: 'quire', baseURL, apiKey: 'none', supportsStructuredOutputs: true })(name);
const schema = z.object({ name: z.string().max(12), mood: z.enum(['good', 'bad']), ages: z.array(z.int()).max(3) });
const asked = { model, schema, prompt: 'Invent a person.', maxOutputTokens: 160, maxRetries: 0 };
if (kind === 'object') console.log(JSON.stringify((await generateObject(asked)).object));
if (kind === 'stream') {
  const done = streamObject(asked);
  for await (const _ of done.partialObjectStream);
  console.log(JSON.stringify(await done.object));
}
if (kind === 'tools') {
  const tools = { invent: tool({ description: 'Keeps a person.', inputSchema: schema }) };
  const done = await generateText({ ...asked, schema: undefined, tools, toolChoice: 'required' });
  console.log(JSON.stringify(schema.parse(done.toolCalls[0].input)));
}
"""


def _node(url: str, kind: str, program: str = _NODE) -> Any:
    folder = Path(os.environ["QUIRE_CLIENTS_NODE"])
    script = folder / "quire-client.mjs"
    script.write_text(program, encoding="utf-8")
    words = ["node", str(script), kind, url, MODEL]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=CALL_S, check=False)
    if done.returncode:
        found = [line for line in done.stderr.splitlines() if "rror" in line]
        raise RuntimeError((found or ["it failed"])[0])
    return person()(**json.loads(done.stdout))


CASES: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("openai", "parse", openai_parse),
    ("openai", "stream", openai_stream),
    ("openai", "tool loop", openai_tools),
    ("instructor", "JSON_SCHEMA", lambda url: _instructor(url, "JSON_SCHEMA")),
    ("instructor", "TOOLS", lambda url: _instructor(url, "TOOLS")),
    ("pydantic-ai-slim", "NativeOutput", lambda url: _pydantic_ai(url, "native")),
    ("pydantic-ai-slim", "ToolOutput", lambda url: _pydantic_ai(url, "tool")),
    ("langchain-openai", "with_structured_output", langchain_structured),
    ("langchain-openai", "bind_tools", langchain_tools),
    ("huggingface_hub", "text_generation", hub_generates),
    ("huggingface_hub", "chat_completion", hub_chats),
    ("text-generation", "generate, generate_stream", text_generation_client),
    ("langchain-huggingface", "HuggingFaceEndpoint", langchain_endpoint),
    ("ai (npm)", "generateObject", lambda url: _node(url, "object")),
    ("ai (npm)", "streamObject", lambda url: _node(url, "stream")),
    ("ai (npm)", "generateText with tools", lambda url: _node(url, "tools")),
    ("anthropic", "messages.parse", anthropic_parse),
    ("anthropic", "messages.stream", anthropic_stream),
    ("anthropic", "beta.messages.tool_runner", anthropic_runner),
    ("@anthropic-ai/sdk (npm)", "messages.create with tools", lambda url: _node(url, "create", _ANTHROPIC_NODE)),
    ("@anthropic-ai/sdk (npm)", "messages.stream with tools", lambda url: _node(url, "stream", _ANTHROPIC_NODE)),
    ("ollama", "chat with format, streamed", ollama_format),
    ("ollama", "chat with tools", ollama_tools),
    ("ollama (npm)", "chat with format", lambda url: _node(url, "chat", _OLLAMA_NODE)),
    ("ollama (npm)", "chat with format, streamed", lambda url: _node(url, "stream", _OLLAMA_NODE)),
)
"""Package, function of it, call."""


def installed(package: str, node: Path | None) -> str | None:
    """Its version."""
    if package.endswith("(npm)"):
        manifest = None if node is None else node / "node_modules" / package.split()[0] / "package.json"
        if manifest is None or not manifest.exists() or shutil.which("node") is None:
            return None
        return str(json.loads(manifest.read_text("utf-8"))["version"])
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def server(python: str) -> Iterator[str]:
    """A server of the embedded model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([python, "-m", "quire", "serve", "--quiet", "--port", str(port)], env=environment)
    try:
        latest = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                if time.monotonic() > latest or process.poll() is not None:
                    raise SystemExit("clients: the server did not start") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


def attempt(call: Callable[[str], Any], url: str) -> tuple[bool, str]:
    """Whether an answer came in its form, and what came."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no answer in {CALL_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(CALL_S)
    try:
        found = call(url)
        return found is not None, repr(found)[:100]
    except Exception as error:  # noqa: BLE001 -- another program's, and shown
        return False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        signal.alarm(0)


def main() -> int:
    """One line for each function."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quire", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--node", metavar="FOLDER", type=Path)
    parser.add_argument("--url", help="of a server that runs, with /v1")
    parser.add_argument("--only", metavar="WORD", default="", help="cases whose line holds it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="note outcomes there")
    options = parser.parse_args()
    if options.node is not None:
        os.environ["QUIRE_CLIENTS_NODE"] = str(options.node.resolve())
    failed = 0
    outcomes = json.loads(options.json.read_text("utf-8")) if options.json and options.json.exists() else {}
    with contextmanager(lambda: iter([options.url]))() if options.url else server(options.quire) as url:
        for package, function, call in CASES:
            if options.only not in f"{package} {function}":
                continue
            known = installed(package, options.node)
            if known is None:
                print(f"absent  {package}: {function}")
                continue
            works, shown = attempt(call, url)
            failed += not works
            ended = "passes" if works else "fails"
            outcomes[f"{package} {known}: {function}"] = f"{ended}, {datetime.now(UTC):%Y-%m-%d}"
            print(f"{'works ' if works else 'FAILED'}  {package} {known}: {function}  {shown}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
